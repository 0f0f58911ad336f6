"""What each stage of a study checks and does, from the data gates to the report.

Each pair of functions `_check_...` and `_run_...` is one stage; see `jaxlora.study.pipeline`. A stage that
only writes derived files computes what it would write now, and is done if the files already contain exactly
that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlora.checkpoints.export import load_selected, unlike, write_adapter
from jaxlora.checkpoints.peft import SETTINGS
from jaxlora.config import RunConfig
from jaxlora.data.gates import Benchmark, FilePair, check, report_place, require_gates
from jaxlora.evals.gsm8k import load_problems
from jaxlora.evals.run import evaluation_inputs, show, why_redo
from jaxlora.evals.subjects import Target, base_target, evaluate_target, run_target
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.files import read_json, write_json_atomic, write_text_atomic
from jaxlora.runtime.folders import Taken
from jaxlora.runtime.progress import console
from jaxlora.runtime.signals import Interrupted
from jaxlora.study import STAGE_NAMES, grid
from jaxlora.study.figures import draw_figures, is_current, plan_figures
from jaxlora.study.pipeline import Session, Stage, Task
from jaxlora.study.report import (
    read_derived,
    render_report,
    stored_comparison,
    write_comparison,
    write_derived,
)
from jaxlora.study.results import Run, load_evaluation, load_run, lowest_nll
from jaxlora.study.state import SELECTED, State, run_state, selected_sha256
from jaxlora.train.loop import Diverged, train
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
        require_gates(data.train_path, session.config.validation_file, str(place), allow_ungated=False)
    except UserError as error:
        return [Task(str(place), State("done" if data.allow_ungated else "redo", str(error)), place)]
    questions = "\n".join(json.dumps(p.question) for p in load_problems(session.config.benchmark))
    report = read_json(place)
    if report.get("benchmark", {}).get("questions_sha256") != hashlib.sha256(questions.encode()).hexdigest():
        return [Task(str(place), State("redo", f"checked against {report['benchmark']['name']}"), place)]
    return [Task(str(place), State("done"), place)]


def _run_gates(session: Session, tasks: list[Task]) -> None:
    data, benchmark = session.config.data, session.config.benchmark
    place = tasks[0].item
    if place.parent != session.folder and place.is_file():
        raise UserError(
            f"data gates: {place}: {tasks[0].state.why}; write it again with python tools/check_dataset.py"
            f" --train {data.train_path} --validation {data.validation_path} --benchmark {benchmark}"
            f" --report {place}"
        )
    questions = [(problem.example_id, problem.question) for problem in load_problems(benchmark)]
    report = check(
        [FilePair(data.train_path, session.config.validation_file)], Benchmark(benchmark, questions)
    )
    write_json_atomic(place, report)
    require_gates(data.train_path, session.config.validation_file, str(place), data.allow_ungated)


def made_meanwhile(task: Task, now: Task) -> bool:
    """Whether another process has meanwhile done what was left."""
    return hosts.n_processes() == 1 and not task.state.final and now.state.final


# --- Evaluations --------------------------------------------------------------------------------------------


def _evaluation_task(session: Session, target: Target) -> Task:
    subject = target.subject
    why = why_redo(target.out, evaluation_inputs(target.config, subject, *session.prompts))
    if why is None:
        try:
            setting = None if subject.condition is None else grid.Setting(subject.condition)
            load_evaluation(target.out, subject.run_id, setting, subject.seed)
        except UserError as error:
            why = str(error)
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
        if made_meanwhile(task, _evaluation_task(session, task.item)):
            continue
        target = replace(task.item, spec=replace(task.item.spec, scan=session.machine.scan))
        try:
            summaries.append(evaluate_target(target, overwrite=True, frozen=session.base))
        except Taken:
            session.left_to_others(task)
    if summaries:
        show(summaries)


# --- Training -----------------------------------------------------------------------------------------------


def _run_tasks(session: Session, runs: Sequence[RunConfig]) -> list[Task]:
    notes = read_derived(session.folder / "selection.json").get("runs", {})
    return [Task(run.run_id, run_state(run, session.inputs, notes.get(run.run_id)), run) for run in runs]


def _check_trials(session: Session) -> list[Task]:
    return _run_tasks(session, grid.trials(session.config))


def chosen_rates(session: Session) -> dict[str, float]:
    """The learning rate by condition, for the conditions whose trials are finished.

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
            runs = {task.item.optim.peak_lr: load_run(task.item.run_dir, trial=True) for task in own}
            rates[condition] = select_learning_rate(
                {r: lowest_nll([run] if run else []) for r, run in runs.items()}
            )
    return rates


