"""The run directory: what is written where, and when a directory may be resumed.

<results>/<run_id>/
  manifest.json       what was run: code, versions, device, configuration, data hashes, row ids, plan
  metrics.jsonl       one record a step and a validation
  summary.json        the outcome; its presence with status "completed" marks a finished run
  sample_render.txt   the first training row as the model sees it
  checkpoints/        adapter, optimizer state and position, for resuming
  selected/           the adapter with the lowest validation NLL, in PEFT format
  tensorboard/        the same curves for TensorBoard
  validation.png      validation NLL by step
  failure.json        only if it failed: stage, step and trace
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jax

from jaxlora.checkpoints.huggingface import fingerprint
from jaxlora.config import to_dict
from jaxlora.data.sources import locate
from jaxlora.errors import UserError
from jaxlora.lora import count_trainable
from jaxlora.models.parameters import count_matrix_parameters, count_parameters
from jaxlora.records import (
    metric_record,
    read_json,
    read_jsonl,
    summary_record,
    write_json_atomic,
    write_jsonl_atomic,
)
from jaxlora.train.job import Job, token_count

# Fields that change how or where a run is computed, not what it computes: they may differ on resuming.
_FREE = {
    "results_dir",
    "overwrite",
    "mesh",
    "eval",
    "selection",  # what a study makes of the configuration; its runs hold their own values
    "sweep",
    "model.attention",
    "model.layers",
    "model.remat",
    "train.layout",
    "train.buffer_sizes",
    "train.buffer_multiple",
    "train.max_buffer_tokens",
    "data.gate_report",
    "data.allow_ungated",
    "data.train_path",  # the files' hashes are compared instead
    "data.validation_path",
    "model.path",  # the base's fingerprint is compared instead
    "model.tokenizer",
}
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


class Board:
    """TensorBoard curves of one run."""

    def __init__(self, folder: Path):
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder))

    def write(self, record: dict[str, Any]) -> None:
        """Add every number of a metrics record under its split's name."""
        for name, value in record.items():
            if (
                name not in {"seed", "step"}
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                self._writer.add_scalar(f"{record['split']}/{name}", float(value), record["step"])

    def close(self) -> None:
        self._writer.close()


@dataclass
class RunDirectory:
    """An opened run directory; this process holds its lock."""

    path: Path
    job: Job
    lock: IO[str]

    @classmethod
    def open(cls, job: Job) -> RunDirectory:
        """Make the directory, or take up an unfinished run of the same configuration.

        Raises:
          UserError: the run is finished, belongs to another configuration, or is being written now.
        """
        path = job.config.run_dir
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path.with_name(f".{path.name}.lock"), path)
        if job.config.overwrite and path.exists():
            shutil.rmtree(path)
        manifest = _manifest(job)
        if path.exists():
            _check_resumable(path, manifest)
        else:
            path.mkdir()
        (path / "failure.json").unlink(missing_ok=True)
        write_json_atomic(path / "manifest.json", manifest)
        sample = job.train_rows[0]
        (path / "sample_render.txt").write_text(str(job.tokenizer.decode(sample.tokens)), encoding="utf-8")
        return cls(path, job, lock)

    def rewind(self, step: int) -> None:
        """Drop what was recorded after `step`: the metrics file and the curves then say one thing."""
        file = self.path / "metrics.jsonl"
        kept = [r for r in read_jsonl(file) if r["step"] <= step] if file.exists() else []
        write_jsonl_atomic(file, kept)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    @contextmanager
    def tensorboard(self) -> Iterator[Board]:
        """Curves of this run; those of the steps before a resumption are written again from the metrics."""
        board = Board(self.path / "tensorboard")
        try:
            for record in read_jsonl(self.path / "metrics.jsonl"):
                board.write(record)
            yield board
        finally:
            board.close()

    def step_record(
        self, step: int, values: dict[str, float], tokens: int, rate: float, speed: dict[str, float | None]
    ) -> dict[str, Any]:
        """The metrics record of one training step. `token_count` is the step's, in shifted tokens."""
        return metric_record(
            **self._identity(),
            step=step,
            split="train",
            loss=values["nll"] / values["weight"],
            learning_rate=rate,
            token_count=tokens,
            loss_tokens=int(values["weight"]),
            grad_norm=values["grad_norm"],
            update_norm=values["update_norm"],
            **speed,
        )

    def validation_record(self, step: int, mean_nll: float) -> dict[str, Any]:
        """The metrics record of one validation."""
        return metric_record(
            **self._identity(),
            checkpoint=f"step-{step}",
            step=step,
            split="validation",
            loss=mean_nll,
            token_count=token_count(self.job.validation_rows),
        )

    def _identity(self) -> dict[str, Any]:
        config = self.job.config
        return {"run_id": config.run_id, "condition": config.lora.condition, "seed": config.seed}

    def finish(self, step: int, validations: dict[int, float]) -> None:
        """Write the picture and `summary.json`: the run is complete."""
        from jaxlora.train.display import draw_validation

        draw_validation(self.path / "validation.png", validations, step, self.job.config.run_id)
        plan, job = self.job.plan, self.job
        validation_tokens = token_count(job.validation_rows) * len(plan.validation_steps)
        train_tokens = token_count(job.train_rows) * job.config.train.epochs
        names = (
            "manifest.json",
            "metrics.jsonl",
            "sample_render.txt",
            "selected",
            "tensorboard",
            "validation.png",
        )
        record = summary_record(
            **self._identity(),
            checkpoint=f"step-{step}",
            dataset=job.config.data.train_path,
            primary_metric={"name": "validation_mean_nll", "value": validations[step]},
            artifact_paths={Path(name).stem: name for name in names},
            status="completed",
            token_count=train_tokens + validation_tokens,
            train_token_count=train_tokens,
            validation_token_count=validation_tokens,
            validations=[{"step": s, "mean_nll": nll} for s, nll in sorted(validations.items())],
            selected_step=step,
        )
        write_json_atomic(self.path / "summary.json", record)

    def write_failure(self, stage: str, step: int, error: BaseException, trace: str) -> None:
        """Write `failure.json`."""
        record = self._identity() | {
            "stage": stage,
            "step": step,
            "error": f"{type(error).__name__}: {error}",
            "trace": trace,
        }
        write_json_atomic(self.path / "failure.json", record)


