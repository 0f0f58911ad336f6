"""The training loop: steps, validation, checkpoints, metrics; resumable at any step.

    result = train(job)       # selected step and its validation NLL; everything else is in job.config.run_dir

The host runs ahead of the device: metrics are read two steps late, so the device never waits for the host.
The order of work depends only on the step, so a run that was stopped or killed, however often, writes the
same bytes as one that was not.
"""

from __future__ import annotations

import math
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.run_state import RunState
from jaxlora.data.batches import ahead, ranges, step_batch, validation_batches
from jaxlora.data.packing import Batch
from jaxlora.models.decoder import Tree
from jaxlora.runtime import hosts
from jaxlora.runtime.ahead import Ahead, compiles_ahead
from jaxlora.runtime.devices import out_of_memory
from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.files import is_disk_full
from jaxlora.runtime.progress import console
from jaxlora.runtime.records import read_manifest, read_summary
from jaxlora.runtime.signals import Interrupted, Stop, stop_signals
from jaxlora.sharding import named, place_batch
from jaxlora.train.display import TrainingDisplay
from jaxlora.train.job import Job, Prepared, abstract_frozen, abstract_state, fresh_state, load_frozen
from jaxlora.train.manifest import check_inputs, identity, make_manifest
from jaxlora.train.run_directory import RunDirectory, is_finished, read_selected
from jaxlora.train.samples import sample_records
from jaxlora.train.schedule import learning_rate
from jaxlora.train.selection import select_checkpoint, stops_early
from jaxlora.train.startup import check_start
from jaxlora.train.step import TrainState, make_eval_step, make_train_step

AnyRun = TypeVar("AnyRun")
LATE = 2  # steps between dispatching a step and reading its metrics


class Diverged(UserError, FloatingPointError):
    """The loss or gradient of a step is NaN or infinite."""

    def __init__(self, step: int, message: str, saved: bool):
        advice = "Earlier checkpoints are intact" if saved else "Nothing was saved before it"
        super().__init__(f"step {step}: {message}. {advice}; try a lower --config.optim.peak_lr")
        self.step = step


@dataclass(frozen=True)
class TrainResult:
    """The selected checkpoint and the base it was trained on (kept for an evaluation right afterwards)."""

    step: int
    mean_nll: float
    frozen: Tree
    trained: Tree


def train(job: Job, frozen: Tree | None = None, stop: Stop | None = None) -> TrainResult:
    """Train or resume the job's run and write its directory.

    Args:
      frozen: the base as returned by `load_frozen`, if already loaded; None: load it.
      stop: from the caller's own `stop_signals`, or a `Stop` whose `signum` another thread sets; None: handle
        this process's first signal here.

    Raises:
      Diverged: a number is not finite.
      UserError: the run is already finished, belongs to another configuration, is damaged beyond what its
        checkpoints can restore, or the disk is full.
      Interrupted: a signal asked to stop; the run is saved and resumes with the same command.
    """
    with opened(Run, RunDirectory, job, stop) as run, closing(run.programs), closing(run.eval_programs):
        if compiles_ahead() and not run.store.has_any:
            run.compile_ahead()  # first of all: nothing takes longer
        run.resume()
        if compiles_ahead():
            run.compile_ahead()
        run.frozen = load_frozen(job) if frozen is None else frozen
        check_loaded(run)
        if run.step == 0 and job.config.train.startup_check:
            run.stage = "start-up check"
            check_start(job, run.state.trained, run.frozen)
        while (result := run.to_the_end()) is None:
            pass  # the selected checkpoint was damaged: recompute its steps
        return result


@contextmanager
def opened(
    make_run: Callable[[Any, Any, Stop], AnyRun], kind: type[RunDirectory], job: Prepared, stop: Stop | None
) -> Iterator[AnyRun]:
    """A run of any kind in its directory, with its checkpoint store; failures are recorded there.

    Args:
      stop: as in `train`.
    """
    with ExitStack() as stack:
        stop = stop or stack.enter_context(stop_signals(ends_process=False))
        stack.enter_context(jax.set_mesh(job.mesh))
        directory = stack.enter_context(kind.open(job))
        run: Any = make_run(job, directory, stop)
        stack.enter_context(_failures(run))
        run.store = stack.enter_context(RunState(directory.path / "checkpoints", directory.identity))
        yield run


def check_loaded(run: Any) -> None:
    """Refuse a base, or an adapter to start from, that was replaced during loading or since the run began;
    raises `UserError`."""
    if hosts.is_main():
        check_inputs(run.job, run.directory.manifest)
        run.directory.check_base()


