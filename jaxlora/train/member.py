"""One run on its way: its directory, its checkpoints, and how far it is.

A run trained alone and a member of a group (`jaxlora.train.loop.train_group`) are the same thing here, and
leave the same files: either can be stopped and go on as the other.

    member = Member(job, run)           # run: an opened RunDirectory
    member.store = RunState(run.path / "checkpoints", run.identity)
    member.resume()                     # to its newest sound checkpoint, or a fresh adapter
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from jaxlora.checkpoints.base import load_base, random_base
from jaxlora.checkpoints.run_state import RunState
from jaxlora.lora import check_lora, count_trainable, init_lora
from jaxlora.models.decoder import Tree
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console
from jaxlora.sharding import lora_shardings, place_lora
from jaxlora.train.job import Job
from jaxlora.train.run_directory import RunDirectory
from jaxlora.train.selection import select_checkpoint
from jaxlora.train.step import TrainState, init_state


class Diverged(UserError, FloatingPointError):
    """The loss or the gradient of a step is NaN or infinite."""

    def __init__(self, step: int, message: str):
        super().__init__(f"step {step}: {message}. The checkpoints before it are good")
        self.step = step


@dataclass(frozen=True)
class TrainResult:
    """The selected checkpoint and the base it was trained on (kept for an evaluation right after)."""

    step: int
    mean_nll: float
    frozen: Tree
    lora: Tree


class Member:
    """How far a run is: steps done, what they made, validation NLL by step, and what is being done now."""

    store: RunState

    def __init__(self, job: Job, run: RunDirectory):
        self.job, self.run = job, run
        self.step, self.stage = 0, "loading"
        self.validations: dict[int, float] = {}
        self.outcome: TrainResult | Diverged | None = None  # None: still on its way
        self.state = fresh_state(job)
        self._like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.state,
            lora_shardings(job.mesh, job.spec, self.state),
        )
        self._again = False  # it went back once, because its selected checkpoint was damaged

    @property
    def validates(self) -> bool:
        """Whether a validation is due at this step."""
        return self.step in self.job.plan.validation_steps and self.step not in self.validations

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is due at this step."""
        every = self.job.config.train.checkpoint_every
        return self.validates or (every is not None and self.step % every == 0)

    def next_save(self, step: int) -> int:
        """The first step after this one with a checkpoint."""
        plan, every = self.job.plan, self.job.config.train.checkpoint_every
        after = [s for s in (*plan.validation_steps, plan.total_steps) if s > step]
        if every is not None:
            after.append(step - step % every + every)
        return min(after, default=step)

    def resume(self, before: int | None = None) -> None:
        """Go to the newest sound checkpoint, or to a fresh adapter where there is none.

        Args:
          before: go back to before this step, and drop what comes after.
        """
        found = self.store.restore(self._like, before, self.run.unusable)
        self.step, self.validations, size = 0, {}, 0
        if found is not None:
            self.step, self.state = found.step, found.state
            self.validations = {int(step): nll for step, nll in found.progress["validations"]}
            size = found.progress["metrics_bytes"]
            console.print(f"resuming {self.job.config.run_id} after step {self.step}")
        elif before is not None:
            self.state = fresh_state(self.job)
        if before is not None:
            self.store.drop_after(self.step)
        self.run.start_records(size)

    def validated(self, mean_nll: float) -> None:
        """Record the validation of this step."""
        self.validations[self.step] = mean_nll
        self.run.record(self.run.validation_record(self.step, mean_nll))

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of this step, without waiting for the disk."""
        self.stage = "saving"
        best = select_checkpoint(self.validations) if self.validations else None
        self.store.save(self.step, state, self.run.progress(self.step, self.validations), best)

    def finish(self, frozen: Tree) -> None:
        """Export the selected checkpoint and close the run; where it is damaged, go back to before it.

        Raises:
          UserError: it was damaged twice.
        """
        best = select_checkpoint(self.validations)
        if problem := self.store.damage(best):
            if self._again:
                raise UserError(
                    f"{self.run.path}: the checkpoint of step {best} was damaged twice: {problem}"
                )
            self._again = True
            console.print(
                f"the checkpoint of step {best}, the selected one, is damaged ({problem});"
                " computing its steps again",
                markup=False,
            )
            self.resume(before=best)
            return
        self.stage = "selection"
        selected = self.store.read(best, self._like).state.lora
        self.run.export_selected(selected, best)
        self.run.finish(best, self.validations)
        self.outcome = TrainResult(best, self.validations[best], frozen, selected)

    def fail(self, error: Diverged) -> None:
        """End this run alone: write its `failure.json`."""
        self.outcome = error
        self.run.write_failure(self.stage, error.step, error, str(error))


def fresh_state(job: Job) -> TrainState:
    """The state before the first step; a function of the seed."""
    lora = place_lora(job.mesh, job.spec, init_lora(job.spec, job.config.seed))
    check_lora(job.spec, lora)
    assert sum(x.size for x in jax.tree.leaves(lora)) == count_trainable(job.spec)
    return init_state(lora, job.config.optim)


def load_frozen(job: Job) -> Tree:
    """The base of a job, from its directory or drawn at random."""
    if job.model_dir is None or job.config.model.random_weights:
        return random_base(job.spec, job.config.seed, job.mesh)
    return load_base(job.model_dir, job.spec, job.mesh)
