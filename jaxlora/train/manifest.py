"""The inputs of a run (`manifest.json`), and whether a run may be resumed with the present ones.

different = differences(identity(old_manifest), identity(new_manifest))     # must be empty to resume
rounding = rounding_differences(old_manifest, new_manifest)                 # may differ, but is reported
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlora.checkpoints.base import tokenizer_sha256
from jaxlora.checkpoints.peft import WEIGHTS
from jaxlora.checkpoints.run_state import REWARD_FILE, differences
from jaxlora.config import RunConfig, to_dict
from jaxlora.data.render import RenderedRow
from jaxlora.lora import count_trainable
from jaxlora.models.families import count_matrix_parameters, count_parameters
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import sha256_of
from jaxlora.runtime.remote import resolve
from jaxlora.runtime.text import harmless, without_secrets
from jaxlora.train.job import Job, Prepared, token_count

# Fields of the configuration that do not affect the result: they may differ when a run is resumed.
_FREE = {
    "results_dir",
    "overwrite",
    "tracking",
    "price",
    "eval",
    "selection",  # used by studies only; their runs hold their own values
    "sweep",
    "regret",
    "train.checkpoint_every",
    "train.grace_seconds",
    "train.samples",
    "train.startup_check",
    "data.gate_report",
    "data.cache",
    "data.allow_ungated",
    "data.train_path",  # the files' and the tokens' hashes are compared instead
    "data.validation_path",
    "model.tokenizer",
    "model.path",  # the base's fingerprint is compared instead
    "lora.start",  # its weights' hash is compared instead
}
# Fields missing from older manifests, with the values that those runs used.
_ADDED = {"lora.dropout": 0.0, "train.max_steps": None, "train.early_stopping": None}
# Fields that a reinforcement-learning run does not read, and those that only such a run reads.
_OF_ROWS, _OF_REWARDS = {"data", "train.epochs", "train.batch_rows", "train.validation_every"}, {"rl"}
_FREE_OF_REWARDS = {"rl.problems", "rl.eval_problems"}  # their hashes are compared instead
# Fields that change the order of float sums: results agree up to rounding, but not bit for bit.
_ROUNDING = {
    "mesh",
    "model.attention",
    "model.layers",
    "model.remat",
    "train.layout",
    "train.buffer_sizes",
    "train.buffer_multiple",
    "train.max_buffer_tokens",
}
# The same for reinforcement-learning runs, with the values used by runs whose manifests lack them.
_ROUNDING_OF_REWARDS = {"rl.share_prompts": False}
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "grain",
    "numpy",
    "safetensors",
)


def make_manifest(job: Job) -> dict[str, Any]:
    """The manifest of a run that is now started or resumed.

    Raises:
      UserError: a file of rows was replaced between its gate check and its reading.
    """
    plan = job.plan
    _check_gated(job)
    return common_manifest(job) | {
        "schedule": {
            "steps_per_epoch": plan.steps_per_epoch,
            "total_steps": plan.total_steps,
            "warmup_steps": plan.warmup_steps,
            "validation_steps": list(plan.validation_steps),
        },
        "buffers": {"train": list(job.train_layout.sizes), "validation": list(job.validation_layout.sizes)},
        "gates": dataclasses.asdict(job.gates),
        "dataset": _datasets(job),
    }


def common_manifest(job: Prepared) -> dict[str, Any]:
    """Common to the manifests of all kinds of runs: code, machine, configuration, base, trained part."""
    config = job.config
    device = jax.devices()[0]
    return {
        "run_id": config.run_id,
        "command": [harmless(without_secrets(word)) for word in sys.argv],
        "code": git_state(Path(__file__).parent),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "device": {"kind": device.device_kind, "count": jax.device_count(), "platform": device.platform},
        "mesh": dict(job.mesh.shape),
        "config": to_dict(config),
        "base": {
            "path": config.model.path,
            "fingerprint": job.base.fingerprint(),
            **({} if job.spec.scheme is None else {"products": job.spec.scheme.products}),
            "parameters": count_parameters(job.spec.config),
            "matrix_parameters": count_matrix_parameters(job.spec.config),
        },
        "tokenizer": {
            "path": config.model.tokenizer or config.model.path,
            "sha256": tokenizer_sha256(job.tokenizer),
        },
        "trained": {
            "what": config.train.what,
            "condition": config.condition,
            "parameters": count_trainable(job.spec),
            "start_sha256": _start_hash(config),
        },
        "lora": None if job.spec.full else _lora(job),
    }


def _datasets(job: Job) -> dict[str, Any]:
    """The rows of each part: their source, their hashes, and what was skipped."""
    data = job.config.data
    parts = {
        "train": (data.train_path, job.train_rows, job.reports[0]),
        "validation": (data.validation_path or data.train_path, job.validation_rows, job.reports[1]),
    }
    return {
        name: {
            "path": path,
            "sha256": report.sha256,
            "tokens_sha256": tokens_hash(rows),
            "rows": len(rows),
            "tokens": token_count(rows),
            "skipped": [dataclasses.asdict(bad) for bad in report.skipped],
            "row_ids": [row.row_id for row in rows],
        }
        for name, (path, rows, report) in parts.items()
    }


def _check_gated(job: Job) -> None:
    gates = job.gates
    for report, gated in zip(job.reports, (gates.train_sha256, gates.validation_sha256), strict=True):
        if gated and gated != report.sha256:
            raise UserError(f"{report.path}: changed while it was being read; run the same command again")


def check_inputs(job: Prepared, manifest: dict[str, Any]) -> None:
    """Refuse to train on anything but what the manifest names; called once everything is loaded.

    Raises:
      UserError: the base, or the adapter that the run starts from, was replaced meanwhile.
    """
    now = {"model.path": job.base.fingerprint(), "lora.start": _start_hash(job.config)}
    then = {"model.path": manifest["base"]["fingerprint"], "lora.start": manifest["trained"]["start_sha256"]}
    for field, value in now.items():
        if value != then[field]:
            raise UserError(f"config.{field}: its files changed while being read; run the same command again")


def _lora(job: Prepared) -> dict[str, Any]:
    """The adapter: its settings and the modules it adapts."""
    return {
        **dataclasses.asdict(job.config.lora),
        "condition": job.config.lora.condition,
        "modules": [weight.name for weight in job.spec.adapted],
        "trainable_parameters": count_trainable(job.spec),
    }


def _start_hash(config: RunConfig) -> str | None:
    start = config.lora.start
    return None if start is None else sha256_of(resolve(start) / WEIGHTS)


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What two manifests must share for one to resume the other, as a flat dictionary."""
    config = _flat(manifest.get("config", {}), "")
    of_rewards = _OF_REWARDS
    if manifest.get("kind") == "rl":
        of_rewards = _OF_ROWS | _FREE_OF_REWARDS | set(_ROUNDING_OF_REWARDS)
    flat = _ADDED | {name: value for name, value in config if not _in(name, _FREE | _ROUNDING | of_rewards)}
    for name in ("train", "validation"):
        data = (manifest.get("dataset") or {}).get(name) or {}
        for key in ("sha256", "tokens_sha256"):  # of the file; of the rows under the tokenizer, with weights
            flat[f"dataset.{name}.{key}"] = data.get(key)
    base = manifest.get("base") or {}
    start = (manifest.get("trained") or {}).get("start_sha256")
    flat["tokenizer"] = (manifest.get("tokenizer") or {}).get("sha256")
    flat[REWARD_FILE] = (manifest.get("reward") or {}).get("sha256")
    flat["base.products"] = base.get("products")  # with a quantised base, which operands are rounded
    return flat | {"base": base.get("fingerprint"), "base.parameters": base.get("parameters"), "start": start}


