"""What TensorBoard's HParams view shows of a run: its settings, and in what they ended.

    write_settings(run_dir / "tensorboard", {"condition": "all_layer", "rank": 8, "seed": 0})
    write_outcome(run_dir / "tensorboard", {"final/validation_nll": 0.336}, step=3169)

Each call writes an event file of its own beside the curves, from TensorBoard's own messages, without
TensorFlow. With one folder a run, `tensorboard --logdir results` lists all runs of a sweep in one table.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.plugins.scalar.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from jaxlora.config import RunConfig


def settings_of(config: RunConfig) -> dict[str, str | float]:
    """The settings that tell the runs of a sweep from one another."""
    lora, optim, train = config.lora, config.optim, config.train
    return {
        "condition": lora.condition,
        "seed": config.seed,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "learning_rate": optim.peak_lr,
        "schedule": optim.schedule,
        "batch_rows": train.batch_rows,
        "epochs": train.epochs,
    }


def write_settings(folder: Path, settings: Mapping[str, str | float]) -> None:
    """Say with which settings the run in `folder` starts."""
    start = SessionStartInfo(start_time_secs=time.time())
    for name, value in settings.items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    _write(folder, [_message(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))])


def write_outcome(folder: Path, values: Mapping[str, float], step: int) -> None:
    """Say that the run in `folder` is complete, and what came of it."""
    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    scalars = [
        Summary.Value(
            tag=name, metadata=create_summary_metadata("", ""), tensor=make_tensor_proto(float(value))
        )
        for name, value in values.items()
    ]
    _write(
        folder,
        [_message(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end)), *scalars],
        step,
    )


def _message(tag: str, data: HParamsPluginData) -> Summary.Value:
    return Summary.Value(
        tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR
    )


def _write(folder: Path, values: Sequence[Summary.Value], step: int = 0) -> None:
    writer = EventFileWriter(str(folder))
    writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    writer.close()
