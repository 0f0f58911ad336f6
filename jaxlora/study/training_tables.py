"""The tables of the training runs: tokens and sizes, validation, learning-rate selection, throughput.

As in `jaxlora.study.tables`, a function that cannot make its table returns the sentence that says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from jaxlora.records import Record
from jaxlora.study.results import Run, Study
from jaxlora.study.selection import select_learning_rate
from jaxlora.study.tables import ABSENT, Column, Table, nll, percent, rate, whole, yes


def _metrics_files(runs: Sequence[Run]) -> tuple[Path, ...]:
    return tuple(run.directory / "metrics.jsonl" for run in runs if run.metrics)


def _tokens(run: Run, split: str) -> int | None:
    counts = [row["token_count"] for row in run.rows(split) if row.get("token_count") is not None]
    return sum(counts) if counts else None


def accounting(study: Study) -> Table | str:
    """Tokens, steps, hours and adapter size of every run, each from its own files."""
    if not study.runs:
        return "There are no training runs to account for."
    columns = (
        Column("run_id", "Run"),
        Column("status", "Status"),
        Column("steps", "Steps", whole),
        Column("train_tokens", "Train tokens", whole),
        Column("validation_tokens", "Validation tokens", whole),
        Column("adapter_parameters", "Adapter parameters", whole),
        Column("adapter_bytes", "Adapter bytes", whole),
        Column("hours", "Hours of steps", "{:.2f}".format),
        Column("cost", "Cost", "{:.2f}".format),
    )
    rows: list[Record] = []
    for run in study.runs:
        adapter = run.adapter() or {}
        seconds = [row["seconds"] for row in run.rows("train") if row.get("seconds") is not None]
        rows.append(
            {
                "run_id": run.run_id,
                "status": run.status,
                "steps": max((row["step"] for row in run.rows("train")), default=None),
                "train_tokens": _tokens(run, "train"),
                "validation_tokens": _tokens(run, "validation"),
                "adapter_parameters": adapter.get("parameters"),
                "adapter_bytes": adapter.get("bytes"),
                "hours": sum(seconds) / 3600 if seconds else None,
                "cost": run.summary.get("cost"),
            }
        )
    inputs = (
        *_metrics_files(study.runs),
        *(run.directory / "summary.json" for run in study.runs if run.summary),
        *(run.adapter_file for run in study.runs if run.adapter_file),
    )
    note = (
        "Tokens are shifted counts (a row's length minus one), added up from metrics.jsonl. Parameters and "
        f"bytes are read from each exported adapter file. {ABSENT} means that it is not recorded."
    )
    return Table("accounting", "Tokens and adapter size", note, columns, tuple(rows), inputs)


def validation(study: Study) -> Table | str:
    """Validation NLL of every run at every validated step."""
    columns = (
        Column("run_id", "Run"),
        Column("condition", "Condition"),
        Column("seed", "Seed"),
        Column("step", "Step", whole),
        Column("validation_nll", "Validation NLL", nll),
        Column("selected", "Selected", yes),
    )
    rows = tuple(
        {
            "run_id": run.run_id,
            "condition": run.condition,
            "seed": run.seed,
            "step": step,
            "validation_nll": value,
            "selected": step == run.selected_step(),
        }
        for run in study.runs
        for step, value in run.validation_nll().items()
    )
    if not rows:
        return "No run has a recorded validation."
    note = (
        "Mean NLL per weighted target token. The lowest is selected; exact ties choose the later checkpoint."
    )
    inputs = _metrics_files(study.runs)
    return Table("validation_nll", "Validation NLL by step", note, columns, rows, inputs)


def learning_rates(study: Study) -> Table | str:
    """The learning-rate trials: each one's lowest validation NLL, and which one the rule selects."""
    if not study.trials:
        return "There are no learning-rate selection runs."
    columns = (
        Column("condition", "Condition"),
        Column("learning_rate", "Learning rate", rate),
        Column("validation_nll", "Lowest validation NLL", nll),
        Column("status", "Status"),
        Column("selected", "Selected", yes),
    )
    rows: list[Record] = []
    for condition in study.conditions():
        trials = [run for run in study.trials if run.condition == condition]
        lowest = {
            run.learning_rate(): min(run.validation_nll().values(), default=None)
            for run in trials
            if run.status == "completed"
        }
        eligible = {
            key: value
            for key, value in lowest.items()
            if key is not None and value is not None and math.isfinite(value)
        }
        chosen = select_learning_rate(eligible) if eligible else None
        rows += [
            {
                "condition": condition,
                "learning_rate": run.learning_rate(),
                "validation_nll": lowest.get(run.learning_rate()),
                "status": run.status,
                "selected": chosen is not None and run.learning_rate() == chosen,
            }
            for run in trials
        ]
    note = (
        "The lowest validation NLL wins; exact ties choose the smaller rate; a run that failed is ineligible."
    )
    inputs = _metrics_files(study.trials)
    return Table("learning_rate_selection", "Learning-rate selection", note, columns, tuple(rows), inputs)


