"""The tables of the training runs: tokens and sizes, validation, learning-rate selection, throughput.

As in `jaxlora.study.tables`, a function that cannot make its table returns a sentence that says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from jaxlora.runtime.files import Record
from jaxlora.study.grid import Setting
from jaxlora.study.results import Run, Study, lowest_nll
from jaxlora.study.tables import ABSENT, Column, Table, nll, percent, rate, whole, yes
from jaxlora.train.selection import select_learning_rate


def _metrics_files(runs: Sequence[Run]) -> tuple[Path, ...]:
    return tuple(run.directory / "metrics.jsonl" for run in runs if run.metrics)


def _tokens(run: Run, split: str) -> int | None:
    counts = [row["token_count"] for row in run.rows(split) if row.get("token_count") is not None]
    return sum(counts) if counts else None


def accounting(study: Study) -> Table | str:
    """Tokens, steps and adapter size of every run, each from its own files."""
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
    )
    rows: list[Record] = []
    for run in study.runs:
        adapter = run.adapter() or {}
        rows.append(
            {
                "run_id": run.run_id,
                "status": run.status,
                "steps": max((row["step"] for row in run.rows("train")), default=None),
                "train_tokens": _tokens(run, "train"),
                "validation_tokens": _tokens(run, "validation"),
                "adapter_parameters": adapter.get("parameters"),
                "adapter_bytes": adapter.get("bytes"),
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
        Column("setting", "Setting"),
        Column("seed", "Seed"),
        Column("step", "Step", whole),
        Column("validation_nll", "Validation NLL", nll),
        Column("selected", "Selected", yes),
    )
    rows = tuple(
        {
            "run_id": run.run_id,
            "setting": run.setting,
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
    """The result of each learning rate in the trials, or in the sweep's own runs; the best one is marked."""
    by_setting = study.by_rate()
    if not by_setting:
        return "There are no runs that compare learning rates."
    columns = (
        Column("setting", "Setting"),
        Column("learning_rate", "Learning rate", rate),
        Column("validation_nll", "Lowest validation NLL", nll),
        Column("status", "Status"),
        Column("selected", "Selected", yes),
    )
    rows: list[Record] = []
    for setting, by_rate in by_setting.items():
        lowest = {value: lowest_nll(runs) for value, runs in by_rate.items()}
        chosen = select_learning_rate(lowest) if any(map(_finite, lowest.values())) else None
        rows += [
            {
                "setting": setting,
                "learning_rate": value,
                "validation_nll": lowest[value] if _finite(lowest[value]) else None,
                "status": next((run.status for run in runs if run.status != "completed"), "completed"),
                "selected": value == chosen,
            }
            for value, runs in by_rate.items()
        ]
    note = (
        "The lowest validation NLL wins (the mean over seeds, where there are several); exact ties choose "
        "the smaller rate; a run that failed is ineligible."
    )
    inputs = _metrics_files(_compared(by_setting))
    return Table("learning_rate_selection", "Learning-rate selection", note, columns, tuple(rows), inputs)


def rate_minimum(study: Study) -> Table | str:
    """At each validated step, the lowest validation NLL that any learning rate reached there.

    A rate with several seeds is represented by their mean, at the steps that all of them reached.
    """
    columns = (
        Column("setting", "Setting"),
        Column("step", "Step", whole),
        Column("validation_nll", "Lowest validation NLL", nll),
        Column("learning_rate", "at learning rate", rate),
    )
    by_setting = study.by_rate()
    rows: list[Record] = []
    for setting, by_rate in by_setting.items():
        by_step: dict[int, list[tuple[float, float]]] = {}
        for learning_rate, runs in by_rate.items():
            curves = [run.validation_nll() for run in runs if run.status == "completed"]
            for step in set.intersection(*map(set, curves)) if len(curves) == len(runs) else ():
                by_step.setdefault(step, []).append((fmean(c[step] for c in curves), learning_rate))
        for step, values in sorted(by_step.items()):
            lowest, learning_rate = min(values)
            row = {"setting": setting, "step": step}
            rows.append(row | {"validation_nll": lowest, "learning_rate": learning_rate})
    if not rows:
        return "No run that compares learning rates has a recorded validation."
    note = "The lower envelope of several runs: no single run need follow this line."
    title = "Pointwise minimum over learning rates"
    inputs = _metrics_files(_compared(by_setting))
    return Table("learning_rate_minimum", title, note, columns, tuple(rows), inputs)


def _compared(by_setting: dict[Setting, dict[float, list[Run]]]) -> list[Run]:
    return [run for by_rate in by_setting.values() for runs in by_rate.values() for run in runs]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def throughput(study: Study) -> Table | str:
    """Training time and speed of every run: the one table that changes when a study is repeated."""
    columns = (
        Column("run_id", "Run"),
        Column("setting", "Setting"),
        Column("seed", "Seed"),
        Column("steps", "Steps measured", whole),
        Column("hours", "Hours of steps", "{:.2f}".format),
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
        seconds = [row["seconds"] for row in run.rows("train") if row.get("seconds") is not None]
        if speeds:
            tenth = (len(speeds) - 1) // 10
            rows.append(
                {
                    "run_id": run.run_id,
                    "setting": run.setting,
                    "seed": run.seed,
                    "steps": len(speeds),
                    "hours": sum(seconds) / 3600 if seconds else None,
                    "slow": speeds[tenth],
                    "median": median(speeds),
                    "fast": speeds[-1 - tenth],
                    "utilisation": median(used) if used else None,
                }
            )
    if not rows:
        return "No run recorded its tokens per second."
    note = (
        "Real tokens a second, padding not counted; the line spans the 10th to the 90th percentile of steps. "
        "Hours are those of the steps, without compilation, validation and loading."
    )
    inputs = _metrics_files(study.runs)
    return Table("throughput", "Training time and throughput", note, columns, tuple(rows), inputs)