def _lock(file: Path, run: Path) -> IO[str]:
    """An exclusive lock that the system releases when this process ends, however it ends."""
    handle = file.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{run}: another process is writing this run; wait for it or stop it") from None
    return handle


def _check_resumable(path: Path, manifest: dict[str, Any]) -> None:
    if not (path / "manifest.json").is_file():
        if any(path.iterdir()):
            raise UserError(f"{path}: exists and is not a run; choose another results_dir or prefix")
        return
    old = read_json(path / "manifest.json")
    summary = path / "summary.json"
    if summary.is_file() and read_json(summary).get("status") == "completed":
        raise UserError(f"{path}: this run is finished; --config.overwrite=true deletes it and starts again")
    different = differences(identity(old), identity(manifest))
    if different:
        raise UserError(
            f"{path}: an unfinished run of another configuration; it differs in {'; '.join(different)}."
            " Change the prefix, or give --config.overwrite=true to delete it"
        )


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What two manifests must share for one to resume the other, flat."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if prefix in _FREE:
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", manifest.get("config", {}))
    for name in ("train", "validation"):
        flat[f"dataset.{name}.sha256"] = manifest.get("dataset", {}).get(name, {}).get("sha256")
    flat["base"] = manifest.get("base", {}).get("fingerprint")
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Where two identities differ, in words."""
    return [f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in new if old.get(key) != new[key]]


def _manifest(job: Job) -> dict[str, Any]:
    config, plan = job.config, job.plan
    device = jax.devices()[0]
    datasets = {
        "train": (config.data.train_path, job.train_rows, job.reports[0]),
        "validation": (config.data.validation_path, job.validation_rows, job.reports[1]),
    }
    return {
        "run_id": config.run_id,
        "command": sys.argv,
        "code": git_state(Path(__file__).parent),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "device": {"kind": device.device_kind, "count": jax.device_count(), "platform": device.platform},
        "mesh": dict(job.mesh.shape),
        "config": to_dict(config),
        "base": {
            "path": config.model.path,
            "fingerprint": fingerprint(job.model_dir) if job.model_dir else f"random-{config.seed}",
            "parameters": count_parameters(job.spec.config),
            "matrix_parameters": count_matrix_parameters(job.spec.config),
        },
        "lora": {
            **dataclasses.asdict(config.lora),
            "modules": [weight.name for weight in job.spec.adapted],
            "trainable_parameters": count_trainable(job.spec),
        },
        "schedule": {
            "steps_per_epoch": plan.steps_per_epoch,
            "total_steps": plan.total_steps,
            "warmup_steps": plan.warmup_steps,
            "validation_steps": list(plan.validation_steps),
        },
        "buffers": {"train": list(job.train_layout.sizes), "validation": list(job.validation_layout.sizes)},
        "gates": dataclasses.asdict(job.gates),
        "dataset": {
            name: {
                "path": path,
                "sha256": hashlib.sha256(locate(path).read_bytes()).hexdigest(),
                "rows": len(rows),
                "tokens": token_count(rows),
                "skipped": [dataclasses.asdict(bad) for bad in report.skipped],
                "row_ids": [row.row_id for row in rows],
            }
            for name, (path, rows, report) in datasets.items()
        },
    }


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
    if sha is None and "JAXLORA_GIT_SHA" in os.environ:  # a copy without .git; the launcher says what it is
        return {"git_sha": os.environ["JAXLORA_GIT_SHA"], "dirty": os.environ.get("JAXLORA_GIT_DIRTY") == "1"}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"git_sha": sha, "dirty": None if changes is None else bool(changes)}
