"""The stages that compute: gates, baseline, trials, sweep, selection, export, evaluation; and their order.

Each pair of functions `_check_...` and `_run_...` is one stage; see `jaxlora.study.pipeline`. The stages that
only write what is known already are in `jaxlora.study.writing`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxlora.checkpoints.export import load_selected, write_adapter
from jaxlora.checkpoints.peft import WEIGHTS
from jaxlora.config import RunConfig
from jaxlora.data.gates import Benchmark, FilePair, check, report_place, require_gates
from jaxlora.evals.gsm8k import load_problems
from jaxlora.evals.run import evaluation_inputs, show, why_redo
from jaxlora.evals.subjects import Target, base_target, evaluate_target, run_target
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.files import read_json, sha256_of, write_json_atomic
from jaxlora.runtime.progress import console
from jaxlora.runtime.signals import Interrupted
from jaxlora.study import grid, writing
from jaxlora.study.pipeline import Session, Stage, Task
from jaxlora.study.results import load_run, lowest_nll
from jaxlora.study.state import State, run_state
from jaxlora.train.group import groups
from jaxlora.train.job import Job
from jaxlora.train.loop import Diverged, train_group
from jaxlora.train.selection import select_checkpoint, select_learning_rate

_NO_RUN = State("waiting", "a finished run (--stage sweep)")

# --- Data gates ---------------------------------------------------------------------------------------------


def _check_gates(session: Session) -> list[Task]:
    data = session.config.data
    place = report_place(data.train_path, data.gate_report)
    assert place is not None
    if not place.is_file():
        return [Task(str(place), State("missing"), place)]
    try:
        require_gates(data.train_path, data.validation_path, str(place), allow_ungated=False)
    except UserError as error:
        return [Task(str(place), State("done" if data.allow_ungated else "redo", str(error)), place)]
    questions = "\n".join(json.dumps(p.question) for p in load_problems(session.config.eval.benchmark))
    report = read_json(place)
    if report.get("benchmark", {}).get("questions_sha256") != hashlib.sha256(questions.encode()).hexdigest():
        return [Task(str(place), State("redo", f"checked against {report['benchmark']['name']}"), place)]
    return [Task(str(place), State("done"), place)]


def _run_gates(session: Session, tasks: list[Task]) -> None:
    data, benchmark = session.config.data, session.config.eval.benchmark
    place = tasks[0].item
    if place.parent != session.folder and place.is_file():
        raise UserError(
            f"data gates: {place}: {tasks[0].state.why}; write it again with python tools/check_dataset.py"
            f" --train {data.train_path} --validation {data.validation_path} --benchmark {benchmark}"
            f" --report {place}"
        )
    questions = [(problem.example_id, problem.question) for problem in load_problems(benchmark)]
    report = check([FilePair(data.train_path, data.validation_path)], Benchmark(benchmark, questions))
    write_json_atomic(place, report)
    require_gates(data.train_path, data.validation_path, str(place), data.allow_ungated)


# --- Evaluations --------------------------------------------------------------------------------------------


def _evaluation_task(session: Session, target: Target) -> Task:
    why = why_redo(target.out, evaluation_inputs(target.config, target.subject, *session.prompts))
    state = State("done") if why is None else State("missing") if why == "missing" else State("redo", why)
    return Task(target.subject.run_id, state, target)


def _check_baseline(session: Session) -> list[Task]:
    return [_evaluation_task(session, base_target(session.config))]


def _check_evaluations(session: Session) -> list[Task]:
    tasks = [_evaluation_task(session, run_target(session.config, run.run_dir)) for run in _finished(session)]
    return tasks or [Task("adapters", _NO_RUN)]


def _evaluate(session: Session, tasks: list[Task]) -> None:
    summaries = []
    for task in tasks:
        target = replace(task.item, spec=replace(task.item.spec, scan=session.scan))
        summaries.append(evaluate_target(target, overwrite=True, frozen=session.base))
    show(summaries)


# --- Training -----------------------------------------------------------------------------------------------


def _check_trials(session: Session) -> list[Task]:
    return [Task(run.run_id, run_state(run, session.inputs), run) for run in grid.trials(session.config)]


def chosen_rates(session: Session) -> dict[str, float]:
    """The learning rate by condition, for the conditions whose trials are over.

    Raises:
      UserError: all trials of a condition failed.
    """
    config = session.config
    if not grid.selects_rates(config):
        return dict.fromkeys(config.sweep.conditions, config.optim.peak_lr)
    tasks = _check_trials(session)
    rates: dict[str, float] = {}
    for condition in config.sweep.conditions:
        own = [task for task in tasks if task.item.lora.condition == condition]
        if all(task.state.final for task in own):
            runs = {task.item.optim.peak_lr: load_run(task.item.run_dir, config.prefix) for task in own}
            rates[condition] = select_learning_rate(
                {r: lowest_nll([run] if run else []) for r, run in runs.items()}
            )
    return rates


def _check_sweep(session: Session) -> list[Task]:
    rates = chosen_rates(session)
    tasks = []
    for run in grid.members(session.config, rates):
        if run.lora.condition in rates or session.config.sweep.learning_rates:
            state = run_state(run, session.inputs)
        else:
            state = State("waiting", "its learning rate (--stage learning-rates)")
        tasks.append(Task(run.run_id, state, run))
    return tasks


def _finished(session: Session) -> list[RunConfig]:
    return [task.item for task in _check_sweep(session) if task.state.kind == "done"]


def _train_all(session: Session, tasks: list[Task]) -> None:
    replaced = ("redo", "foreign")
    # Another host may not see the last trial's files yet; it must train with the same rates all the same.
    rates = hosts.broadcast([task.item.optim.peak_lr for task in tasks])
    configs = []
    for task, rate in zip(tasks, rates, strict=True):
        optim = replace(task.item.optim, peak_lr=rate)
        configs.append(replace(task.item, optim=optim, overwrite=task.state.kind in replaced))
    for group in groups([session.job(config) for config in configs], session.config.sweep.fused):
        _train_together(session, group)


def _train_together(session: Session, jobs: Sequence[Job]) -> None:
    """Train these runs. One that fails leaves its `failure.json`, and the study goes on with the others."""
    names = [job.config.run_id for job in jobs]
    try:
        results = train_group(jobs, session.base, session.stop)
    except (UserError, MachineError, Interrupted):
        raise
    except Exception as error:
        if hosts.n_processes() > 1:  # perhaps here alone, and the others wait for this run
            raise
        session.accidents += names
        text = f"{', '.join(names)} failed: {type(error).__name__}: {error}; the next start tries again"
        console.print(text, style="red", markup=False)
        return
    for name, result in zip(names, results, strict=True):
        if isinstance(result, Diverged):
            text = f"{name} failed: {result}; the study goes on without it"
            console.print(text, style="red", markup=False)
        else:
            text = f"{name}: step {result.step} is selected, validation mean NLL {result.mean_nll:.5f}"
            console.print(text, markup=False)


# --- Selection and export -----------------------------------------------------------------------------------


def selection(session: Session) -> dict[str, Any]:
    """What the two rules chose, and from which numbers: the content of `selection.json`."""
    study = session.results()
    checkpoints = {}
    for run in (run for run in study.runs if run.status == "completed"):
        nll = run.validation_nll()
        step = select_checkpoint(nll)
        if run.summary.get("selected_step") != step:
            raise UserError(
                f"{run.directory}: summary.json selects step {run.summary.get('selected_step')}, its metrics"
                f" select step {step}; train it again with --config.overwrite=true"
            )
        checkpoints[run.run_id] = {
            "selected_step": step,
            "learning_rate": run.learning_rate(),
            "validation_nll": {str(at): value for at, value in nll.items()},
        }
    trials = {
        setting: {grid.rate(value): lowest_nll(runs) for value, runs in by_rate.items()}
        for setting, by_rate in study.by_rate().items()
    }
    return {"lowest_validation_nll_by_rate": trials, "runs": checkpoints}


def _check_selection(session: Session) -> list[Task]:
    file, content = session.folder / "selection.json", selection(session)
    if not content["runs"]:
        return [Task(file.name, _NO_RUN)]
    if not file.is_file():
        return [Task(file.name, State("missing"), content)]
    return [Task(file.name, State("done" if read_json(file) == content else "redo", ""), content)]


def _run_selection(session: Session, tasks: list[Task]) -> None:
    write_json_atomic(session.folder / "selection.json", tasks[0].item)


def _check_export(session: Session) -> list[Task]:
    tasks = []
    for run in _finished(session):
        own = run.run_dir / "selected" / WEIGHTS
        out = session.folder / "adapters" / run.run_id
        if not (out / WEIGHTS).is_file():
            state = State("missing")
        elif sha256_of(out / WEIGHTS) != sha256_of(own):
            state = State("redo", "the run's adapter is another")
        else:
            state = State("done")
        tasks.append(Task(run.run_id, state, (run, out)))
    return tasks or [Task("adapters", _NO_RUN)]


def _run_export(session: Session, tasks: list[Task]) -> None:
    for task in tasks:
        run, out = task.item
        write_adapter(load_selected(run.run_dir), out, overwrite=out.exists())
        if sha256_of(out / WEIGHTS) != sha256_of(run.run_dir / "selected" / WEIGHTS):
            raise UserError(f"{out}: is not what {run.run_dir / 'selected'} holds; train this run again")


STAGES = (
    Stage("gates", "data gates", _check_gates, _run_gates),
    Stage("baseline", "untouched baseline", _check_baseline, _evaluate, together=True),
    Stage("learning-rates", "learning-rate trials", _check_trials, _train_all, together=True),
    Stage("sweep", "main sweep", _check_sweep, _train_all, together=True),
    Stage("selection", "selection of checkpoints", _check_selection, _run_selection),
    Stage("export", "export of the selected adapters", _check_export, _run_export),
    Stage("evaluation", "evaluation of the selected adapters", _check_evaluations, _evaluate, together=True),
    Stage("comparison", "comparison", writing.check_comparison, writing.run_comparison),
    Stage("figures", "figures and tables", writing.check_figures, writing.run_figures),
    Stage("report", "report", writing.check_report, writing.run_report),
)
