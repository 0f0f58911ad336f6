"""The study as one command: stages in a row, each of which knows what is there and makes what is not.

    session = Session(config)
    run_stages(session, STAGES)        # of jaxlora.study.stages; skips what is there and valid

A stage is two functions: `check` lists its tasks with their states and writes nothing; `run` does those that
are left. Nothing is remembered between two calls of the command: what is done is read from the files, and a
file counts only if the hashes that it records are those of its inputs now. So the command can be stopped or
killed anywhere; started again, it ends in the same report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from rich.markup import escape

from jaxlora.checkpoints.base import load_base
from jaxlora.config import RunConfig
from jaxlora.data.gates import report_place
from jaxlora.estimate import with_mesh
from jaxlora.evals.gsm8k import Problem
from jaxlora.evals.run import load_prompts
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.runtime import hosts
from jaxlora.runtime.devices import scan_layers, slice_of
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console
from jaxlora.runtime.signals import Stop
from jaxlora.sharding import make_mesh
from jaxlora.study.grid import study_dir
from jaxlora.study.results import Study, load_study
from jaxlora.study.state import Inputs, State, read_inputs
from jaxlora.train.job import Job, load_job_tokenizer, locate_model, prepare

LOOK_SECONDS = 120  # an NFS client may go by what it knew of a folder for a minute


@dataclass(frozen=True)
class Task:
    """One piece of a stage's work: a run, an evaluation, a file. `item` is what the stage needs to do it."""

    name: str
    state: State
    item: Any = None


@dataclass(frozen=True)
class Stage:
    """One stage. `together`: all processes of a job on several hosts run it; else the main one alone."""

    name: str
    about: str
    check: Callable[[Session], list[Task]]
    run: Callable[[Session, list[Task]], None]
    together: bool = False


class Session:
    """What the stages share in one process: the configuration, hashes, rows, and the base in memory."""

    def __init__(self, config: RunConfig, stop: Stop | None = None):
        _, model = locate_model(config, with_weights=False)
        config = with_mesh(config, model, slice_of(jax.devices()))  # one for all runs: they share the base
        self.config = replace(config, data=replace(config.data, gate_report=gate_report(config)))
        self.results_dir = Path(config.results_dir)
        self.folder = study_dir(config)
        self.stop = stop
        self.accidents: list[str] = []  # runs that failed for a reason that may not come back
        self._job: Job | None = None

    @cached_property
    def inputs(self) -> Inputs:
        return read_inputs(self.config)

    @cached_property
    def prompts(self) -> tuple[list[Problem], list[list[int]]]:
        """The benchmark's problems and their prompts as token ids."""
        tokenizer = load_job_tokenizer(self.config, *locate_model(self.config, with_weights=False))
        return load_prompts(self.config, tokenizer)

    @cached_property
    def scan(self) -> bool:
        return scan_layers(self.config.model.layers, jax.default_backend())

    @cached_property
    def base(self) -> Tree:
        """The frozen base in the form that training wants, loaded once for all runs and evaluations."""
        folder, model = locate_model(self.config)
        mesh = make_mesh(self.config.mesh)
        assert folder is not None  # `read_inputs` refuses random weights
        with jax.set_mesh(mesh):
            return load_base(folder, ModelSpec(model, None, self.config.model.dtype, self.scan), mesh)

    def job(self, config: RunConfig) -> Job:
        """The prepared run; rows that the run before has read are not read again."""
        self._job = prepare(config, like=self._job)
        return self._job

    def results(self) -> Study:
        """All that the results directory holds now."""
        if not self.results_dir.is_dir():
            return Study(self.results_dir, self.config.prefix, (), (), (), {}, ())
        return load_study(self.results_dir, self.config.prefix)


def gate_report(config: RunConfig) -> str | None:
    """Where the gates' report is: as configured; None, beside the data; or among the study's own files."""
    beside = report_place(config.data.train_path)
    if config.data.gate_report or (beside is not None and beside.is_file()):
        return config.data.gate_report
    return str(study_dir(config) / "contamination.json")


def run_stages(session: Session, stages: Sequence[Stage]) -> None:
    """Run these stages in their order; each does only what is left of it.

    A stage without anything to work on, because no run has finished, is passed over; alone, it is an error.

    Raises:
      UserError: something that the user must decide or mend, such as a run of another configuration.
      Interrupted: a signal asked to stop; what was done is saved.
    """
    for stage in stages:
        if stage.together or hosts.is_main():
            _run_stage(session, stage, alone=len(stages) == 1)
        hosts.barrier(stage.name)


def _agreed(session: Session, stage: Stage) -> list[Task]:
    """The stage's tasks in the states that process 0 sees: another may see a shared folder change later.

    Raises:
      UserError: this host still sees other tasks after `LOOK_SECONDS`.
    """
    tasks = stage.check(session)
    first = hosts.broadcast([[task.name, task.state.kind, task.state.why] for task in tasks])
    deadline = time.monotonic() + LOOK_SECONDS
    while [task.name for task in tasks] != [name for name, *_ in first]:
        if time.monotonic() > deadline:
            raise UserError(
                f"stage {stage.name}: this host does not see in {session.results_dir} what process 0 sees"
                " there; several hosts need one shared folder"
            )
        time.sleep(1)
        tasks = stage.check(session)
    return [replace(task, state=State(*state)) for task, (_, *state) in zip(tasks, first, strict=True)]


def _run_stage(session: Session, stage: Stage, alone: bool) -> None:
    tasks = _agreed(session, stage) if stage.together else stage.check(session)
    left = [task for task in tasks if not task.state.final]
    if not left:
        console.print(f"[green]✓[/green] {stage.about}")
        return
    for task in left:
        if task.state.kind == "waiting" and alone:
            raise UserError(f"stage {stage.name}: {task.name} waits for {task.state.why}")
        if task.state.kind == "foreign" and not session.config.overwrite:
            raise UserError(
                f"{task.name}: is there, but of another configuration: {task.state.why}. Give another"
                " --config.prefix, or --config.overwrite=true to delete it"
            )
    todo = [task for task in left if task.state.kind != "waiting"]
    if not todo:
        console.print(f"[yellow]–[/yellow] {stage.about}: waits for {escape(left[0].state.why)}")
        return
    console.print(f"[bold]▸ {stage.about}[/bold] ({len(todo)} of {len(tasks)} to do)")
    stage.run(session, todo)
