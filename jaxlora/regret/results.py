"""The result files of an experiment: one JSON per run, and the identity that they must share.

    folder = RunFolder(config)                      # results/<prefix>-regret
    folder.write(run, record); folder.records()     # by name
    losses(records, cells)                          # what the design needs from them

A run is written whole or not at all, so an experiment continues from whatever files it finds. They are all
that is needed to continue on another machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jaxlora.checkpoints.run_state import differences
from jaxlora.config import RunConfig
from jaxlora.regret.design import Cell, RunId
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_object, write_json_atomic
from jaxlora.runtime.folders import Taken, claimed
from jaxlora.train.job import Job
from jaxlora.train.manifest import tokens_hash

VERSION = 1
MAX_BYTES = 20_000_000  # per result


class RunFolder:
    """The folder with the runs of one experiment."""

    def __init__(self, config: RunConfig):
        self.path = Path(config.results_dir) / f"{config.prefix}-regret"
        self.runs = self.path / "runs"

    def file(self, name: str) -> Path:
        return self.runs / f"{name}.json"

    def write(self, record: Record) -> None:
        write_json_atomic(self.file(record["name"]), record)

    def records(self) -> dict[str, Record]:
        """All results, by run name.

        Raises:
          UserError: a file is damaged or is not a result.
        """
        found = {}
        for file in sorted(self.runs.glob("*.json")):
            record = read_object(file, MAX_BYTES)
            if record.get("version") != VERSION or record.get("name") != file.stem or not _whole(record):
                raise UserError(f"{file}: is not the result of a run; delete it to repeat the run")
            found[file.stem] = record
        return found

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Try to claim this run; yields whether that worked. The claim ends with the block or the process."""
        with ExitStack() as held:
            try:
                held.enter_context(claimed(self.file(name)))
                mine = True
            except Taken:
                mine = False
            yield mine

    def in_work(self) -> set[str]:
        """Names of runs that seem in progress, judging by their locks; some may belong to dead processes."""
        return {file.name[1 : -len(".json.lock")] for file in self.runs.glob(".*.json.lock")}


def _whole(record: Record) -> bool:
    """Whether the fields needed by the tables are present."""
    held_out = record.get("held_out")
    numbers = ("rate", "seed", "parameters", "steps", "batch_rows")
    return (
        isinstance(held_out, list)
        and all(isinstance(row, list) and len(row) == 3 for row in held_out)
        and all(isinstance(record.get(name), int | float) for name in numbers)
        and isinstance(record.get("identity"), dict)
        and isinstance(record.get("train"), dict)
    )


def identity_of(job: Job) -> Record:
    """What all runs of an experiment share: base, rows, and settings that affect results."""
    config = job.config
    return {
        "base": job.base.fingerprint(),
        "train_rows": tokens_hash(job.train_rows),
        "held_out_rows": tokens_hash(job.validation_rows),
        "dtype": config.model.dtype,
        "alpha": config.lora.alpha,
        "epochs": config.train.epochs,
        "shuffle": config.data.shuffle,
        "optimizer": {
            name: value
            for name, value in dataclasses.asdict(config.optim).items()
            if name not in ("peak_lr", "warmup_fraction", "min_lr_fraction")
        },
    }


def check_identity(records: Mapping[str, Record], identity: Record, folder: Path) -> None:
    """Refuse results from another base, other rows or other settings.

    Raises:
      UserError: names the first such run and what differs.
    """
    for name, record in records.items():
        if different := differences(record["identity"], identity):
            raise UserError(
                f"{folder / name}.json: was made with another configuration: {different[0]:.300}; give"
                " another --config.prefix, or remove that folder"
            )


def losses(
    records: Mapping[str, Record], runs: Sequence[RunId], marks: Sequence[int]
) -> dict[RunId, dict[int, float]]:
    """Held-out loss of the finished runs among these, at the marks and the end; infinite once diverged."""
    found = {}
    for run in runs:
        if (record := records.get(run.name)) is not None:
            curve = {int(step): loss for step, loss, _ in record["held_out"]}
            steps = {mark for mark in marks if mark <= record["steps"]} | {record["steps"]}
            found[run] = {step: _finite(curve.get(step)) for step in steps}
    return found


def _finite(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.inf


def known_losses(
    records: Mapping[str, Record], cells: Sequence[Cell], config: RunConfig
) -> dict[RunId, dict[int, float]]:
    """`losses` of every run that the experiment might need."""
    reach = range(-config.regret.rates - config.regret.extend, config.regret.rates + config.regret.extend + 1)
    seeds = range(config.seed, config.seed + config.regret.repeats + 1)
    runs = [RunId(cell, place, seed) for cell in cells for place in reach for seed in seeds]
    return losses(records, runs, config.regret.marks)
