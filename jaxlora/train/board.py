"""TensorBoard: the curves of a run, its settings, its sample answers and its outcome.

    board = Board(run_dir / "tensorboard", config)
    board.write(metric_record(...))
    write_outcome(run_dir / "tensorboard", {"final/validation_nll": 0.336}, step=3169)

With one folder per run, `tensorboard --logdir results` lists all runs of a sweep in its HParams table.
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
    """A new event file in a folder. TensorBoard's own writer uses a thread, whose errors print traces.

    Raises:
      OSError: the disk is full.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)  # TensorBoard reads files in order of name
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb", buffering=0)
        self.add(file_version="brain.Event:2")

    def add(self, **fields: Any) -> None:
        """Write an event immediately."""
        RecordWriter(self).write(Event(wall_time=time.time(), **fields).SerializeToString())

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.add(step=step, summary=scalar_pb(name, value))

    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """Write text verbatim in a code block: TensorBoard would render it as Markdown."""
        block = "\n".join("    " + line for line in text.splitlines())
        self.add(step=step, summary=text_pb(name, block))

    def write(self, content: bytes) -> None:
        """For `RecordWriter`; a partial record would hide all later ones."""
        if self._file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        self._file.close()


class Board:
    """The curves of one run; its settings are written on opening."""

    def __init__(self, folder: Path, config: RunConfig):
        _write_settings(folder, config)
        self._writer = _EventFile(folder)

    def write(self, record: dict[str, Any]) -> None:
        """Add the curves of a metrics record."""
        for name, value in curves(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def write_sample(self, record: dict[str, Any], number: int) -> None:
        """Add the answer to one of the validation prompts; see `jaxlora.train.samples`."""
        parts = (f"[{name}]\n{record[name]}" for name in ("prompt", "answer", "expected"))
        self._writer.add_text(f"samples/{number}", "\n\n".join(parts), record["step"])

    def close(self) -> None:
        self._writer.close()


def curves(record: dict[str, Any]) -> dict[str, float]:
    """Every number of a metrics record, named by split, and the gradient norm per token: the loss is a sum,
    so the norm itself grows with the tokens of a step."""
    numbers = {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_CURVE
    }
    if "grad_norm" in numbers and numbers.get("loss_tokens"):
        numbers["grad_norm_per_token"] = numbers["grad_norm"] / numbers["loss_tokens"]
    return {f"{record['split']}/{name}": value for name, value in numbers.items()}


def write_outcome(folder: Path, values: Mapping[str, float], step: int) -> None:
    """Write the outcome of the run in `folder` to a separate event file."""
    writer = _EventFile(folder)
    for name, value in values.items():
        writer.add_scalar(name, float(value), step)
    writer.close()


def _write_settings(folder: Path, config: RunConfig) -> None:
    """Write the settings that distinguish the runs of a sweep."""
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
