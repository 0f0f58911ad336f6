"""The training loop: steps, validation, checkpoints, metrics; resumable at any step.

    result = train(job)      # -> selected step and its validation NLL; the rest is in job.config.run_dir

The loop runs ahead of the device: metrics are read two steps late, so that the device never waits for the
host. The order of work is a function of the step alone, so a run that was stopped or killed, however often,
writes the bytes of one that was not.
"""

from __future__ import annotations

import math
import signal
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import hosts
from jaxlora.checkpoints.huggingface import load_base, random_base
from jaxlora.checkpoints.peft import import_adapter
from jaxlora.checkpoints.run_state import RunState
from jaxlora.data.batches import train_batches, validation_batches
from jaxlora.errors import MachineError, UserError
from jaxlora.lora import check_lora, count_trainable, init_lora
from jaxlora.models.qwen3 import Tree
from jaxlora.progress import console
from jaxlora.records import is_disk_full, read_json
from jaxlora.sharding import lora_shardings, place_batch, place_lora
from jaxlora.signals import Interrupted, Stop, stop_signals
from jaxlora.study.selection import select_checkpoint
from jaxlora.train.artifacts import RunDirectory, is_finished
from jaxlora.train.display import TrainingDisplay
from jaxlora.train.job import Job
from jaxlora.train.manifest import identity, make_manifest
from jaxlora.train.schedule import learning_rate
from jaxlora.train.startup import check_start
from jaxlora.train.step import TrainState, init_state, make_eval_step, make_train_step

LATE = 2  # steps between dispatch and reading the metrics


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


@dataclass
class Position:
    """How far a run is: steps done, what they made, validation NLL by step, and what is being done now."""

    step: int
    state: TrainState
    validations: dict[int, float] = field(default_factory=dict)
    stage: str = "loading"

    @property
    def best(self) -> int | None:
        return select_checkpoint(self.validations) if self.validations else None


def load_frozen(job: Job) -> Tree:
    """The base of a job, from its directory or drawn at random."""
    if job.model_dir is None or job.config.model.random_weights:
        return random_base(job.spec, job.config.seed, job.mesh)
    return load_base(job.model_dir, job.spec, job.mesh)


def train(job: Job, frozen: Tree | None = None, stop: Stop | None = None) -> TrainResult:
    """Train (or resume) the job's run and write its directory.

    Args:
      frozen: the base, as `load_frozen` gives it, where it is loaded already; None: it is loaded.
      stop: from a `stop_signals` that the caller has open; None: signals are taken over here.

    Raises:
      UserError: the run exists and is finished, belongs to another configuration, is damaged beyond what
        its checkpoints hold, or the disk is full; `Diverged` if a number is not finite.
      Interrupted: a signal asked to stop; the run is saved and resumes with the same command.
    """
    with ExitStack() as stack:
        stop = stop or stack.enter_context(stop_signals())
        stack.enter_context(jax.set_mesh(job.mesh))
        run = stack.enter_context(RunDirectory.open(job))
        at = Position(0, fresh_state(job))
        with _failures(run, at), RunState(run.path / "checkpoints", run.identity) as store:
            return _train(job, run, store, at, frozen, stop)


@contextmanager
def _failures(run: RunDirectory, at: Position) -> Iterator[None]:
    """Write `failure.json` for whatever goes wrong inside, here or in another process."""

    def elsewhere(message: str) -> None:
        run.write_failure(at.stage, at.step, MachineError(message), message)

    try:
        with hosts.on_other_failure(elsewhere):
            yield
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        run.write_failure(at.stage, getattr(error, "step", at.step), error, traceback.format_exc())
        if is_disk_full(error) and not isinstance(error, UserError):
            raise UserError(
                f"{run.path}: the disk is full (at step {at.step}, {at.stage}). The last checkpoint stands:"
                " make room, then give the same command to go on"
            ) from error
        raise


