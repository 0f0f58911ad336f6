"""The training loop: steps, validation, checkpoints, metrics; resumable at any step.

    result = train(job)                  # -> selected step and its validation NLL; the rest is in its run_dir
    results = train_group(jobs)          # several runs over one base in one program

There is one loop: a lone run is a group of one. The members of a group take their steps together and share
each product with the base (see `jaxlora.train.fused`); their directories are those of lone runs. Those that
are behind run first, until all are at the same step. One whose loss is not finite ends alone.

The loop runs ahead of the device: metrics are read two steps late, so that the device never waits for the
host. The order of work is a function of the step alone, so a run that was stopped or killed, however often,
writes the bytes of one that was not.
"""

from __future__ import annotations

import math
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.peft import import_adapter
from jaxlora.checkpoints.run_state import RunState
from jaxlora.data.batches import ahead
from jaxlora.models.decoder import Tree
from jaxlora.runtime import hosts
from jaxlora.runtime.devices import out_of_memory
from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.files import is_disk_full, read_json
from jaxlora.runtime.signals import Interrupted, Stop, stop_signals
from jaxlora.sharding import place_batch, place_lora
from jaxlora.train.display import TrainingDisplay
from jaxlora.train.group import Group, check_group
from jaxlora.train.job import Job
from jaxlora.train.manifest import identity, make_manifest
from jaxlora.train.member import Diverged, Member, TrainResult, load_frozen
from jaxlora.train.run_directory import RunDirectory, is_finished
from jaxlora.train.startup import check_start

LATE = 2  # steps between dispatch and reading the metrics


def train(job: Job, frozen: Tree | None = None, stop: Stop | None = None) -> TrainResult:
    """Train (or resume) the job's run and write its directory; see `train_group`.

    Raises:
      Diverged: a number is not finite; else as `train_group`.
    """
    (result,) = train_group([job], frozen, stop)
    if isinstance(result, Diverged):
        raise result
    return result


def train_group(
    jobs: Sequence[Job], frozen: Tree | None = None, stop: Stop | None = None
) -> list[TrainResult | Diverged]:
    """Train (or resume) these runs together and write their directories.

    Args:
      frozen: the base, as `load_frozen` gives it, where it is loaded already; None: it is loaded.
      stop: from a `stop_signals` that the caller has open; None: signals are taken over here.

    Returns:
      each run's result, or how it diverged; the others are not touched by that.

    Raises:
      UserError: a run exists and is finished, belongs to another configuration, is damaged beyond what
        its checkpoints hold, or the disk is full; or the runs cannot be trained together.
      Interrupted: a signal asked to stop; the runs are saved and resume with the same command.
    """
    check_group([job.config for job in jobs])
    with ExitStack() as stack:
        stop = stop or stack.enter_context(stop_signals())
        stack.enter_context(jax.set_mesh(jobs[0].mesh))
        members = [Member(job, stack.enter_context(RunDirectory.open(job))) for job in jobs]
        stack.enter_context(_failures(members))
        for member in members:
            folder = member.run.path / "checkpoints"
            member.store = stack.enter_context(RunState(folder, member.run.identity))
        _train(members, frozen, stop)
    return [member.outcome for member in members if member.outcome is not None]