def _check_sweep(session: Session) -> list[Task]:
    rates = chosen_rates(session)
    own_rates = bool(session.config.sweep.learning_rates)
    tasks = []
    for task in _run_tasks(session, grid.sweep_runs(session.config, rates)):
        if not own_rates and task.item.lora.condition not in rates:
            task = replace(task, state=State("waiting", "its learning rate (--stage learning-rates)"))
        tasks.append(task)
    return tasks


def _finished(session: Session) -> list[RunConfig]:
    return [task.item for task in _check_sweep(session) if task.state.kind == "done"]


def _train_all(session: Session, tasks: list[Task]) -> None:
    # Another host may not see the last trial's files yet, but must train with the same rates.
    rates = hosts.broadcast([task.item.optim.peak_lr for task in tasks])
    notes = read_derived(session.folder / "selection.json").get("runs", {})
    for task, peak in zip(tasks, rates, strict=True):
        note = notes.get(task.name)
        if made_meanwhile(task, replace(task, state=run_state(task.item, session.inputs, note))):
            continue
        if task.state.kind == "redo":
            console.print(f"{task.name}: {task.state.why}; going back to its last checkpoint", markup=False)
            _reopen(task.item.run_dir)
        optim = replace(task.item.optim, peak_lr=peak)
        _train_run(
            session, replace(task.item, optim=optim, overwrite=task.state.kind in ("foreign", "damaged"))
        )


def _reopen(run_dir: Path) -> None:
    """Make a finished run unfinished: it continues from its last checkpoint and ends in the same files."""
    if hosts.is_main():
        write_json_atomic(run_dir / "summary.json", {"status": "unfinished"})
    hosts.barrier("reopened run")


def _train_run(session: Session, config: RunConfig) -> None:
    """Train one run. If it fails, it leaves a `failure.json`, and the study continues with the others."""
    name = config.run_id
    session.check_inputs()
    if hosts.is_main():  # its notes describe the run as it was
        (session.folder / "selection.json").unlink(missing_ok=True)
    try:
        result = train(session.job(config), session.base, session.stop)
    except Taken:
        session.left_to_others(Task(name, State("unfinished"), config))
    except Diverged as error:
        text = f"{name} failed: {error}; the study goes on without it"
        console.print(text, style="red", markup=False)
    except (UserError, MachineError, Interrupted):
        raise
    except Exception as error:
        if hosts.n_processes() > 1:  # it may have failed only here, while the others wait for this run
            raise
        session.accidents.append(name)
        text = f"{name} failed: {type(error).__name__}: {error}; the next start tries again"
        console.print(text, style="red", markup=False)
    else:
        text = f"{name}: step {result.step} is selected, validation mean NLL {result.mean_nll:.5f}"
        console.print(text, markup=False)
    session.check_inputs()  # otherwise its manifest might name files that changed after its rows were read


# --- Selection and export -----------------------------------------------------------------------------------


def selection(session: Session) -> dict[str, Any]:
    """What the two rules chose, and from which numbers and files: the content of `selection.json`.

    Raises:
      UserError: a run's summary contradicts its metrics, or two runs were trained on different rows.
    """
    study = session.results(with_evaluations=False)
    _check_same_rows(study.runs)
    _check_same_rows(study.trials)
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
            "selected_sha256": selected_sha256(run.directory),
        }
    trials = {
        str(setting): {grid.rate(value): lowest_nll(runs) for value, runs in by_rate.items()}
        for setting, by_rate in study.by_rate().items()
    }
    return {"lowest_validation_nll_by_rate": trials, "runs": checkpoints}


def _check_same_rows(runs: Sequence[Run]) -> None:
    """Refuse runs whose manifests name the same study but different rows or tokens."""
    first: dict[tuple[str, str], tuple[str, Any]] = {}
    for run in runs:
        for split in ("train", "validation"):
            data = (run.manifest.get("dataset") or {}).get(split) or {}
            for name in ("sha256", "tokens_sha256"):
                if (found := data.get(name)) is None:
                    continue
                other, expected = first.setdefault((split, name), (run.run_id, found))
                if found != expected:
                    raise UserError(
                        f"{run.directory}: was not trained on the data of {other} (dataset.{split}.{name}"
                        " differs in their manifests); delete the wrong one to train it again"
                    )


