"""Make all runs of an experiment, with as many processes as there are devices.

    lab = Lab(config)                # checks everything that can be known before a model is loaded
    work(lab)                        # makes the remaining runs; other processes may do the same concurrently
    write_report(lab)                # of jaxlora.regret.report

    for i in 0 1 2 3; do CUDA_VISIBLE_DEVICES=$i jaxlora study --config regret/rank & done; wait

Processes share only the results folder. Each claims the next run that no other is making, preferring runs of
the program it has already compiled, because compiling takes longer than some runs do.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.config import RunConfig
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.regret.design import Cell, RunId, cells_of, next_runs, steps_of
from jaxlora.regret.norms import adapter_norms, change_norms, weight_norms
from jaxlora.regret.results import RunFolder, check_identity, identity_of, known_losses
from jaxlora.regret.runs import HeldOut, Programs, make_run
from jaxlora.runtime.devices import memory_of
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record
from jaxlora.runtime.progress import console
from jaxlora.train.job import Job, fresh_state, leaked_rows, memory_per_device, prepare
from jaxlora.train.rates import rate_warning
from jaxlora.train.step import TrainState, init_state

WAIT_SECONDS = 1.0  # between checks while other processes make the last runs


class Lab:
    """What all runs of a process share: rows, the base, compiled programs."""

    def __init__(self, config: RunConfig):
        self.first = prepare(replace(config, optim=replace(config.optim, schedule="constant")))
        self.config = self.first.config
        check_split(self.first)
        self.cells = cells_of(self.config, self.first.base.config)
        self.folder = RunFolder(config)
        self.programs = Programs()
        self.identity = identity_of(self.first)
        for cell in self.cells:
            self._check(cell)

    def _check(self, cell: Cell) -> None:
        """Refuse a cell that cannot be trained here; warn if its rates look wrong."""
        job = self.job(RunId(cell, 0, self.config.seed))
        self._check_memory(cell.arm.label, job)
        if warning := rate_warning(job.spec.config, cell.arm.what, cell.middle):
            console.print(f"{cell.arm.label}: {warning}", style="yellow", markup=False)

    def _check_memory(self, label: str, job: Job) -> None:
        room, needed = memory_of(job.mesh.devices.flat[0]), memory_per_device(job)
        if room is not None and needed > room:
            raise UserError(
                f"config.regret.arms: {label} needs about {needed / 2**30:.1f} GiB a device, which"
                f" has {room / 2**30:.1f}; give a lower rank, a smaller --config.train.max_buffer_tokens, or"
                " more devices"
            )

    def config_of(self, run: RunId) -> RunConfig:
        """The configuration of one run."""
        config, arm = self.config, run.cell.arm
        return replace(
            config,
            seed=run.seed,
            lora=arm.lora or config.lora,
            optim=replace(config.optim, peak_lr=run.rate),
            train=replace(config.train, what=arm.what, batch_rows=run.cell.batch_rows),
        )

    def job(self, run: RunId) -> Job:
        return prepare(self.config_of(run), like=self.first, gates=self.first.gates)

    @cached_property
    def base(self) -> Tree:
        """The frozen base, loaded once for all runs."""
        with jax.set_mesh(self.first.mesh):
            return self.first.base.load(self._plain, self.first.mesh)

    @cached_property
    def masters(self) -> Tree:
        """The base in float32, from which full fine-tuning starts."""
        with jax.set_mesh(self.first.mesh):
            return self.first.base.load(replace(self._plain, dtype="float32"), self.first.mesh)

    @property
    def _plain(self) -> ModelSpec:
        return replace(self.first.spec, lora=None, shapes=(), full=False)

    @cached_property
    def of_weights(self) -> dict[str, list[float]]:
        """Spectral norms of the base's matrices."""
        return weight_norms(self._plain, self.base)

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut(self.first)

    def state(self, job: Job) -> TrainState:
        """The state before the first step, like `fresh_state` but without reading the base again."""
        if not job.spec.full:
            return fresh_state(job)
        return init_state(jax.tree.map(jnp.copy, self.masters), job.config.optim)

    def measure(self, job: Job, trained: Tree) -> Record:
        """Norms of what a run has changed."""
        if job.spec.full:
            return change_norms(job.spec, trained, self.masters, self.of_weights)
        return adapter_norms(job.spec, trained, self.of_weights)

    def make(self, run: RunId) -> Record:
        """Make one run and return its record."""
        started, job = time.monotonic(), self.job(run)
        with jax.set_mesh(job.mesh):
            frozen: Tree = {} if job.spec.full else self.base
            return make_run(
                run,
                job,
                self.state(job),
                frozen,
                self.held_out,
                self.programs,
                lambda trained: self.measure(job, trained),
                self.identity,
                started,
            )

    def steps(self, cell: Cell) -> int:
        """Steps of each run of a cell."""
        return steps_of(self.config, cell.arm, len(self.first.train_rows))

    def found(self, record: Record) -> str:
        """The result of a run, in a few words."""
        return f"held-out loss {record['held_out'][-1][1]:.4f}"

    def left(self) -> list[RunId]:
        """The runs still to be made, as far as is known now.

        Raises:
          UserError: a result belongs to another configuration, or is damaged.
        """
        records = self.folder.records()
        check_identity(records, self.identity, self.folder.runs)
        known = known_losses(records, self.cells, self.config)
        return next_runs(self.config.regret, self.cells, known, self.config.seed)


def check_split(job: Job) -> None:
    """Refuse held-out rows whose questions are also trained on.

    Raises:
      UserError: says how many there are, and names the first one.
    """
    if leaked := leaked_rows(job):
        raise UserError(
            f"config.data.validation_path: the prompts of {len(leaked)} held-out rows are also trained on,"
            f" the first is row {leaked[0].row_id}; take them out of one of the two files, or let"
            " --config.data.validation_fraction=0.05 split one file by its prompts"
        )


def work(lab: Any) -> None:
    """Make runs until none is left; while other processes make the last ones, wait for them."""
    last: RunId | None = None
    while left := lab.left():
        run = _make_one(lab, in_order(left, last, lab.folder.in_work()))
        if run is None:
            time.sleep(WAIT_SECONDS)
        else:
            last = run


def in_order(left: list[RunId], last: RunId | None, in_work: set[str]) -> list[RunId]:
    """The runs in the order in which this process should try them.

    Runs of the program it has compiled come first, then cells that no process is working on, then the rest.
    """
    busy = {run.cell.label for run in left if run.name in in_work}

    def place(run: RunId) -> Any:
        own = last is not None and run.cell == last.cell
        return not own, run.cell.label in busy and not own, run.name in in_work

    return sorted(left, key=place)


def _make_one(lab: Any, runs: list[RunId]) -> RunId | None:
    """Make the first of these runs that can be claimed; None if others are making all of them."""
    for run in runs:
        with lab.folder.claim(run.name) as mine:
            if not mine or lab.folder.file(run.name).exists():
                continue
            record = lab.make(run)
            lab.folder.write(record)
            _say(record, lab.found(record), len(runs))
            return run
    return None


def _say(record: Record, found: str, left: int) -> None:
    seconds = record["seconds"]
    if record["diverged_at"] is not None:
        found = f"diverged at step {record['diverged_at']}"
    console.print(
        f"{record['name']}: {found}; {seconds['all']:.1f} s, {seconds['compiling']:.1f} of them compiling;"
        f" {left - 1} more are known of",
        markup=False,
    )