@contextmanager
def _failures(members: Sequence[Member]) -> Iterator[None]:
    """Write `failure.json` of every run on its way for whatever goes wrong, here or in another process."""

    def write(error: BaseException, trace: str) -> list[Member]:
        on_their_way = [member for member in members if member.outcome is None]
        for member in on_their_way:
            member.run.write_failure(member.stage, member.step, error, trace)
        return on_their_way

    def elsewhere(message: str) -> None:
        write(MachineError(message), message)

    try:
        with hosts.on_other_failure(elsewhere):
            yield
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        failed = write(error, traceback.format_exc())
        if failed and is_disk_full(error) and not isinstance(error, UserError):
            raise UserError(
                f"{failed[0].run.path}: the disk is full (at step {failed[0].step}, {failed[0].stage}). The"
                " last checkpoint stands: make room, then give the same command to go on"
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


def _train(members: Sequence[Member], frozen: Tree | None, stop: Stop) -> None:
    """Train every member to its end."""
    for member in members:
        member.resume()
    _line_up(members)
    frozen = load_frozen(members[0].job) if frozen is None else frozen
    for member in members:
        if member.step == 0 and member.job.config.train.startup_check:
            member.stage = "start-up check"
            check_start(member.job, member.state.lora, frozen)
    while left := [member for member in members if member.outcome is None]:
        behind = min(member.step for member in left)
        group = [member for member in left if member.step == behind]
        stops = [member.step for member in left if member.step > behind]
        _advance(group, min(stops + [member.job.plan.total_steps for member in group]), frozen, stop)
        for member in group:
            if member.outcome is None and member.step == member.job.plan.total_steps:
                member.finish(frozen)


def _line_up(members: Sequence[Member]) -> None:
    """Let members that are ahead by less than a checkpoint go back to the one that is furthest behind.

    A kill between two members' saves leaves them so; the group then goes on as if it had not been stopped.
    Members that are further ahead wait where they are.
    """
    behind = min(member.step for member in members)
    for member in members:
        if behind < member.step <= member.next_save(behind):
            member.resume(before=behind + 1)


def _advance(members: Sequence[Member], until: int, frozen: Tree, stop: Stop) -> None:
    """Train members that are at the same step up to a step, or until one of them diverges.

    On return, every checkpoint is published, and each member has its state.
    """
    group = Group(members)
    job, start = members[0].job, members[0].step
    train_step, eval_step = group.programs()
    if start < until and jax.default_backend() == "tpu":
        check_longest(group, train_step, frozen, start + 1)

    with (
        stop.saving(job.config.train.grace_seconds) as begin_saving,
        TrainingDisplay(group.jobs, start + 1) as display,
    ):
        log = StepLog(group, display)

        def settle() -> None:
            """What is due after a step: a validation, a checkpoint, the end if somebody asked for it."""
            stopping = hosts.agree(stop.signum is not None)
            if not stopping and not any(member.saves for member in group.on_their_way):
                return
            log.read_all()  # nothing is saved or validated before its numbers are known to be finite
            due = [member for member in group.on_their_way if member.validates]
            saves = [member for member in group.on_their_way if member.saves]
            if due and not stopping:
                stopping = not validate(group, due, eval_step, frozen, display, stop)
            for member in group.on_their_way if stopping else saves:
                if member.outcome is None:
                    member.save(group.state_of(member))
                    if hosts.n_processes() > 1:
                        member.store.wait()  # hosts write one checkpoint at a time
            if stopping:
                for member in group.on_their_way:
                    member.store.wait()
                raise Interrupted(stop.signum or signal.SIGTERM, group.members[0].step)

        if any(member.validates for member in members):  # stopped in between
            settle()
        if start < until:
            for step, batch in ahead(group.batch, range(start + 1, until + 1)):
                display.announce_shape("training step", batch["tokens"].shape)
                rates, placed = group.rates(step), place_batch(job.mesh, batch)
                for member in members:
                    member.stage = "training"
                group.state, arrays = train_step(group.state, frozen, placed, jnp.asarray(rates))
                begin_saving()  # until now there was nothing to save
                for member in members:
                    member.step = step
                log.add(step, arrays, rates)
                for member in members:
                    member.store.check()
                settle()
                if len(group.on_their_way) < len(members):
                    break
        log.read_all()
        for member in group.on_their_way:
            member.state = group.state_of(member)
            member.stage = "saving"
            member.store.wait()


def check_longest(group: Group, train_step: Any, frozen: Tree, step: int) -> None:
    """Compile the step of the longest buffer: a TPU's compiler knows whether it fits, and a run should not
    find that out after hours. When its turn comes, its program comes from the cache.

    Raises:
      UserError: it does not fit; names what would.
    """
    job = group.jobs[0]
    longest = max(max(each.train_layout.sizes) for each in group.jobs)
    batch = {name: np.zeros((1, *x.shape[1:2], longest), x.dtype) for name, x in group.batch(step).items()}
    rates = jnp.asarray(group.rates(step))
    try:
        train_step.lower(group.state, frozen, place_batch(job.mesh, batch), rates).compile()
    except jax.errors.JaxRuntimeError as error:
        if (missing := out_of_memory(str(error))) is None:
            raise
        shorter = [size for size in job.train_layout.sizes if size < longest] or [longest // 2]
        split = f"max_buffer_tokens={max(shorter)}, which splits longer ones,"
        if not job.train_layout.packed:  # padded rows are never split
            split = "layout=packed"
        raise UserError(
            f"a step of {batch['tokens'].size:,} tokens needs {missing / 2**30:.2f} GiB more than a chip has;"
            f" give --config.train.{split} or --config.model.remat=elementwise"
        ) from None


class StepLog:
    """The numbers of a group's steps, read late, checked and recorded."""

    def __init__(self, group: Group, display: TrainingDisplay):
        self._group, self._display = group, display
        self._waiting: deque[tuple[int, dict[str, jax.Array], np.ndarray]] = deque()

    def add(self, step: int, arrays: dict[str, jax.Array], rates: np.ndarray) -> None:
        """Take the metrics of a step just dispatched, and record those of `LATE` steps ago.

        A member with a number that is not finite ends here.
        """
        self._waiting.append((step, arrays, rates))
        while len(self._waiting) > LATE:
            self._read(*self._waiting.popleft())

    def read_all(self) -> None:
        """Record every step dispatched so far."""
        while self._waiting:
            self._read(*self._waiting.popleft())

    def _read(self, step: int, arrays: dict[str, jax.Array], rates: np.ndarray) -> None:
        members, on_their_way = self._group.members, self._group.on_their_way
        table = {name: np.atleast_1d(values) for name, values in jax.device_get(arrays).items()}
        rows = {m: [m.job.train_rows[i] for i in m.job.plan.rows_of_step(step)] for m in on_their_way}
        tokens = {m: sum(row.n_tokens for row in own) for m, own in rows.items()}
        speed = self._display.rate(sum(tokens.values()), len(rows))
        losses = []
        for i, member in enumerate(members):
            if member not in rows:
                continue
            values = {name: float(column[i]) for name, column in table.items()}
            rate = float(np.atleast_1d(rates)[i])
            if not np.isfinite([values["nll"], values["grad_norm"], values["update_norm"]]).all():
                text = f"loss {values['nll']:g}, gradient norm {values['grad_norm']:g}, update norm"
                text += f" {values['update_norm']:g} at learning rate {rate:g}; rows"
                member.fail(Diverged(step, f"{text} {', '.join(row.row_id for row in rows[member])}"))
                continue
            record = member.run.step_record(step, values, tokens[member], rate, speed)
            member.run.record(record)
            losses.append(record["loss"])
        self._display.show(step, losses, speed)


def validate(
    group: Group, due: Sequence[Member], eval_step, frozen: Tree, display: TrainingDisplay, stop: Stop
) -> bool:
    """Validate these members of a group: mean NLL over all weighted validation tokens, recorded.

    One whose NLL is not finite ends here. False: somebody asked to stop meanwhile, and nothing was recorded.
    """
    for member in due:
        member.stage = "validation"
    sums = []
    for batch in group.validation_batches():
        if hosts.agree(stop.signum is not None):
            return False
        display.announce_shape("validation step", batch["tokens"].shape)
        sums.append(eval_step(group.state.lora, frozen, place_batch(due[0].job.mesh, batch)))
        display.validating(len(sums))
    totals = np.asarray(jax.device_get(sums), np.float64).reshape(len(sums), 2, len(group.members))
    for i, member in enumerate(group.members):
        if member not in due:
            continue
        nll, weight = totals[:, :, i].sum(axis=0)
        if math.isfinite(nll):
            member.validated(float(nll / weight))
            continue
        job = member.job
        first = int(np.flatnonzero(~np.isfinite(totals[:, 0, i]))[0]) * job.validation_layout.batch_rows
        rows = job.validation_rows[first : first + job.validation_layout.batch_rows]
        names = ", ".join(row.row_id for row in rows)
        member.fail(Diverged(member.step, f"the validation loss is {nll:g}; first in rows {names}"))
    runs = {m.job.config.run_id: m.validations for m in due if m.outcome is None}
    display.validated(due[0].step, runs)
    return True