def not_yet_evaluated(job: Job) -> TrainResult | None:
    """The result of this run where it is finished, but was stopped before its evaluation; else None."""
    path = job.config.run_dir
    if not job.config.eval.after_training or not is_finished(path):
        return None
    old = read_json(path / "manifest.json")
    begins_anew = job.config.overwrite and not old["config"]["overwrite"]
    evaluated = (path / "evaluation" / "summary.json").is_file()
    if evaluated or begins_anew or identity(old) != identity(make_manifest(job)):
        return None
    summary = read_json(path / "summary.json")
    _, lora, _ = import_adapter(path / "selected", job.spec.config)
    step, nll = summary["selected_step"], summary["primary_metric"]["value"]
    return TrainResult(step, nll, load_frozen(job), place_lora(job.mesh, job.spec, lora))


def fresh_state(job: Job) -> TrainState:
    """The state before the first step; a function of the seed."""
    lora = place_lora(job.mesh, job.spec, init_lora(job.spec, job.config.seed))
    check_lora(job.spec, lora)
    assert sum(x.size for x in jax.tree.leaves(lora)) == count_trainable(job.spec)
    return init_state(lora, job.config.optim)


def _train(
    job: Job, run: RunDirectory, store: RunState, at: Position, frozen: Tree | None, stop: Stop
) -> TrainResult:
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        at.state,
        lora_shardings(job.mesh, job.spec, at.state),
    )
    resume(run, store, at, like)
    frozen = load_frozen(job) if frozen is None else frozen
    if at.step == 0 and job.config.train.startup_check:
        at.stage = "start-up check"
        check_start(job, at.state.lora, frozen)
    _advance(job, run, store, at, frozen, stop)
    best = select_checkpoint(at.validations)
    if problem := store.damage(best):
        console.print(
            f"the checkpoint of step {best}, the selected one, is damaged ({problem});"
            " computing its steps again",
            markup=False,
        )
        at.state = fresh_state(job)
        resume(run, store, at, like, before=best)
        _advance(job, run, store, at, frozen, stop)
        if problem := store.damage(best):
            raise UserError(f"{run.path}: the checkpoint of step {best} was damaged twice: {problem}")
    at.stage = "selection"
    selected = store.read(best, like).state.lora
    run.export_selected(selected, best)
    run.finish(best, at.validations)
    return TrainResult(best, at.validations[best], frozen, selected)


def resume(run: RunDirectory, store: RunState, at: Position, like: TrainState, before: int | None = None):
    """Put `at` (which holds a fresh state) to the newest sound checkpoint, if there is one.

    Args:
      like: the state's shapes, dtypes and shardings.
      before: go back to before this step, and drop what comes after.
    """
    found = store.restore(like, before, run.unusable)
    at.step, at.validations, size = 0, {}, 0
    if found is not None:
        at.step, at.state = found.step, found.state
        at.validations = {int(step): nll for step, nll in found.progress["validations"]}
        size = found.progress["metrics_bytes"]
        console.print(f"resuming {run.job.config.run_id} after step {at.step}")
    if before is not None:
        store.drop_after(at.step)
    run.start_records(size)


