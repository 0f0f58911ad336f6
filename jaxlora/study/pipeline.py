"""The study as one command: a sequence of stages, each of which makes whatever is missing.

    session = Session(config)
    unfinished = run_stages(session, STAGES)   # of jaxlora.study.stages; skips what is there and valid

A stage is two functions: `check` lists its tasks with their states and writes nothing; `run` does the
remaining ones. No state is kept between invocations: progress is read from the files, and a file counts only
if the hashes that it records match its inputs. So the command can be stopped or killed at any point; when
restarted, it arrives at the same report.
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

from jaxlora.checkpoints.base import find_base
from jaxlora.config import RunConfig
from jaxlora.data.gates import report_place
from jaxlora.estimate import mesh_here
from jaxlora.evals.gsm8k import Problem
from jaxlora.evals.run import load_prompts
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.quantised import pick_scheme
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.folders import claimed, is_claimed
from jaxlora.runtime.progress import console
from jaxlora.runtime.signals import Stop
from jaxlora.study.grid import study_dir
from jaxlora.study.results import Study, load_study
from jaxlora.study.state import Inputs, State, check_unchanged, read_inputs
from jaxlora.train.job import Job, prepare
from jaxlora.train.step import Machine, wire

WAIT_SECONDS = 2.0  # between checks while other processes do the remaining tasks
LOOK_SECONDS = 120  # an NFS client may show a stale view of a folder for a minute


@dataclass(frozen=True)
class Task:
    """One piece of a stage's work: a run, an evaluation, a file. `item` is what the stage needs to do it."""

    name: str
    state: State
    item: Any = None


@dataclass(frozen=True)
class Stage:
    """One stage.

    `on_every_host`: all processes of a job run it, because it computes; otherwise only the main one does.
    `waits`: the next stage needs the tasks that other processes of the same study are still doing.
    """

    name: str
    about: str
    check: Callable[[Session], list[Task]]
    run: Callable[[Session, list[Task]], None]
    on_every_host: bool = False
    waits: bool = True


class Session:
    """What the stages share in one process: the configuration, hashes, rows, and the base in memory."""

    def __init__(self, config: RunConfig, stop: Stop | None = None):
        shape = find_base(config.model, with_weights=False).config
        config = mesh_here(config, shape)  # one mesh for all runs, because they share the base
        self.config = replace(config, data=replace(config.data, gate_report=gate_report(config)))
        self.results_dir = Path(config.results_dir)
        self.folder = study_dir(config)
        self.stop = stop
        self.accidents: list[str] = []  # runs that failed for a reason that may not recur
        self.taken: list[str] = []  # tasks that another process of this study is doing
        self.others: list[tuple[Stage, str]] = []  # the same, with the stage that waits for them
        self._job: Job | None = None

    @cached_property
    def inputs(self) -> Inputs:
        return read_inputs(self.config)

    @cached_property
    def prompts(self) -> tuple[list[Problem], list[list[int]]]:
        """The benchmark's problems and their prompts as token ids."""
        return load_prompts(self.config, find_base(self.config.model, with_weights=False).tokenizer())

    @cached_property
    def machine(self) -> Machine:
        return wire(self.config.model, self.config.mesh)

    @cached_property
    def base(self) -> Tree:
        """The frozen base in the form that training needs, loaded once for all runs and evaluations."""
        base, mesh = find_base(self.config.model), self.machine.mesh
        scheme = pick_scheme(self.config.model, training=True)
        spec = ModelSpec(base.config, None, self.config.model.dtype, self.machine.scan, scheme=scheme)
        with jax.set_mesh(mesh):
            return base.load(spec, mesh)

    def left_to_others(self, task: Task) -> None:
        """Note that another process of this study is doing this task."""
        self.taken.append(task.name)

    def job(self, config: RunConfig) -> Job:
        """Prepare a run, reusing the rows that the previous run has read."""
        self._job = prepare(config, like=self._job)
        return self._job

    def check_inputs(self) -> None:
        """Refuse to continue if data, base or tokenizer have changed since the study began.

        Raises:
          UserError: names what has changed.
        """
        check_unchanged(self.inputs, self.config)

    def results(self, with_evaluations: bool = True) -> Study:
        """Everything in the results directory at this moment."""
        if not self.results_dir.is_dir():
            return Study(self.results_dir, self.config.prefix, (), (), (), {}, ())
        return load_study(self.results_dir, self.config.prefix, with_evaluations)