def not_yet_evaluated(job: Job) -> TrainResult | None:
    """The result of a run that finished but was stopped before its evaluation; otherwise None."""
    path = job.config.run_dir
    if not job.config.eval.after_training or not is_finished(path):
        return None
    old = read_manifest(path)
    begins_anew = job.config.overwrite and not (old.get("config") or {}).get("overwrite")
    evaluated = (path / "evaluation" / "summary.json").is_file()
    if evaluated or begins_anew or identity(old) != identity(make_manifest(job)):
        return None
    summary = read_summary(path)
    step, nll = summary["selected_step"], summary["primary_metric"]["value"]
    return TrainResult(step, nll, load_frozen(job), read_selected(job))


class Run:
    """A run in progress: its directory, checkpoints, current step and current stage."""

    store: RunState
    state: TrainState
    frozen: Tree

    def __init__(self, job: Job, directory: RunDirectory, stop: Stop):
        self.job, self.directory, self.stop = job, directory, stop
        self.step, self.stage = 0, "loading"
        self.validations: dict[int, float] = {}
        self._like = abstract_state(job)
        self.train_step = make_train_step(job.spec, job.config.optim, job.compute(job.train_layout))
        eval_step = make_eval_step(job.spec, job.compute(job.validation_layout))
        self.programs, self.eval_programs = (Ahead(step, _shape) for step in (self.train_step, eval_step))
        self._again = False  # it has gone back once because its selected checkpoint was damaged

    def resume(self, before: int | None = None) -> None:
        """Go to the newest intact checkpoint, or to the start if there is none.

        Args:
          before: go back to before this step, and drop later checkpoints.
        """
        found = self.store.restore(self._like, before, self.directory.unusable)
        self.step, self.validations, size = 0, {}, 0
        if found is not None:
            self.step, self.state = found.step, found.state
            self.validations = {int(step): float(nll) for step, nll in found.progress["validations"]}
            size = found.progress["metrics_bytes"]
            self.directory.goes_on_from(found.progress)
            console.print(f"resuming {self.job.config.run_id} after step {self.step}", markup=False)
        else:
            self.state = fresh_state(self.job)
        if before is not None:
            self.store.drop_after(self.step)
        self.directory.start_records(size, self.validations)

    def to_the_end(self) -> TrainResult | None:
        """Train from the current step to the last one, and close the run.

        Returns:
          the result; None if the selected checkpoint is damaged and the run has gone back to before it.
        """
        job, last = self.job, self.job.plan.total_steps
        if self.step < last and jax.default_backend() == "tpu":
            self._check_longest()
        batch_of = self._batch_of()
        with (
            self.stop.saving(job.config.train.grace_seconds) as begin_saving,
            TrainingDisplay(job, self.step + 1) as display,
        ):
            log = StepLog(self, display)
            if self._validates:  # the run was stopped between a step and its validation
                self._after_step(log)
            if self.step < last and not self.stopped_early:
                for step, batch in ahead(batch_of, range(self.step + 1, last + 1)):
                    self.stage = "training"
                    rate = np.float32(learning_rate(step, job.config.optim, job.plan))
                    placed = place_batch(job.mesh, batch)
                    with display.compiling("training step", batch["tokens"].shape):
                        arguments = self.state, self.frozen, placed, jnp.asarray(rate)
                        self.state, metrics = self.programs(*arguments)
                    begin_saving()  # before this there is nothing to save
                    self.step = step
                    log.add(step, metrics, float(rate))
                    self.store.check()
                    self._after_step(log)
                    if self.stopped_early:
                        break
            log.read_all()
            self.stage = "saving"
            self.store.wait()
        return self._finish()

    def compile_ahead(self) -> None:
        """Start compiling the steps for every upcoming batch shape: the next one first and alone, so that
        training can begin, and those of validations last. Of the steps only the next one is cached, as the
        others are compiled while training goes on."""
        job = self.job
        steps = range(self.step + 1, job.plan.total_steps + 1)
        if not steps:
            return
        rate, like = jax.ShapeDtypeStruct((), np.float32), self._batch_of()(steps[0])
        shapes = job.train_layout.shapes(job.train_rows, job.plan.rows_of_step, steps)
        for i, shape in enumerate(shapes):
            batch = _abstract_batch(job, like, shape)
            self.programs.start(self._like, abstract_frozen(job), batch, rate, alone=i == 0, cached=i == 0)
        checks = ranges(len(job.validation_rows), job.validation_layout.batch_rows)
        like = job.validation_layout.build(job.validation_rows[:1])
        for shape in job.validation_layout.shapes(
            job.validation_rows, checks.__getitem__, range(len(checks))
        ):
            batch = _abstract_batch(job, like, shape)
            self.eval_programs.start(self._like.trained, abstract_frozen(job), batch)

    def _batch_of(self) -> Callable[[int], Batch]:
        """The function that builds the batch of a step."""
        job, lora = self.job, self.job.spec.lora
        seed = job.config.seed if lora is not None and lora.dropout else None
        return partial(step_batch, job.train_rows, job.plan.rows_of_step, job.train_layout, dropout_seed=seed)

    @property
    def stopped_early(self) -> bool:
        """Whether the validations so far stop the run early."""
        return stops_early(self.validations, self.job.config.train.early_stopping)

    @property
    def _validates(self) -> bool:
        """Whether a validation is due at this step."""
        return self.step in self.job.plan.validation_steps and self.step not in self.validations

    @property
    def _saves(self) -> bool:
        """Whether a checkpoint is due at this step."""
        every = self.job.config.train.checkpoint_every
        return self._validates or (every is not None and self.step % every == 0)

    def _after_step(self, log: StepLog) -> None:
        """Do what is due after a step: a validation, a checkpoint, stopping if requested."""
        job = self.job
        stopping = hosts.agree(self.stop.signum is not None)
        saves = self._saves
        if not stopping and not saves:
            return
        log.read_all()  # save and validate only what is known to be finite
        if self._validates and not stopping:
            self.stage = "validation"
            mean_nll = validate(self, log.display)
            stopping = mean_nll is None
            if mean_nll is not None:
                self.validations[self.step] = mean_nll
                self.directory.record(self.directory.validation_record(self.step, mean_nll))
                log.display.validated(self.step, self.validations)
                if job.config.train.samples:
                    self.stage = "sampling"
                    shown = sample_records(job, self.state.trained, self.frozen, self.step)
                    self.directory.record_samples(shown)
        if saves or stopping:
            self.stage = "saving"
            best = select_checkpoint(self.validations) if self.validations else None
            progress = self.directory.progress(self.step, self.validations)
            self.store.save(self.step, self.state, progress, best)
            if hosts.n_processes() > 1:
                self.store.wait()  # hosts write one checkpoint at a time
        if stopping:
            self.store.wait()
            raise Interrupted(self.stop.signum or signal.SIGTERM, self.step)

    def _finish(self) -> TrainResult | None:
        """Export the selected checkpoint and close the run; if it is damaged, go back to before it.

        Raises:
          UserError: it was damaged twice.
        """
        best = select_checkpoint(self.validations)
        if problem := self.store.damage(best):
            if self._again:
                raise UserError(
                    f"{self.directory.path}: the checkpoint of step {best} was damaged twice: {problem}"
                )
            self._again = True
            console.print(
                f"the checkpoint of step {best}, the selected one, is damaged ({problem});"
                " recomputing its steps",
                markup=False,
            )
            self.resume(before=best)
            return None
        self.stage = "selection"
        trained = self.store.read(best, self._like).state.trained
        self.directory.export_selected(trained, best)
        if self.stopped_early:
            patience = self.job.config.train.early_stopping
            text = f"no lower validation NLL in the last {patience} validations"
            console.print(f"stopped early, after step {self.step}: {text}", markup=False)
        self.directory.finish(best, self.validations, self.step)
        return TrainResult(best, self.validations[best], self.frozen, trained)

    def diverged(self, message: str, step: int | None = None) -> Diverged:
        """The error that ends this run; it says whether anything was saved."""
        return Diverged(self.step if step is None else step, message, self.store.has_any)

    def _check_longest(self) -> None:
        """Compile the step for the longest buffer: the TPU compiler knows whether it fits, and a run should
        not fail after hours. Later the program comes from the cache.

        Raises:
          UserError: it does not fit; the message names what would.
        """
        job = self.job
        longest = max(job.train_layout.sizes)
        lines = job.train_layout.lines if job.train_layout.packed else job.train_layout.batch_rows
        like = self._batch_of()(self.step + 1)
        batch = {name: np.zeros((1, lines, longest), x.dtype) for name, x in like.items()}
        arguments = self.state, self.frozen, place_batch(job.mesh, batch), jnp.float32(0)
        try:
            self.train_step.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if (missing := out_of_memory(str(error))) is None:
                raise
            shorter = [size for size in job.train_layout.sizes if size < longest] or [longest // 2]
            split = f"max_buffer_tokens={max(shorter)}, which splits longer ones,"
            if not job.train_layout.packed:  # padded rows are never split
                split = "layout=packed"
            raise UserError(
                f"a step of {lines * longest:,} tokens needs {missing / 2**30:.2f} GiB more memory than a"
                f" chip has; give --config.train.{split} or --config.model.remat=elementwise"
            ) from None


def _shape(*arguments: Any) -> tuple[int, ...]:
    """The key of a step's programs: the shape of its batch."""
    return next(x["tokens"].shape for x in arguments if isinstance(x, dict) and "tokens" in x)


def _abstract_batch(job: Job, like: Batch, shape: tuple[int, ...]) -> Tree:
    """The shapes and shardings of a batch of this shape, with the same arrays as another."""
    sharding = named(job.mesh, (None, "batch", "length"), shape)
    return {name: jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding) for name, x in like.items()}


