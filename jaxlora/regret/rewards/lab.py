"""What the runs of one process share: problems, the base, the grader. The design is that of `jaxlora.regret`.

lab = RewardLab(config)            # checks everything that can be known before a model is loaded
work(lab)                          # of `jaxlora.regret.worker`; other processes may do the same concurrently
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.config import RunConfig
from jaxlora.models.decoder import Tree
from jaxlora.regret.design import Cell, RunId, cells_of, next_runs
from jaxlora.regret.results import RunFolder, check_identity, known_losses
from jaxlora.regret.rewards.findings import accuracies, plateau, start_of
from jaxlora.regret.rewards.runs import make_run
from jaxlora.regret.sweeps import sweeps_of
from jaxlora.rl.job import RLJob, prepare
from jaxlora.rl.problems import problems_hash
from jaxlora.rl.rewards import grader_named
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record
from jaxlora.train.job import fresh_state, trained_spec
from jaxlora.train.step import TrainState, init_state

# Settings of `rl` that do not affect results, or whose effect is recorded in the identity instead.
_LEFT_OUT = ("problems", "problem_rows", "eval_problems", "eval_rows", "system", "suffix", "slots")


class RewardLab:
    """The counterpart of `jaxlora.regret.worker.Lab` for learning from rewards."""

    def __init__(self, config: RunConfig):
        self.config = replace(config, optim=replace(config.optim, schedule="constant"))
        if config.rl.eval_problems is None:
            raise UserError("config.rl.eval_problems: arms are compared on held-out problems; give some")
        self.first = prepare(self.config)
        rl = self.config.rl
        rows = replace(self.config, train=replace(self.config.train, batch_rows=rl.prompts * rl.group))
        self.cells = cells_of(rows, self.first.base.config)
        for cell in self.cells:
            if cell.batch_rows != rl.prompts * rl.group:
                raise UserError(
                    f"config.regret.arms: {cell.arm.label}@{cell.batch_rows}: batches are rl.prompts x"
                    " rl.group answers for all arms; leave out @ROWS"
                )
        self.folder = RunFolder(config)
        self.identity = identity_of(self.first)

    def job(self, run: RunId) -> RLJob:
        """The first job with a run's arm, rate and seed."""
        arm = run.cell.arm
        config = replace(
            self.config,
            seed=run.seed,
            lora=arm.lora or self.config.lora,
            optim=replace(self.config.optim, peak_lr=run.rate),
            train=replace(self.config.train, what=arm.what),
        )
        config, spec = trained_spec(config, self.first.base)
        return replace(self.first, config=config, spec=replace(spec, scan=False))

    @cached_property
    def base(self) -> Tree:
        """The frozen base, loaded once for all runs."""
        return self._load(self.first.spec.dtype)

    @cached_property
    def masters(self) -> Tree:
        """The base in float32, from which full fine-tuning starts."""
        return self._load("float32")

    def _load(self, dtype: Any) -> Tree:
        plain = replace(self.first.spec, lora=None, shapes=(), full=False, dtype=dtype)
        with jax.set_mesh(self.first.mesh):
            return self.first.base.load(plain, self.first.mesh)

    def state(self, job: RLJob) -> TrainState:
        """The state before the first step, like `fresh_state` but without reading the base again."""
        if not job.spec.full:
            return fresh_state(job)
        return init_state(jax.tree.map(jnp.copy, self.masters), job.config.optim)

    def make(self, run: RunId) -> Record:
        """Make one run and return its record."""
        job, rl = self.job(run), self.config.rl
        reward = grader_named(rl.reward, format_weight=rl.format_weight, time_limit_s=rl.time_limit_s)
        with jax.set_mesh(job.mesh), reward as grader:
            frozen: Tree = {} if job.spec.full else self.base
            return make_run(run, job, self.state(job), frozen, grader, self.identity)

    def steps(self, cell: Cell) -> int:
        """Steps of each run of a cell."""
        return self.config.rl.steps

    def found(self, record: Record) -> str:
        """The result of a run, in a few words."""
        return f"held-out accuracy {1 - record['held_out'][0][1]:.3f} to {1 - record['held_out'][-1][1]:.3f}"

    def left(self) -> list[RunId]:
        """The runs still to be made, as far as is known now; see `Lab.left`."""
        records = self.folder.records()
        check_identity(records, self.identity, self.folder.runs)
        known = known_losses(records, self.cells, self.config)
        return next_runs(self.config.regret, self.cells, known, self.config.seed, partial(open_ends, records))


def open_ends(records: Mapping[str, Record], grid: Sequence[RunId]) -> set[str]:
    """The ends of a grid beyond which the range of good rates may extend."""
    (sweep,) = sweeps_of(records[run.name] for run in grid)
    found = plateau(accuracies(sweep), start_of([sweep]))
    if found is None:
        return set()
    return {end for end, is_open in (("low", found.open_low), ("high", found.open_high)) if is_open}


def identity_of(job: RLJob) -> Record:
    """What all runs of an experiment share: base, problems, and settings that affect results."""
    config = job.config
    return {
        "base": job.base.fingerprint(),
        "problems": problems_hash(job.problems, job.prompts),
        "held_out": problems_hash(job.eval_problems, job.eval_prompts),
        "dtype": config.model.dtype,
        "alpha": config.lora.alpha,
        "factor": config.regret.factor,
        "rl": {name: x for name, x in dataclasses.asdict(config.rl).items() if name not in _LEFT_OUT},
        "optimizer": {
            name: value
            for name, value in dataclasses.asdict(config.optim).items()
            if name not in ("peak_lr", "warmup_fraction", "min_lr_fraction")
        },
    }
