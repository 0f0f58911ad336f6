"""TensorBoard: the curves of a run, its settings, its answers, and in what it ended.

    board = Board(run_dir / "tensorboard", config)
    board.write(metric_record(...))
    write_outcome(run_dir / "tensorboard", {"final/validation_nll": 0.336}, step=3169)

With one folder a run, `tensorboard --logdir results` lists all runs of a sweep in its HParams table.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from jaxlora.config import RunConfig, to_dict

_NO_CURVE = {"seed", "step"}


class _EventFile:
    """A new event file of a folder. TensorBoard's own writer has a thread, whose errors print traces.

    Raises:
      OSError: the disk is full.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)  # names in order: TensorBoard reads the files so
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb", buffering=0)
        self.add(file_version="brain.Event:2")

    def add(self, **fields: Any) -> None:
        """Write an event now."""
        RecordWriter(self).write(Event(wall_time=time.time(), **fields).SerializeToString())

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.add(step=step, summary=scalar_pb(name, value))

    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """As it is, in a block of code: TensorBoard would read it as Markdown."""
        block = "\n".join("    " + line for line in text.splitlines())
        self.add(step=step, summary=text_pb(name, block))

    def write(self, content: bytes) -> None:
        """For `RecordWriter`; part of a record would hide all that follow it."""
        if self._file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        self._file.close()


class Board:
    """The curves of one run; its settings are written when it is opened."""

    def __init__(self, folder: Path, config: RunConfig):
        _write_settings(folder, config)
        self._writer = _EventFile(folder)

    def write(self, record: dict[str, Any]) -> None:
        """Add the curves of a metrics record."""
        for name, value in curves(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def write_sample(self, record: dict[str, Any], number: int) -> None:
        """Add the answer to one of the prompts that validations show; see `jaxlora.train.samples`."""
        parts = (f"[{name}]\n{record[name]}" for name in ("prompt", "answer", "expected"))
        self._writer.add_text(f"samples/{number}", "\n\n".join(parts), record["step"])

    def close(self) -> None:
        self._writer.close()


def curves(record: dict[str, Any]) -> dict[str, float]:
    """Every number of a metrics record under its split's name, and the gradient's norm per token: the loss is
    a sum, so the norm itself grows with the tokens of a step."""
    numbers = {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_CURVE
    }
    if "grad_norm" in numbers and numbers.get("loss_tokens"):
        numbers["grad_norm_per_token"] = numbers["grad_norm"] / numbers["loss_tokens"]
    return {f"{record['split']}/{name}": value for name, value in numbers.items()}


def write_outcome(folder: Path, values: Mapping[str, float], step: int) -> None:
    """Say what came of the run in `folder`, in an event file of its own."""
    writer = _EventFile(folder)
    for name, value in values.items():
        writer.add_scalar(name, float(value), step)
    writer.close()


def _write_settings(folder: Path, config: RunConfig) -> None:
    """The settings that tell the runs of a sweep from one another."""
    lora, optim, train = config.lora, config.optim, config.train
    settings = {
        "condition": config.condition,
        "seed": config.seed,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "learning_rate": optim.peak_lr,
        "schedule": optim.schedule,
        "batch_rows": train.batch_rows,
        "epochs": train.epochs,
    }
    writer = _EventFile(folder)
    writer.add(summary=hparams_pb(settings))
    writer.add_text("config", json.dumps(to_dict(config), indent=2, ensure_ascii=False))
    writer.close()
