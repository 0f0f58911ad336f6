"""The loop of learning from rewards: sample, grade, compare, step; evaluated and resumable at any step.

    result = learn(job)       # -> the last step and its accuracy; the rest is in job.config.run_dir

There is one process and one base: sampler and learner alternate on the same arrays. Every random draw is
determined by the seed, the step, the problem's position and the answer's number, so a run that is stopped or
killed, however often, writes the same bytes as an uninterrupted one. With `rl.overlap`, the next batch is
sampled with the weights from before the current step, concurrently with it on a single device; those weights
are checkpointed too.
"""

from __future__ import annotations

import math
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.checkpoints.run_state import RunState
from jaxlora.models.decoder import Tree
from jaxlora.rl.advantages import is_constant
from jaxlora.rl.directory import RLDirectory
from jaxlora.rl.display import Display
from jaxlora.rl.job import RLJob
from jaxlora.rl.learning import Learned, Learner, batch_statistics, counted, impossible, not_finite
from jaxlora.rl.rewards import Grader, count_failures, grader_named
from jaxlora.rl.sampling import Group, Sampler, grade, grade_groups, shared_bytes
from jaxlora.runtime import hosts
from jaxlora.runtime.devices import memory_in_use
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console
from jaxlora.runtime.signals import Interrupted, Stop
from jaxlora.train.job import abstract_state, fresh_state, load_frozen
from jaxlora.train.loop import Diverged, check_loaded, opened
from jaxlora.train.schedule import learning_rate
from jaxlora.train.step import TrainState

# Largest mean |log p - log q| on the first batch, which is on policy; beyond it the sampler and learner
# differ.
APART = {"float32": 1e-3, "bfloat16": 0.05}


@dataclass(frozen=True)
class RLResult:
    """The step at which a run ended, and its weights (kept for callers that continue with them)."""

    step: int
    accuracy: float | None
    frozen: Tree
    trained: Tree


@dataclass(frozen=True)
class Sampled:
    """A graded batch: the groups to learn from, all sampled groups, the next stream position, and times."""

    groups: list[Group]
    every: list[Group]
    cursor: int
    sampling_seconds: float
    grading_seconds: float


def learn(job: RLJob, frozen: Tree | None = None, stop: Stop | None = None) -> RLResult:
    """Learn from rewards, or resume a run, and write the run's directory.

    Args:
      frozen, stop: as in `jaxlora.train.loop.train`.

    Raises:
      Diverged: a number is not finite.
      UserError: the run exists and is finished, belongs to another configuration, is damaged beyond what its
        checkpoints hold, or sampler and learner differ.
      Interrupted: a signal asked to stop; the run is saved and resumes with the same command.
    """
    rl = job.config.rl
    with opened(Run, RLDirectory, job, stop) as run:
        run.resume()
        run.frozen = load_frozen(job) if frozen is None else frozen
        check_loaded(run)
        reward = grader_named(rl.reward, format_weight=rl.format_weight, time_limit_s=rl.time_limit_s)
        with reward as run.grader:
            return run.to_the_end()