def _advance(job: Job, run: RunDirectory, store: RunState, at: Position, frozen: Tree, stop: Stop) -> None:
    """Train from where the run is to its last step. On return, every checkpoint is published."""
    config, plan = job.config, job.plan
    train_step = make_train_step(job.spec, config.optim, job.compute(job.train_layout))
    eval_step = make_eval_step(job.spec, job.compute(job.validation_layout))
    every = config.train.checkpoint_every or plan.total_steps

    with (
        stop.saving(config.train.grace_seconds) as begin_saving,
        TrainingDisplay(job, at.step + 1) as display,
    ):
        log = StepLog(job, run, display)

        def settle() -> None:
            """What is due after a step: a validation, a checkpoint, the end if somebody asked for it."""
            stopping = hosts.agree(stop.signum is not None)
            validates = at.step in plan.validation_steps and at.step not in at.validations
            if not (validates or stopping or at.step % every == 0):
                return
            log.read_all()  # nothing is saved or validated before its numbers are known to be finite
            if validates and not stopping:
                at.stage = "validation"
                nll = validate(job, eval_step, at, frozen, display, stop)
                if nll is None:
                    stopping = True  # the checkpoint is one before this validation
                else:
                    at.validations[at.step] = nll
                    run.record(run.validation_record(at.step, nll))
                    display.validated(at.step, at.validations)
            at.stage = "saving"
            store.save(at.step, at.state, run.progress(at.step, at.validations), at.best)
            if stopping:
                store.wait()
                raise Interrupted(stop.signum or signal.SIGTERM, at.step)

        if at.step in plan.validation_steps and at.step not in at.validations:  # stopped in between
            settle()
        if at.step < plan.total_steps:
            for step, batch in train_batches(job.train_rows, plan, job.train_layout, at.step + 1):
                at.stage = "training"
                rate = learning_rate(step, config.optim, plan)
                display.announce_shape("training step", batch["tokens"].shape)
                placed = place_batch(job.mesh, batch)
                at.state, arrays = train_step(at.state, frozen, placed, jnp.float32(rate))
                begin_saving()  # until now there was nothing to save
                at.step = step
                log.add(step, arrays, rate)
                store.check()
                settle()
        at.stage = "saving"
        store.wait()


class StepLog:
    """The numbers of one run's steps, read late, checked and recorded."""

    def __init__(self, job: Job, run: RunDirectory, display: TrainingDisplay):
        self._job, self._run, self._display = job, run, display
        self._waiting: deque[tuple[int, dict[str, jax.Array], float]] = deque()

    def add(self, step: int, arrays: dict[str, jax.Array], rate: float) -> None:
        """Take the metrics of a step just dispatched, and record those of `LATE` steps ago."""
        self._waiting.append((step, arrays, rate))
        while len(self._waiting) > LATE:
            self._read(*self._waiting.popleft())

    def read_all(self) -> None:
        """Record every step dispatched so far.

        Raises:
          Diverged: a number is not finite.
        """
        while self._waiting:
            self._read(*self._waiting.popleft())

    def _read(self, step: int, arrays: dict[str, jax.Array], rate: float) -> None:
        rows = [self._job.train_rows[i] for i in self._job.plan.rows_of_step(step)]
        values = {name: float(value) for name, value in jax.device_get(arrays).items()}
        if not np.isfinite([values["nll"], values["grad_norm"], values["update_norm"]]).all():
            raise Diverged(
                step,
                f"loss {values['nll']:g}, gradient norm {values['grad_norm']:g}, update norm"
                f" {values['update_norm']:g} at learning rate {rate:g}; rows"
                f" {', '.join(row.row_id for row in rows)}",
            )
        tokens = sum(row.n_tokens for row in rows)
        record = self._run.step_record(step, values, tokens, rate, self._display.rate(step, tokens))
        self._run.record(record)
        self._display.show(step, record)


def validate(
    job: Job, eval_step, at: Position, frozen: Tree, display: TrainingDisplay, stop: Stop
) -> float | None:
    """Mean NLL over all weighted validation tokens; None if somebody asked to stop meanwhile.

    Raises:
      Diverged: it is not finite.
    """
    sums = []
    for batch in validation_batches(job.validation_rows, job.validation_layout):
        if hosts.agree(stop.signum is not None):
            return None
        display.announce_shape("validation step", batch["tokens"].shape)
        sums.append(eval_step(at.state.lora, frozen, place_batch(job.mesh, batch)))
        display.validating(len(sums))
    totals = np.asarray(jax.device_get(sums), np.float64)
    nll, weight = totals.sum(axis=0)
    if not math.isfinite(nll):
        first = int(np.flatnonzero(~np.isfinite(totals[:, 0]))[0]) * job.validation_layout.batch_rows
        rows = job.validation_rows[first : first + job.validation_layout.batch_rows]
        names = ", ".join(row.row_id for row in rows)
        raise Diverged(at.step, f"the validation loss is {nll:g}; first in rows {names}")
    return float(nll / weight)
