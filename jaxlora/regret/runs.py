"""One run: train at a constant rate, evaluate the held-out rows at log-spaced steps, measure norms.

    record = make_run(run, job, state, frozen, held_out, programs, measure, identity, time.monotonic())

A record is one file of `jaxlora.regret.results`.

This calls the same train step as every training loop, but keeps no checkpoints and writes no folder: hundreds
of short runs are made for their curves, and one that is interrupted is simply made again.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.data.batches import ahead, step_batch, validation_batches
from jaxlora.data.packing import Batch
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.regret.design import RunId
from jaxlora.regret.results import VERSION
from jaxlora.runtime import hosts
from jaxlora.runtime.files import Record
from jaxlora.sharding import place_batch
from jaxlora.train.job import Job, token_count
from jaxlora.train.step import TrainState, make_row_step, make_train_step


def look_steps(total: int, each_doubling: int, marks: Iterable[int] = ()) -> list[int]:
    """Steps at which the held-out rows are evaluated: log-spaced from 1, the marks, and the last.

    >>> look_steps(40, 2)
    [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 40]
    """
    places = range(math.floor(math.log2(total) * each_doubling) + 1)
    spaced = {round(2 ** (place / each_doubling)) for place in places}
    return sorted({step for step in spaced | set(marks) if 0 < step <= total} | {total})


class Programs:
    """Compiled steps, by step and batch shape, with the compile time and the FLOPs of each.

    Only those of one model are kept: a GPU's driver retains the graph of every program that was ever run, and
    those of a dozen ranks exhaust its memory.
    """

    def __init__(self) -> None:
        self._done: dict[tuple[Any, tuple[int, ...]], Any] = {}
        self._of: ModelSpec | None = None
        self.seconds = 0.0  # of compiling, since last reset

    def __call__(self, step: Any, *arguments: Any) -> Any:
        """Run a jitted step; one argument is a batch, and the shapes of the others never change."""
        batch = next(x for x in arguments if isinstance(x, dict) and "segment_ids" in x)
        key = (step, batch["tokens"].shape)
        if key not in self._done:
            started = time.monotonic()
            self._done[key] = step.lower(*arguments).compile()
            self.seconds += time.monotonic() - started
        return self._done[key](*arguments)

    def of(self, spec: ModelSpec) -> None:
        """Drop what was compiled for another model."""
        if spec != self._of:
            self._done.clear()
            gc.collect()
            self._of = spec

    def flops(self, step: Any) -> dict[str, float]:
        """FLOPs of one run of a step as counted by the compiler, by buffer shape; loop bodies count once."""
        found = {}
        for (one, shape), compiled in self._done.items():
            counted = compiled.cost_analysis() if one is step else None
            counted = counted[0] if isinstance(counted, list) else counted
            if counted and "flops" in counted:
                found["x".join(map(str, shape))] = float(counted["flops"])
        return found


class HeldOut:
    """The held-out rows on the device, and their loss by two definitions."""

    def __init__(self, job: Job):
        self._compute = job.compute(job.validation_layout)
        by_shape: dict[tuple[int, ...], list[Batch]] = {}
        for batch in validation_batches(job.validation_rows, job.validation_layout):
            by_shape.setdefault(batch["tokens"].shape[1:], []).append(batch)
        self._batches = []
        for group in by_shape.values():
            whole = {name: np.concatenate([batch[name] for batch in group]) for name in group[0]}
            weights = _row_weights(whole, self._compute.max_segments + 1)
            self._batches.append((place_batch(job.mesh, whole), weights))

    def look(self, spec: ModelSpec, programs: Programs, trained: Tree, frozen: Tree) -> tuple[float, float]:
        """Mean loss over weighted tokens, and the mean over rows of each row's mean loss."""
        step = make_row_step(spec, self._compute)
        sums = [programs(step, trained, frozen, batch) for batch, _ in self._batches]
        loss = np.concatenate([np.asarray(hosts.whole(x), np.float64).ravel() for x in sums])
        weight = np.concatenate([weights.ravel() for _, weights in self._batches])
        rows = weight > 0
        return float(loss.sum() / weight.sum()), float((loss[rows] / weight[rows]).mean())