def rounding_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences that change how sums are rounded: layout, mesh, device, versions."""

    def parts(manifest: dict[str, Any]) -> dict[str, Any]:
        config = _flat(manifest.get("config", {}), "")
        added = _ROUNDING_OF_REWARDS if manifest.get("kind") == "rl" else {}
        flat = added | {name: value for name, value in config if _in(name, _ROUNDING | set(added))}
        own = {key: manifest.get(key) or {} for key in ("mesh", "device", "packages", "code")}
        return flat | {name: value for name, value in _flat(own, "") if name != "code.dirty"}

    return differences(parts(old), parts(new))


def same_but_for_command(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two manifests describe the same run, however it was started and wherever it is stored."""

    def told(manifest: dict[str, Any]) -> dict[str, Any]:
        given = manifest.get("config") or {}
        config = {name: value for name, value in given.items() if name not in ("overwrite", "results_dir")}
        return {name: value for name, value in manifest.items() if name != "command"} | {"config": config}

    return bool(told(old) == told(json.loads(json.dumps(new))))


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _in(name: str, fields: set[str]) -> bool:
    return name in fields or name.partition(".")[0] in fields


def tokens_hash(rows: list[RenderedRow]) -> str:
    """SHA-256 over each row's length, tokens and weights."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.int64(len(row.tokens)).tobytes())
        digest.update(np.asarray(row.tokens, np.int32).tobytes())
        digest.update(np.asarray(row.weights, np.float32).tobytes())
    return digest.hexdigest()


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that holds `folder`; nulls outside a checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD")
    if sha is None and "JAXLORA_GIT_SHA" in os.environ:  # a copy without .git: the launcher sets the commit
        return {"git_sha": os.environ["JAXLORA_GIT_SHA"], "dirty": os.environ.get("JAXLORA_GIT_DIRTY") == "1"}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"git_sha": sha, "dirty": None if changes is None else bool(changes)}