class StepLog:
    """The metrics of steps: read late, checked and recorded."""

    def __init__(self, run: Run, display: TrainingDisplay):
        self._run, self.display = run, display
        self._waiting: deque[tuple[int, dict[str, jax.Array], float]] = deque()

    def add(self, step: int, metrics: dict[str, jax.Array], rate: float) -> None:
        """Add the metrics of a step just dispatched, and record those of `LATE` steps ago.

        Raises:
          Diverged: a number is not finite.
        """
        self._waiting.append((step, metrics, rate))
        while len(self._waiting) > LATE:
            self._read(*self._waiting.popleft())

    def read_all(self) -> None:
        """Record every step dispatched so far; raises like `add`."""
        while self._waiting:
            self._read(*self._waiting.popleft())

    def _read(self, step: int, metrics: dict[str, jax.Array], rate: float) -> None:
        job, directory = self._run.job, self._run.directory
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        rows = [job.train_rows[i] for i in job.plan.rows_of_step(step)]
        tokens = sum(row.n_tokens for row in rows)
        speed = self.display.rate(tokens)
        if not np.isfinite([values["nll"], values["grad_norm"], values["update_norm"]]).all():
            text = f"loss {values['nll']:g}, gradient norm {values['grad_norm']:g}, update norm"
            text += f" {values['update_norm']:g} at learning rate {rate:g}; rows"
            raise self._run.diverged(f"{text} {', '.join(row.row_id for row in rows)}", step)
        record = directory.step_record(step, values, tokens, rate, speed)
        directory.record(record)
        self.display.show(step, record["loss"], speed)