def _row_weights(batch: Batch, segments: int) -> np.ndarray:
    """Summed target weights of each row, float64 `[buffers, lines, segments]`, by segment id."""
    ids = batch["segment_ids"]
    found = np.zeros((*ids.shape[:2], segments))
    buffers, lines = np.ogrid[: ids.shape[0], : ids.shape[1]]
    np.add.at(found, (buffers[..., None], lines[..., None], ids), batch["weights"])
    return found


class Curve:
    """Losses of the training steps, fetched with a delay, up to the first non-finite one."""

    def __init__(self) -> None:
        self.nll: list[float] = []
        self.weight: list[float] = []
        self.diverged_at: int | None = None
        self._waiting: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._waiting.append(metrics)

    def read(self) -> bool:
        """Fetch the steps so far; returns whether all of them are finite."""
        for values in jax.device_get(self._waiting):
            if not np.isfinite([values["nll"], values["grad_norm"], values["update_norm"]]).all():
                self.diverged_at = len(self.nll) + 1
                break
            self.nll.append(float(values["nll"]))
            self.weight.append(float(values["weight"]))
        self._waiting = []
        return self.diverged_at is None


def make_run(
    run: RunId,
    job: Job,
    state: TrainState,
    frozen: Tree,
    held_out: HeldOut,
    programs: Programs,
    measure: Callable[[Tree], Record],
    identity: Record,
    started: float,
) -> Record:
    """Train one run to its end, or until it diverges, and return its record.

    Args:
      state: the fresh state; its buffers are donated.
      measure: computes norms of the trained weights, for the record.
      identity: what all runs of the experiment share, see `jaxlora.regret.results.identity_of`.
      started: when the run's preparation began, by `time.monotonic`.
    """
    config, plan = job.config, job.plan
    looks = set(look_steps(plan.total_steps, config.regret.looks, config.regret.marks))
    train_step = make_train_step(job.spec, config.optim, job.compute(job.train_layout))
    batch_of = partial(step_batch, job.train_rows, plan.rows_of_step, job.train_layout)
    look = partial(held_out.look, job.spec, programs)
    curve, looking = Curve(), 0.0
    programs.of(job.spec)
    programs.seconds = 0.0
    seen = [[0, *look(state.trained, frozen)]]
    rate = jnp.float32(config.optim.peak_lr)
    for step, batch in ahead(batch_of, range(1, plan.total_steps + 1)):
        state, metrics = programs(train_step, state, frozen, place_batch(job.mesh, batch), rate)
        curve.add(metrics)
        if step in looks:
            if not curve.read():
                break
            before = time.monotonic()
            seen.append([step, *look(state.trained, frozen)])
            looking += time.monotonic() - before
            if not math.isfinite(seen[-1][1]):
                curve.diverged_at = step
                break
    norms = measure(state.trained) if curve.diverged_at is None else {}
    spent = {"all": time.monotonic() - started, "compiling": programs.seconds, "looking": looking}
    return {
        **_facts(run, job),
        "identity": identity,
        "held_out": [[step, _short(token), _short(row)] for step, token, row in seen if math.isfinite(token)],
        "train": {"nll": [_short(x) for x in curve.nll], "weight": curve.weight},
        "diverged_at": curve.diverged_at,
        "norms": norms,
        "seconds": {name: round(value, 3) for name, value in spent.items()},
        "ended": round(time.time(), 3),
        "flops": programs.flops(train_step),
    }


def _facts(run: RunId, job: Job) -> Record:
    """What is known about a run before it begins."""
    arm = run.cell.arm
    return {
        "version": VERSION,
        "name": run.name,
        "arm": arm.label,
        "what": arm.what,
        "placement": arm.placement,
        "rank": arm.rank,
        "parameters": arm.parameters,
        "residual": arm.residual,
        "batch_rows": run.cell.batch_rows,
        "rate": run.rate,
        "place": run.place,
        "seed": run.seed,
        "steps": job.plan.total_steps,
        "steps_per_epoch": job.plan.steps_per_epoch,
        "train_tokens": token_count(job.train_rows),
        "buffers": list(job.train_layout.sizes),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _short(value: float) -> float:
    """Seven digits, the precision of float32."""
    return float(f"{value:.7g}")