def _check_selection(session: Session) -> list[Task]:
    file = session.folder / "selection.json"
    for task in (*_check_trials(session), *_check_sweep(session)):
        if task.state.kind in ("damaged", "redo"):
            return [Task(file.name, State("waiting", f"sound files of {task.name}: {task.state.why}"))]
    content = selection(session)
    if not content["runs"]:
        return [Task(file.name, _NO_RUN)]
    if not file.is_file():
        return [Task(file.name, State("missing"), content)]
    return [Task(file.name, State("done" if read_derived(file) == content else "redo"), content)]


def _run_selection(session: Session, tasks: list[Task]) -> None:
    write_derived(session.folder / "selection.json", tasks[0].item)


def _check_export(session: Session) -> list[Task]:
    tasks = []
    for run in _finished(session):
        out = session.folder / "adapters" / run.run_id
        own = run.run_dir / SELECTED
        if not out.is_dir():
            state = State("missing")
        elif different := unlike(own, out):
            state = State("redo", f"its {different} differs from the run's")
        else:
            state = State("done")
        tasks.append(Task(run.run_id, state, (run, out)))
    return tasks or [Task("adapters", _NO_RUN)]


def _run_export(session: Session, tasks: list[Task]) -> None:
    for task in tasks:
        run, out = task.item
        if not (out / SETTINGS).is_file():  # the remains of an interrupted export
            shutil.rmtree(out, ignore_errors=True)
        write_adapter(load_selected(run.run_dir), out, overwrite=out.exists())
        if different := unlike(run.run_dir / SELECTED, out):
            raise UserError(
                f"{out / different}: is not what {run.run_dir / SELECTED} holds; train this run again"
            )


# --- Comparison, figures, report ----------------------------------------------------------------------------


def _check_comparison(session: Session) -> list[Task]:
    study, file = session.results(), session.folder / "comparison.json"
    if not study.evaluations:
        return [Task(file.name, State("waiting", "a finished evaluation (--stage baseline, evaluation)"))]
    if stored_comparison(study, session.folder) is not None:
        return [Task(file.name, State("done"))]
    return [Task(file.name, State("redo", "of other evaluations") if file.is_file() else State("missing"))]


def _run_comparison(session: Session, _: list[Task]) -> None:
    write_comparison(session.results(), session.folder)


def _check_figures(session: Session) -> list[Task]:
    study = session.results()
    comparison, folder = stored_comparison(study, session.folder), session.folder / "figures"
    if study.evaluations and comparison is None:
        return [Task("figures", State("waiting", "the comparison (--stage comparison)"))]
    figures, _ = plan_figures(study, comparison)
    tasks = []
    for table, draw in figures:
        if is_current(table, folder, study.directory):
            state = State("done")
        else:
            state = State("redo" if (folder / f"{table.name}.png").is_file() else "missing")
        tasks.append(Task(table.name, state, (table, draw)))
    return tasks or [Task("figures", State("waiting", "a run or an evaluation (--stage sweep)"))]


def _run_figures(session: Session, tasks: list[Task]) -> None:
    draw_figures([task.item for task in tasks], session.folder / "figures", session.results_dir)


def _check_report(session: Session) -> list[Task]:
    if any(task.state.kind != "done" for task in _check_figures(session)):
        return [Task("report.html", State("waiting", "the figures (--stage figures)"))]
    study = session.results()
    tasks = []
    for name, text in render_report(study, stored_comparison(study, session.folder), session.folder).items():
        file = session.folder / name
        same = file.is_file() and file.read_bytes() == text.encode("utf-8")
        state = State("done") if same else State("redo" if file.is_file() else "missing")
        tasks.append(Task(name, state, text))
    return tasks


def _run_report(session: Session, tasks: list[Task]) -> None:
    for task in tasks:
        write_text_atomic(session.folder / task.name, task.item)


_WORK = {
    "gates": (_check_gates, _run_gates),
    "baseline": (_check_baseline, _evaluate),
    "learning-rates": (_check_trials, _train_all),
    "sweep": (_check_sweep, _train_all),
    "selection": (_check_selection, _run_selection),
    "export": (_check_export, _run_export),
    "evaluation": (_check_evaluations, _evaluate),
    "comparison": (_check_comparison, _run_comparison),
    "figures": (_check_figures, _run_figures),
    "report": (_check_report, _run_report),
}
STAGES = tuple(
    Stage(
        name,
        about,
        *_WORK[name],
        on_every_host=_WORK[name][1] in (_train_all, _evaluate),
        waits=name != "baseline",  # no training depends on its scores
    )
    for name, about in STAGE_NAMES.items()
)
