"""Checkpoints of a run: adapter, Adam's moments and position, through Orbax.

with RunState(run_dir / "checkpoints") as store:
    store.save(step, state, {"validations": [[1000, 0.3468]]})
    step, state, progress = store.restore(like=state)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxlora.train.step import TrainState


class RunState:
    """The checkpoints of one run directory. Saving is asynchronous; leaving the context waits for it."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=None, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Save; `progress` is a JSON object that comes back from `restore`."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        self._manager.save(step, args=args, force=True)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[int, TrainState, dict[str, Any]]:
        """Step, state and progress of a checkpoint (default: the last), laid out as `like`."""
        self._manager.wait_until_finished()
        step = self.steps()[-1] if step is None else step
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return step, restored["state"], restored["progress"]

    def keep(self, wanted: set[int]) -> None:
        """Delete every checkpoint that is not wanted."""
        self._manager.wait_until_finished()
        for step in self.steps():
            if step not in wanted:
                self._manager.delete(step)