def rate_minimum(study: Study) -> Table | str:
    """At each validated step, the lowest validation NLL that any learning rate has reached there."""
    columns = (
        Column("condition", "Condition"),
        Column("step", "Step", whole),
        Column("validation_nll", "Lowest validation NLL", nll),
        Column("learning_rate", "at learning rate", rate),
    )
    rows: list[Record] = []
    for condition in study.conditions():
        by_step: dict[int, list[tuple[float, float]]] = {}
        for run in study.trials:
            learning_rate = run.learning_rate()
            if run.condition == condition and run.status == "completed" and learning_rate is not None:
                for step, value in run.validation_nll().items():
                    by_step.setdefault(step, []).append((value, learning_rate))
        for step, values in sorted(by_step.items()):
            lowest, learning_rate = min(values)
            rows.append(
                {
                    "condition": condition,
                    "step": step,
                    "validation_nll": lowest,
                    "learning_rate": learning_rate,
                }
            )
    if not rows:
        return "No learning-rate selection run has a recorded validation."
    note = "The lower envelope of several runs: no single run need follow this line."
    title = "Pointwise minimum over learning rates"
    inputs = _metrics_files(study.trials)
    return Table("learning_rate_minimum", title, note, columns, tuple(rows), inputs)


def throughput(study: Study) -> Table | str:
    """Training speed of every run: tokens a second over its steps."""
    columns = (
        Column("run_id", "Run"),
        Column("condition", "Condition"),
        Column("seed", "Seed"),
        Column("steps", "Steps measured", whole),
        Column("slow", "10th percentile", whole),
        Column("median", "Median tokens/s", whole),
        Column("fast", "90th percentile", whole),
        Column("utilisation", "Median FLOPs utilisation", percent),
    )
    rows: list[Record] = []
    for run in study.runs:
        speeds = sorted(
            row["tokens_per_second"] for row in run.rows("train") if row.get("tokens_per_second") is not None
        )
        used = [
            row["model_flops_utilisation"]
            for row in run.rows("train")
            if row.get("model_flops_utilisation") is not None
        ]
        if speeds:
            tenth = (len(speeds) - 1) // 10
            rows.append(
                {
                    "run_id": run.run_id,
                    "condition": run.condition,
                    "seed": run.seed,
                    "steps": len(speeds),
                    "slow": speeds[tenth],
                    "median": median(speeds),
                    "fast": speeds[-1 - tenth],
                    "utilisation": median(used) if used else None,
                }
            )
    if not rows:
        return "No run recorded its tokens per second."
    note = (
        "Real tokens a second, padding not counted; the line spans the 10th to the 90th percentile of steps."
    )
    inputs = _metrics_files(study.runs)
    return Table("throughput", "Training throughput", note, columns, tuple(rows), inputs)
