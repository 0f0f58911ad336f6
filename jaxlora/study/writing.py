"""The stages that write what the runs and evaluations say: comparison, figures, report.

Each looks at what it would write now, and is done if that is what is there.
"""

from __future__ import annotations

from typing import Any

from jaxlora.runtime.files import read_json, write_text_atomic
from jaxlora.study.figures import draw_figures, is_current, plan_figures
from jaxlora.study.pipeline import Session, Task
from jaxlora.study.report import comparison_inputs, render_report, write_comparison
from jaxlora.study.results import Study
from jaxlora.study.state import State


def _stored_comparison(session: Session, study: Study) -> dict[str, Any] | None:
    """The comparison of exactly these evaluations; None where there is none."""
    file = session.folder / "comparison.json"
    if not study.evaluations or not file.is_file():
        return None
    stored = read_json(file)
    return stored if stored.get("made_from") == comparison_inputs(study) else None


def check_comparison(session: Session) -> list[Task]:
    study, file = session.results(), session.folder / "comparison.json"
    if not study.evaluations:
        return [Task(file.name, State("waiting", "a finished evaluation (--stage baseline, evaluation)"))]
    if _stored_comparison(session, study) is not None:
        return [Task(file.name, State("done"))]
    return [Task(file.name, State("redo", "of other evaluations") if file.is_file() else State("missing"))]


def run_comparison(session: Session, _: list[Task]) -> None:
    write_comparison(session.results(), session.folder)


def check_figures(session: Session) -> list[Task]:
    study = session.results()
    comparison, folder = _stored_comparison(session, study), session.folder / "figures"
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


def run_figures(session: Session, tasks: list[Task]) -> None:
    draw_figures([task.item for task in tasks], session.folder / "figures", session.results_dir)


def check_report(session: Session) -> list[Task]:
    if any(task.state.kind != "done" for task in check_figures(session)):
        return [Task("report.html", State("waiting", "the figures (--stage figures)"))]
    study = session.results()
    tasks = []
    for name, text in render_report(study, _stored_comparison(session, study), session.folder).items():
        file = session.folder / name
        same = file.is_file() and file.read_text(encoding="utf-8") == text
        state = State("done") if same else State("redo" if file.is_file() else "missing")
        tasks.append(Task(name, state, text))
    return tasks


def run_report(session: Session, tasks: list[Task]) -> None:
    for task in tasks:
        write_text_atomic(session.folder / task.name, task.item)
