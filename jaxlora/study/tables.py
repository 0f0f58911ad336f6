"""Tables: their definition, how their values are shown, and the tables of the GSM8K evaluations.

    table = primary(study, comparison)
    table.rows[0]["strict_mean"]       # full precision, as in the CSV file
    table.shown()[0]                   # ["untouched base", "–", "84.53 %", ...] as a reader sees it

Figures draw tables, the report prints them, CSV files store them: every number has a single source. A
function that cannot make its table returns a sentence that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlora.runtime.files import Record
from jaxlora.study.grid import Setting
from jaxlora.study.grid import rate as rate
from jaxlora.study.results import Study

ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """A column: its name in the CSV, its title for readers, and how its values are shown."""

    name: str
    title: str
    show: Callable[[Any], str] = str


@dataclass(frozen=True)
class Table:
    """Rows of values by column name; `inputs` are the files that the values come from."""

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[Record, ...]
    inputs: tuple[Path, ...]

    def shown(self) -> list[list[str]]:
        """The rows as text; a missing value is a dash."""
        return [
            [ABSENT if row.get(c.name) is None else c.show(row[c.name]) for c in self.columns]
            for row in self.rows
        ]


# --- How values are shown -----------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def points(value: float) -> str:
    """A difference of two accuracies, in percentage points."""
    return _signed(f"{100 * value:+.2f}")


def interval(value: Sequence[float]) -> str:
    return f"{points(value[0])} to {points(value[1])}"


def signed(value: int) -> str:
    return _signed(f"{value:+d}")


def _signed(text: str) -> str:
    """A signed number with a true minus, and no sign before zero."""
    return text.replace("-", "\u2212") if text.strip("+-0.") else text.lstrip("+-")


def whole(value: float) -> str:
    return f"{value:,.0f}"


def nll(value: float) -> str:
    return f"{value:.5f}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %".replace("-", "\u2212")


def yes(value: bool) -> str:
    return "yes" if value else ""


def _settings(study: Study) -> dict[str, Setting]:
    """The evaluated settings, by their labels in a comparison."""
    return {str(run.setting): run.setting for run in study.evaluations if run.setting is not None}


# --- GSM8K --------------------------------------------------------------------------------------------------


def primary(study: Study, comparison: dict[str, Any]) -> Table:
    """Accuracy by condition with both scores side by side, the baseline first."""
    columns = (
        Column("condition", "Condition"),
        Column("seeds", "Seeds"),
        Column("strict_mean", "Strict mean", percent),
        Column("strict_min", "min", percent),
        Column("strict_max", "max", percent),
        Column("strict_delta", "to baseline", points),
        Column("strict_delta_interval", "95 % interval", interval),
        Column("numeric_mean", "Numeric mean", percent),
        Column("numeric_delta", "to baseline", points),
        Column("format_share_of_gain", "Gain that is format", share),
        Column("extraction_failure_rate", "No box", percent),
        Column("truncation_rate", "Truncated", percent),
    )
    rows: list[Record] = []
    if base := comparison["baseline"]:
        rows.append(
            base
            | {"condition": "untouched base", "strict_mean": base["accuracy"]}
            | {"numeric_mean": base["accuracy_numeric"]}
        )
    for row in comparison["conditions"]:
        rows.append(
            row
            | {
                "seeds": ", ".join(map(str, row["seeds"])),
                "strict_mean": row["strict"]["mean"],
                "strict_min": row["strict"]["min"],
                "strict_max": row["strict"]["max"],
                "strict_delta": row["strict"]["delta_to_baseline"],
                "strict_delta_interval": row["strict"]["delta_interval"],
                "numeric_mean": row["numeric"]["mean"],
                "numeric_delta": row["numeric"]["delta_to_baseline"],
            }
        )
    note = (
        "Differences are in percentage points; the interval is a paired bootstrap over problems. Strict is "
        "the study's score; numeric also accepts the same number in another format. “Gain that is format” is "
        "the part of the strict gain that vanishes in the numeric score (above 100 % where that score fell)."
    )
    title = f"Accuracy on {study.benchmark()} by condition, {comparison['problems']:,} problems"
    return Table("primary_comparison", title, note, columns, tuple(rows), tuple(study.evaluation_files()))


def accuracy(study: Study, comparison: dict[str, Any]) -> Table:
    """The two scores of each model: one row per evaluated model, the baseline first."""
    columns = (
        Column("run_id", "Run"),
        Column("condition", "Condition"),
        Column("seed", "Seed"),
        Column("correct_strict", "Strict right", whole),
        Column("accuracy", "accuracy", percent),
        Column("delta_correct_strict", "to baseline", signed),
        Column("correct_numeric", "Numeric right", whole),
        Column("accuracy_numeric", "accuracy", percent),
        Column("delta_correct_numeric", "to baseline", signed),
        Column("extraction_failures", "No box", whole),
        Column("truncated", "Truncated", whole),
        Column("prompt_tokens", "Prompt tokens", whole),
        Column("generated_tokens", "Generated tokens", whole),
    )
    baseline = [comparison["baseline"]] if comparison["baseline"] else []
    settings = _settings(study)
    rows = tuple(baseline + [run | {"condition": settings[run["condition"]]} for run in comparison["runs"]])
    note = "Every evaluated model. Differences to the baseline are counts of problems."
    title = f"Accuracy on {study.benchmark()}, every seed"
    return Table("gsm8k_accuracy", title, note, columns, rows, tuple(study.evaluation_files()))


def disagreement(study: Study, comparison: dict[str, Any]) -> Table | str:
    """The paired tables: one row per pair of conditions, score and seed, and one for all seeds."""
    columns = (
        Column("score", "Score"),
        Column("first", "First"),
        Column("second", "Second"),
        Column("seed", "Seed"),
        Column("both_correct", "Both right", whole),
        Column("both_wrong", "Both wrong", whole),
        Column("only_first", "Only first", whole),
        Column("only_second", "Only second", whole),
        Column("difference", "Difference", signed),
        Column("mcnemar_p", "McNemar p", p_value),
        Column("interval", "95 % interval", interval),
    )
    settings = _settings(study)
    rows = tuple(
        {"score": score, "first": settings[pair["first"]], "second": settings[pair["second"]]} | row
        for pair in comparison["pairs"]
        for score in ("strict", "numeric")
        for row in pair[score]["by_seed"]
        + ([pair[score]["pooled"] | {"seed": "all"}] if pair[score]["pooled"] else [])
    )
    if not rows:
        return "No two conditions were evaluated with the same seed, so there is nothing to pair."
    note = (
        "Each seed compares two models problem by problem. The interval is that of the difference in "
        "accuracy, in percentage points. Over all seeds it draws problems together with all their seeds; the "
        "McNemar test on the added counts takes every answer as independent, so its p-value tends to be too "
        "small."
    )
    title = "Who was right, problem by problem"
    return Table("disagreement", title, note, columns, rows, tuple(study.evaluation_files()))