class Run:
    """One run in progress: its directory, its checkpoints, its current step and stage."""

    store: RunState
    state: TrainState
    frozen: Tree
    grader: Grader

    def __init__(self, job: RLJob, directory: RLDirectory, stop: Stop):
        self.job, self.directory, self.stop = job, directory, stop
        self.step, self.stage = 0, "loading"
        self.cursor = 0  # position in the problem stream where the next batch begins
        self.evaluations: dict[int, float] = {}
        self.behind: Tree | None = None  # with overlap, the weights that sample the next batch

    def resume(self) -> None:
        """Restore the newest intact checkpoint, or start afresh if there is none."""
        like: Any = abstract_state(self.job)
        if self.job.config.rl.overlap:
            like = (like, like.trained)
        found = self.store.restore(like, usable=self.directory.unusable)
        size = 0
        if found is not None:
            self.step = found.step
            self.state, self.behind = found.state if self.job.config.rl.overlap else (found.state, None)
            self.evaluations = {int(step): float(x) for step, x in found.progress["validations"]}
            size, self.cursor = found.progress["metrics_bytes"], int(found.progress["cursor"])
            self.directory.goes_on_from(found.progress)
            console.print(f"resuming {self.job.config.run_id} after step {self.step}", markup=False)
        else:
            self.state = fresh_state(self.job)
        self.directory.start_records(size)
        self.directory.clear_after(self.step)

    def to_the_end(self) -> RLResult:
        """Sample and learn from the current step to the last, then finish the run."""
        job, last = self.job, self.job.plan.total_steps
        self.sampler = Sampler(job, self.frozen)
        self.learner = Learner(job.spec, job.machine, job.config, job.loss, self.frozen)
        self._tell_memory()
        with (
            self.stop.saving(job.config.train.grace_seconds) as begin_saving,
            Display(job, self.step) as self.display,
            ThreadPoolExecutor(1, thread_name_prefix="sampler") as self._thread,
        ):
            begin_saving()
            self._after_step()  # before the first step, or if a run was stopped before its evaluation
            self._clock = (
                time.monotonic()
            )  # a batch's seconds count from the end of the last one, without evaluations
            ahead = self._sample(self.step + 1, self.behind) if self.step < last else None
            while self.step < last:
                assert ahead is not None
                ahead = self._one_step(self.step + 1, ahead)
            self.stage = "saving"
            self.store.wait()
        self.stage = "export"
        self.directory.export_selected(self.state.trained, self.step)
        self.directory.finish(self.step, self.evaluations, self.step)
        return RLResult(self.step, self.evaluations.get(self.step), self.frozen, self.state.trained)

    def _one_step(self, step: int, ahead: Future[Sampled]) -> Future[Sampled] | None:
        """Learn from a batch and return the next, which is sampled concurrently or afterwards."""
        job, rl = self.job, self.job.config.rl
        batch = self._given(ahead)
        if (odd := impossible(batch.every)) is not None:
            raise UserError(
                f"step {step}: the sampler recorded a log-probability of {odd:g}, which no drawn"
                " token can have; the batch was discarded: look for NaN or infinities in the weights"
            )
        self.cursor = batch.cursor
        following = None
        if rl.overlap and step < job.plan.total_steps:
            self.behind = jax.tree.map(jnp.copy, self.state.trained)  # the step donates the state's memory
            following = self._sample(step + 1, self.behind)
        self.stage = "learning"
        self.display.say(f"step {step}: learning")
        rate = learning_rate(step, job.config.optim, job.plan)
        begun = time.monotonic()
        self.state, learned = self.learner.learn(self.state, batch.groups, rate)
        times = {
            "seconds": time.monotonic() - self._clock,
            "seconds/sampling": batch.sampling_seconds,
            "seconds/grading": batch.grading_seconds,
            "seconds/learning": time.monotonic() - begun,
        }
        self._check(step, learned)
        self._record(step, rate, batch, learned, times)
        self.step = step
        self.store.check()
        if following is not None and self._due:
            wait([following])  # two caches at once may not fit
        self._after_step()
        self._clock = time.monotonic()
        if following is None and step < job.plan.total_steps:
            following = self._sample(step + 1, None)
        return following

    # --- Sampling -------------------------------------------------------------------------------------------

    def _sample(self, step: int, trained: Tree | None) -> Future[Sampled]:
        """Sample a batch with these weights (None: the newest), ahead on a thread if there is one device.

        On several devices, programs must be started in the same order on all of them, so no thread is used.
        """
        weights = self.state.trained if trained is None else trained
        if trained is not None and self.job.mesh.size == 1:
            return self._thread.submit(self._batch, step, weights, self.cursor)
        done: Future[Sampled] = Future()
        self.stage = "sampling"
        try:
            done.set_result(self._batch(step, weights, self.cursor))
        except _Stopped as stopped:
            done.set_exception(stopped)
        return done

    def _given(self, ahead: Future[Sampled]) -> Sampled:
        """Wait for the batch; if a stop was requested meanwhile, save and end the run."""
        try:
            return ahead.result()
        except _Stopped:
            self._save(stopping=True)
            raise AssertionError("not reached") from None

    def _batch(self, step: int, trained: Tree, cursor: int) -> Sampled:
        """A graded batch, from this stream position on. Groups with constant rewards are replaced by further
        problems, up to `rl.refill` times; if some are still missing, constant groups fill the batch."""
        rl = self.job.config.rl
        every: list[Group] = []
        useful: list[Group] = []
        times = [0.0, 0.0]
        for _ in range(1 + rl.refill):
            needed = rl.prompts - len(useful)
            clock = time.monotonic()
            tell = self._progress(step, needed * rl.group)
            groups = self.sampler.groups(trained, step, range(cursor, cursor + needed), tell)
            times[0] += time.monotonic() - clock
            clock = time.monotonic()
            groups = grade_groups(groups, self.grader)
            times[1] += time.monotonic() - clock
            cursor += needed
            every += groups
            useful += [group for group in groups if not is_constant(group.rewards, counted(group, rl))]
            if len(useful) == rl.prompts:
                break
        kept = {group.position for group in useful}
        rest = [group for group in every if group.position not in kept]
        return Sampled([*useful, *rest][: rl.prompts], every, cursor, times[0], times[1])

    def _progress(self, step: int, total: int) -> Any:
        """A callback that shows how many answers are done, and aborts if a stop was requested."""
        done = 0

        def tell(finished: int) -> None:
            nonlocal done
            done += finished
            self.display.say(f"step {step}: sampling, {done} of {total} answers")
            if hosts.n_processes() == 1 and self.stop.signum is not None:
                raise _Stopped

        return tell

    # --- After a step ---------------------------------------------------------------------------------------

    def _check(self, step: int, learned: Learned) -> None:
        """Raise `Diverged` if a number is not finite, and `UserError` if the first ratios are not 1."""
        if (numbers := not_finite(learned)) is not None:
            raise self.diverged(numbers, step)
        squared = learned.ratios["optim/kl_sample_train_v2"]
        limit = APART[self.job.spec.dtype]
        if step == 1 and self.job.config.rl.updates_per_batch == 1 and squared is not None:
            apart = math.sqrt(2 * squared)
            if apart > limit:
                raise UserError(
                    f"sampler and learner differ by {apart:.2g} in an on-policy log-probability (at most"
                    f" {limit:g} is allowed): ratios would not be 1"
                )

    def diverged(self, message: str, step: int) -> Diverged:
        """The error that ends this run; it says whether anything was saved."""
        return Diverged(step, message, self.store.has_any)

    def _record(self, step: int, rate: float, batch: Sampled, learned: Learned, times: dict) -> None:
        found = batch_statistics(batch.groups, batch.every, self.job.config.rl)
        memory = memory_in_use(jax.local_devices()[0])
        fields = found | learned.ratios
        fields |= {
            "optim/updates": learned.updates,
            "optim/loss": learned.loss,
            "optim/rows": learned.rows,
            "optim/tokens": learned.tokens,
            "grad_norm": learned.grad_norm,
            "update_norm": learned.update_norm,
            **times,
            "tokens_per_second": found["sampled_tokens"] / times["seconds"],
            "peak_memory_bytes": memory,
        }
        graded = [one.graded for group in batch.every for one in group.episodes if one.graded]
        self.display.failed(step, count_failures(graded), len(graded))
        self.directory.write_samples(step, batch.every)
        self.directory.record(self.directory.batch_record(step, rate, fields))
        self.display.show_batch(step, fields)

    @property
    def _due(self) -> bool:
        """Whether an evaluation is due at this step."""
        return self.step in self.job.plan.validation_steps and self.step not in self.evaluations

    def _after_step(self) -> None:
        """Do what is due after a step: an evaluation, a checkpoint, or ending the run on request."""
        due = self._due
        every = self.job.config.train.checkpoint_every or self.job.config.rl.eval_every
        saves = due or self.step % every == 0 or self.step == self.job.plan.total_steps
        stopping = hosts.agree(self.stop.signum is not None)
        if due and not stopping:
            stopping = not self._evaluate()
        if (saves or stopping) and (self.step or stopping):
            self._save(stopping)

    def _save(self, stopping: bool) -> None:
        self.stage = "saving"
        progress = self.directory.progress(self.step, self.evaluations) | {"cursor": self.cursor}
        overlap = self.job.config.rl.overlap
        behind = self.state.trained if self.behind is None else self.behind
        self.store.save(self.step, (self.state, behind) if overlap else self.state, progress)
        if stopping or hosts.n_processes() > 1:
            self.store.wait()
        if stopping:
            raise Interrupted(self.stop.signum or signal.SIGTERM, self.step)

    def _evaluate(self) -> bool:
        """Answer the held-out problems greedily; returns whether this was completed."""
        job = self.job
        self.stage = "evaluation"
        tell = self._progress(self.step, len(job.eval_prompts))
        try:
            answers = self.sampler.greedy(self.state.trained, job.eval_prompts, tell)
        except _Stopped:
            return False
        episodes = grade(job.eval_problems, answers, self.grader)
        record = self.directory.evaluation_record(self.step, episodes)
        self.directory.write_answers(self.step, job.eval_problems, episodes)
        self.directory.record(record)
        self.evaluations[self.step] = record["eval_metric"]
        self.display.evaluated(self.step, record["eval_metric"])
        return True

    def _tell_memory(self) -> None:
        """Report the base's memory, and how much of it the sampler holds a second time."""
        spec = self.job.spec
        if spec.full:
            return
        _, _, weights, _ = self.sampler.decoding(self.state.trained)
        own, again = shared_bytes(self.frozen, weights)
        console.print(
            f"base: {own / 2**20:,.1f} MiB on this host's devices; {again / 2**20:,.1f} MiB more for the"
            " sampler, which reads the learner's arrays",
            markup=False,
        )


class _Stopped(Exception):
    """Sampling was aborted because a stop was requested."""