def validate(run: Run, display: TrainingDisplay) -> float | None:
    """Mean NLL over all weighted validation tokens; None if a stop was requested meanwhile.

    Raises:
      Diverged: it is not finite.
    """
    job, sums = run.job, []
    for batch in validation_batches(job.validation_rows, job.validation_layout):
        if hosts.agree(run.stop.signum is not None):
            return None
        placed = place_batch(job.mesh, batch)
        with display.compiling("validation step", batch["tokens"].shape):
            sums.append(run.eval_programs(run.state.trained, run.frozen, placed))
        display.validating(len(sums))
    totals = np.asarray(jax.device_get(sums), np.float64)
    nll, weight = totals.sum(axis=0)
    if math.isfinite(nll):
        return float(nll / weight)
    first = int(np.flatnonzero(~np.isfinite(totals[:, 0]))[0]) * job.validation_layout.batch_rows
    rows = job.validation_rows[first : first + job.validation_layout.batch_rows]
    names = ", ".join(row.row_id for row in rows)
    raise run.diverged(f"the validation loss is {nll:g}; first in rows {names}")


@contextmanager
def _failures(run: Any) -> Iterator[None]:
    """Write `failure.json` for any error, here or in another process."""

    def write(error: BaseException, trace: str) -> None:
        step = error.step if isinstance(error, Diverged) else run.step
        run.directory.write_failure(run.stage, step, error, trace)

    def elsewhere(message: str) -> None:
        write(MachineError(message), message)

    try:
        with hosts.on_other_failure(elsewhere):
            yield
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        write(error, str(error) if isinstance(error, Diverged) else traceback.format_exc())
        if is_disk_full(error) and not isinstance(error, UserError):
            raise UserError(
                f"{run.directory.path}: the disk is full (at step {run.step}, {run.stage}). The"
                " last checkpoint is intact: free some space, then run the same command to resume"
            ) from error
        raise