def gate_report(config: RunConfig) -> str | None:
    """Where the gates' report is: as configured; None, next to the data; or among the study's own files."""
    beside = report_place(config.data.train_path)
    if config.data.gate_report or (beside is not None and beside.is_file()):
        return config.data.gate_report
    return str(study_dir(config) / "contamination.json")


def run_stages(session: Session, stages: Sequence[Stage]) -> list[str]:
    """Run these stages in order; each does only what is left.

    A stage without anything to work on, because no run has finished, is skipped; if it is the only one, that
    is an error.

    Returns:
      Descriptions of what is not done at the end; empty if the stages are complete.

    Raises:
      UserError: something that the user must decide or fix, such as a run of another configuration.
      Interrupted: a signal asked to stop; what was done is saved.
    """
    unfinished: list[str] = []
    for stage in stages:
        if stage.on_every_host or hosts.is_main():
            if stage.on_every_host or "inputs" in vars(session):  # a report alone needs no data
                session.check_inputs()
            _run_stage(session, stage, alone=len(stages) == 1)
        hosts.barrier(stage.name)
    for stage in stages if hosts.is_main() else ():
        unfinished += _open_work(stage, stage.check(session))
    return hosts.broadcast(unfinished)


def _open_work(stage: Stage, tasks: Sequence[Task]) -> list[str]:
    """The open tasks of a stage, with tasks in the same state grouped."""
    by_state: dict[State, list[str]] = {}
    for task in tasks:
        if not task.state.final:
            by_state.setdefault(task.state, []).append(task.name)
    lines = []
    for state, names in by_state.items():
        shown = ", ".join(names) if len(names) < 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
        text = f"waiting for {state.why}" if state.kind == "waiting" else state.kind
        if state.why and state.kind != "waiting":
            text += f" ({state.why})"
        lines.append(f"stage {stage.name}: {shown} {text}")
    return lines


def _agreed(session: Session, stage: Stage) -> list[Task]:
    """The stage's tasks as seen by process 0; other hosts may see changes of a shared folder later.

    Raises:
      UserError: this host still sees different tasks after `LOOK_SECONDS`.
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
    tasks = _agreed(session, stage) if stage.on_every_host else stage.check(session)
    left = [task for task in tasks if not task.state.final]
    if not left:
        console.print(f"[green]✓[/green] {stage.about}")
        return
    for task in left:
        if task.state.kind == "waiting" and alone:
            raise UserError(f"stage {stage.name}: {task.name} waits for {task.state.why}")
        if task.state.kind == "foreign" and not session.config.overwrite:
            raise UserError(
                f"{task.name}: exists, but was made with another configuration: {task.state.why}. Give"
                " another --config.prefix, or --config.overwrite=true to delete it"
            )
        if task.state.kind == "damaged" and not session.config.overwrite:
            raise UserError(
                f"{task.item.run_dir}: {task.state.why}. Put back a sound copy, or delete this folder to"
                " train this run again"
            )
    todo = [task for task in left if task.state.kind != "waiting"]
    if not todo:
        console.print(f"[yellow]–[/yellow] {stage.about}: waits for {escape(left[0].state.why)}")
        return
    console.print(f"[bold]▸ {stage.about}[/bold] ({len(todo)} of {len(tasks)} to do)")
    if stage.on_every_host:
        _do(session, stage, todo)
        if stage.waits:
            _wait_for_others(session)
        return
    with claimed(session.folder, wait=True):  # another process may have done it meanwhile
        names = [task.name for task in todo]
        if todo := [task for task in stage.check(session) if task.name in names and not task.state.final]:
            stage.run(session, todo)


def _do(session: Session, stage: Stage, tasks: list[Task]) -> None:
    """Run a stage, and note the tasks that another process of this study is doing."""
    stage.run(session, tasks)
    session.others += [(stage, name) for name in session.taken]
    session.taken = []


def _wait_for_others(session: Session) -> None:
    """Wait until other processes of this study have finished their tasks; take over those they abandon."""
    while session.others:
        time.sleep(WAIT_SECONDS)
        others, session.others = session.others, []
        for stage, name in others:
            for task in stage.check(session):
                if task.name != name or task.state.final:
                    continue
                if is_claimed(task.item.run_dir if isinstance(task.item, RunConfig) else task.item.out):
                    session.others.append((stage, name))
                else:
                    _do(session, stage, [task])
