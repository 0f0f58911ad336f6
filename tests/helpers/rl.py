"""Runs that learn from rewards, small enough for seconds: a random model of one layer, rewards by a rule.

config = rl_config(make_model(folder), folder / "results", steps=3)
with ruled_rewards():
    result = run(config)
assert outcome(config.run_dir) == other
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax

from jaxlora.config import RunConfig, from_dict
from jaxlora.rl import loop
from jaxlora.rl.job import RLJob, prepare
from jaxlora.rl.rewards import Graded
from jaxlora.runtime.files import sha256_of
from jaxlora.runtime.remote import embedded_path
from jaxlora.train.step import wire

TIMES = {"seconds", "tokens_per_second", "peak_memory_bytes"}


def make_model(folder: Path, layers: int = 1) -> Path:
    """A model's folder without weights: few layers, the tokenizer of the embedded base."""
    base = embedded_path("base")
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | small))
    return folder


def rl_config(model: Path, results: Path, **rl) -> RunConfig:
    """A run of a few steps of 4 prompts x 4 answers; `rl` holds fields of `RunConfig.rl`, and others by
    group, as in `train={"what": "full"}`."""
    groups = {name: rl.pop(name) for name in ("train", "optim", "lora", "mesh") if name in rl}
    asked = {
        "problems": "embedded:data/train.jsonl",
        "problem_rows": 10,
        "eval_problems": "embedded:data/val.jsonl",
        "eval_rows": 4,
        "steps": 3,
        "prompts": 4,
        "group": 4,
        "max_new_tokens": 6,
        "slots": 8,
        "eval_every": 1,
    }
    values = {
        "prefix": "rl",
        "results_dir": str(results),
        "model": {"path": str(model), "dtype": "float32", "random_weights": True},
        "lora": {"rank": 1},
        "optim": {"peak_lr": 1e-2, "schedule": "constant"},
        "train": {"layout": "padded", "buffer_multiple": 32, "max_buffer_tokens": 2048},
        "rl": asked | rl,
    }
    for name, group in groups.items():
        values[name] = values.get(name, {}) | group
    return from_dict(values)


def job_of(config: RunConfig, devices: int = 1) -> RLJob:
    """The job on so many of the simulated devices."""
    machine = wire(config.model, config.mesh, jax.devices()[:devices])
    return replace(prepare(config), machine=replace(machine, scan=False))


def parity(text: str) -> float:
    """A rule that half of all texts follow."""
    return float(sum(map(ord, text)) % 2)


@contextmanager
def ruled_rewards(rule: Callable[[str], float] = parity) -> Iterator[None]:
    """Inside, rewards follow from the text by a rule, in this process."""

    class Ruled:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def grade(self, texts: Sequence) -> list[Graded]:
            return [Graded(rule(text), rule(text) >= 1, not cut, None) for _, text, cut in texts]

    with mock.patch.object(loop, "grader_named", return_value=Ruled()):
        yield


def run(config: RunConfig, devices: int = 1) -> loop.RLResult:
    """Learn, or go on with it."""
    return loop.learn(job_of(config, devices))


def records(config: RunConfig, split: str = "train") -> list[dict]:
    """The metrics of a run without its times."""
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [without_times(row) for row in map(json.loads, lines) if row["split"] == split]


def without_times(record: dict) -> dict:
    """A metrics record without what depends on the clock."""
    return {k: v for k, v in record.items() if k.partition("/")[0] not in TIMES}


def outcome(run_dir: Path) -> dict[str, bytes]:
    """Everything of a finished run that must not depend on how often it was disturbed."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = {"metrics": json.dumps([without_times(json.loads(line)) for line in lines]).encode()}
    for folder in ("samples", "selected"):
        for file in sorted((run_dir / folder).rglob("*")):
            found[file.relative_to(run_dir).as_posix()] = file.read_bytes()
    summary = json.loads((run_dir / "summary.json").read_text())
    for name in ("metrics.jsonl", "manifest.json"):
        assert summary["sha256"].pop(name) == sha256_of(run_dir / name)
    found["summary"] = json.dumps(summary).encode()
    found["files"] = str(sorted(file.name for file in run_dir.iterdir())).encode()
    found["checkpoints"] = str(sorted(file.name for file in (run_dir / "checkpoints").iterdir())).encode()
    return found
