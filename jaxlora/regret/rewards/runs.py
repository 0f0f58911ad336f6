"""One run: learn from rewards at a constant rate, and answer held-out problems along the way.

    record = make_run(run, job, state, frozen, grader, identity)

A record is one file of `jaxlora.regret.results`; its `held_out` rows are step, share of wrong answers at
temperature 0, and share of truncated answers. There are no checkpoints: an interrupted run is made again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxlora.models.decoder import Tree
from jaxlora.regret.design import RunId
from jaxlora.regret.results import VERSION
from jaxlora.rl.job import RLJob
from jaxlora.rl.learning import MAX_ROWS, Learned, Learner, batch_statistics, not_finite
from jaxlora.rl.rewards import Grader
from jaxlora.rl.sampling import Group, Sampler, grade, grade_groups
from jaxlora.runtime.files import Record
from jaxlora.train.step import TrainState

STILL = 3  # batches without an update, after which the weights, and so the results, no longer change
NO_TAILS: tuple[int, ...] = ()  # short answers end nearly together: fewer slots are not worth a program
# What is recorded of each batch, and under which name.
KEPT = {
    "correct": "reward/correct",
    "truncated": "episode/truncated",
    "length": "episode/tokens_mean",
    "constant": "group/constant",
    "entropy": "optim/entropy",
    "bits": "bits/available",
    "kl": "optim/kl_sample_train_v2",
    "ratio_max": "ratio/max",
}


def make_run(
    run: RunId, job: RLJob, state: TrainState, frozen: Tree, grader: Grader, identity: Record
) -> Record:
    """Learn to the end, or until the run diverges or stands still, and return the record.

    Args:
      state: the fresh state; its buffers are donated.
      identity: what all runs of the experiment share, see `jaxlora.regret.rewards.lab.identity_of`.
    """
    sampler = Sampler(job, frozen, NO_TAILS)
    learner = Learner(job.spec, job.machine, job.config, job.loss, frozen, _segments(job))
    last, looks = job.plan.total_steps, set(job.plan.validation_steps)
    started = time.monotonic()
    seen = [[0, *look(sampler, job, state.trained, grader)]]
    train: dict[str, list[float | None]] = {
        name: [] for name in (*KEPT, "right_bits", "grad_norm", "update_norm")
    }
    clocks: list[list[float]] = []
    diverged_at, still = None, 0
    for step in range(1, last + 1):
        clock = [time.monotonic()]
        groups = _sampled(sampler, job, state.trained, step, grader)
        clock.append(time.monotonic())
        state, learned = learner.learn(state, groups, job.config.optim.peak_lr)
        clock.append(time.monotonic())
        clocks.append(clock)
        _keep(train, groups, learned, job)
        if not_finite(learned) is not None:
            diverged_at = step
            break
        still = 0 if learned.updates else still + 1
        if step in looks or still == STILL:
            seen.append([step, *look(sampler, job, state.trained, grader)])
        if still == STILL:  # later results would be the same
            seen += [[later, *seen[-1][1:]] for later in sorted(looks) if later > step]
            break
    return {
        **_facts(run, job),
        "identity": identity,
        "held_out": seen,
        "train": train,
        "diverged_at": diverged_at,
        "stood_still_at": len(clocks) if still == STILL else None,
        "seconds": _seconds(started, clocks),
    }


def look(sampler: Sampler, job: RLJob, trained: Tree, grader: Grader) -> tuple[float | None, float | None]:
    """Share of held-out problems answered wrongly at temperature 0, and share of truncated answers."""
    episodes = grade(job.eval_problems, sampler.greedy(trained, job.eval_prompts), grader)
    wrong = [not one.graded.correct for one in episodes if one.graded]
    return _short(np.mean(wrong)), _short(np.mean([one.truncated for one in episodes]))


def right_bits(groups: Sequence[Group]) -> float:
    """Mean over groups of log2 of the share of right answers, by the Krichevsky-Trofimov estimator."""
    shares = [_share([bool(one.graded and one.graded.correct) for one in group.episodes]) for group in groups]
    return float(np.mean(np.log2(shares)))


def _share(right: Sequence[bool]) -> float:
    return (sum(right) + 0.5) / (len(right) + 1)


def _segments(job: RLJob) -> int | None:
    """Segments per packed line: the same for every batch, so that one program serves all."""
    return MAX_ROWS if job.config.train.layout == "packed" else None


def _sampled(sampler: Sampler, job: RLJob, trained: Tree, step: int, grader: Grader) -> list[Group]:
    """The graded batch of a step."""
    n = job.config.rl.prompts
    return grade_groups(sampler.groups(trained, step, range((step - 1) * n, step * n)), grader)


def _keep(train: dict[str, list], groups: Sequence[Group], learned: Learned, job: RLJob) -> None:
    found = batch_statistics(groups, groups, job.config.rl) | learned.ratios
    for name, key in KEPT.items():
        train[name].append(_short(found[key]))
    train["right_bits"].append(_short(right_bits(groups)))
    train["grad_norm"].append(_short(learned.grad_norm))
    train["update_norm"].append(_short(learned.update_norm))


def _seconds(started: float, clocks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Seconds in total and of a median step, its sampling and its learning.

    Compile time is estimated as the excess of the first step, in which programs are compiled, over the
    median.
    """
    parts = np.diff(np.array(clocks), axis=1)
    whole = parts.sum(axis=1)
    found = {
        "all": time.monotonic() - started,
        "compiling": max(0.0, float(whole[0] - np.median(whole))),
        "step": float(np.median(whole)),
        "sampling": float(np.median(parts[:, 0])),
        "learning": float(np.median(parts[:, 1])),
    }
    return {name: round(value, 3) for name, value in found.items()}


def _facts(run: RunId, job: RLJob) -> Record:
    """What is known about a run before it begins."""
    arm, rl = run.cell.arm, job.config.rl
    return {
        "version": VERSION,
        "name": run.name,
        "arm": arm.label,
        "what": arm.what,
        "placement": arm.placement,
        "rank": arm.rank,
        "parameters": arm.parameters,
        "batch_rows": rl.prompts * rl.group,
        "rate": run.rate,
        "place": run.place,
        "seed": run.seed,
        "steps": job.plan.total_steps,
        "problems": len(job.problems),
        "held_out_problems": len(job.eval_problems),
        "prompts": rl.prompts,
        "group": rl.group,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _short(value: Any) -> float | None:
    """Six digits; None if there is no finite number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
