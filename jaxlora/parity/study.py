"""Compare a finished run, or evaluations of the published adapters, with the figures of the study.

    points = compare_run(Path("results/qwen3-8b-all_layer-seed-0"))
    verdict(points)                    # "agrees: 17 of 17 points ..."

Counts must be equal. A measured value agrees if it is within the range of the study's three seeds, or within
the interval that would contain a further seed of the study with 99% probability (Student's t over the seeds,
with one standard deviation pooled over steps or conditions; the seven validations share the 1%). Outside that
interval, the run does not agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from jaxlora.parity import study_figures as study
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.records import read_manifest, read_metrics, read_summary
from jaxlora.study.grid import Setting
from jaxlora.study.results import Run
from jaxlora.train.selection import select_checkpoint

COVERAGE = 0.99
# A loss before the first update depends only on the base and the rows; bfloat16 changes its third digit.
FIRST_LOSS = 0.01
# The losses of the next steps also depend on the adapter's initialisation, which no two programs share.
EARLY_LOSS = 0.05
SELECTION_MARGIN = 0.005  # a trial's NLL is a single draw, so there is no range to compare it with


@dataclass(frozen=True)
class Point:
    """One of our figures next to the study's."""

    name: str
    ours: float | None  # None: this run does not have it
    low: float  # the study's range over seeds; low == high for a single figure
    high: float
    widest: tuple[float, float]  # the interval that still agrees

    @property
    def judgement(self) -> str:
        """`equal`, `in range`, `near`, `differs` or `missing`."""
        if self.ours is None:
            return "missing"
        if self.low <= self.ours <= self.high:
            return "equal" if self.low == self.high else "in range"
        return "near" if self.widest[0] <= self.ours <= self.widest[1] else "differs"


def exactly(name: str, ours: float | None, figure: float) -> Point:
    """A count, which either equals the study's or differs."""
    return Point(name, ours, figure, figure, (figure, figure))


def within(name: str, ours: float | None, figure: float, margin: float) -> Point:
    """A single measured figure, and how far from it a value still agrees."""
    return Point(name, ours, figure, figure, (figure - margin, figure + margin))


def over_seeds(name: str, ours: float | None, values: Sequence[float], half_width: float) -> Point:
    """A value measured for several seeds; `half_width` comes from `prediction_half_width`."""
    middle = float(np.mean(values))
    return Point(name, ours, min(values), max(values), (middle - half_width, middle + half_width))


def prediction_half_width(groups: Iterable[Sequence[float]], coverage: float = COVERAGE) -> float:
    """Half the width of the prediction interval for one further seed of a group.

    t · s · sqrt(1 + 1/n) for groups of n seeds each, where s is pooled over the groups and t has its degrees
    of freedom.
    """
    arrays = [np.asarray(group, np.float64) for group in groups]
    n = len(arrays[0])
    freedom = sum(len(values) - 1 for values in arrays)
    pooled = math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in arrays) / freedom)
    return float(stats.t.ppf((1 + coverage) / 2, freedom) * pooled * math.sqrt(1 + 1 / n))


def together_half_width(groups: Sequence[Sequence[float]]) -> float:
    """The same for one further seed of every group, for all of its values jointly (Bonferroni)."""
    return prediction_half_width(groups, 1 - (1 - COVERAGE) / len(groups))


def compare_run(folder: Path) -> list[Point]:
    """Every figure of a finished run that the study also has.

    Raises:
      UserError: not a finished run, or one that the study does not have.
    """
    run = _load_run(folder)
    config = run.manifest.get("config") or {}
    if run.condition not in study.CONDITIONS:
        raise UserError(f"{folder}: the study has no condition {run.condition!r}")
    if (config.get("data") or {}).get("train_rows") == study.SELECTION_ROWS:
        return _trial_points(run)
    return [*_run_points(run), *evaluation_points(folder / "evaluation", run.condition, "GSM8K")]


def _load_run(folder: Path) -> Run:
    manifest, summary = read_manifest(folder), read_summary(folder)
    if summary.get("status") != "completed":
        raise UserError(f"{folder}: this run is {summary.get('status')}; compare it when it is finished")
    metrics = tuple(read_metrics(folder))
    condition, seed = str(summary.get("condition")), summary.get("seed")
    return Run(folder.name, folder, Setting(condition), seed, manifest, metrics, summary, {})


def _run_points(run: Run) -> list[Point]:
    condition, summary = run.condition, run.summary
    adapter = run.adapter() or {}
    points = [
        exactly("training tokens", summary.get("train_token_count"), study.TRAIN_TOKENS),
        exactly("validation tokens", summary.get("validation_token_count"), study.VALIDATION_TOKENS),
        exactly("adapter parameters", adapter.get("parameters"), study.PARAMETERS[condition]),
        exactly("adapter file bytes", adapter.get("bytes"), study.ADAPTER_BYTES[condition]),
        *_first_steps(run, losses=1),
    ]
    nll, seeds = run.validation_nll(), list(study.VALIDATION_NLL[condition].values())
    columns = list(zip(*seeds, strict=True))
    half_width = together_half_width(columns)
    for step, values in zip(study.VALIDATION_STEPS, columns, strict=True):
        points.append(over_seeds(f"validation NLL, step {step}", nll.get(step), values, half_width))
    selected = select_checkpoint(nll) if nll else None
    return [*points, exactly("selected step", selected, study.SELECTED_STEP)]


def _trial_points(run: Run) -> list[Point]:
    """The points of a learning-rate trial."""
    rate = run.learning_rate()
    if rate not in study.SELECTION_NLL[run.condition]:
        raise UserError(f"{run.directory}: the study has no learning-rate trial at {rate}")
    compared = (run.condition, rate) == ("attention_only", 3e-4)
    lowest = min(run.validation_nll().values(), default=None)
    figure = study.SELECTION_NLL[run.condition][rate]
    return [
        exactly("seed", run.seed, study.SELECTION_SEED),
        *_first_steps(run, losses=len(study.FIRST_STEP_LOSSES) if compared else 1),
        within("lowest validation NLL", lowest, figure, SELECTION_MARGIN),
    ]


def _first_steps(run: Run, losses: int) -> list[Point]:
    """Token counts of the first steps, and the first `losses` of their losses."""
    rows = {row["step"]: row for row in run.rows("train")}
    points = []
    for step, tokens in enumerate(study.FIRST_STEP_TOKENS, start=1):
        points.append(exactly(f"tokens of step {step}", rows.get(step, {}).get("token_count"), tokens))
    for step, loss in enumerate(study.FIRST_STEP_LOSSES[:losses], start=1):
        margin = (FIRST_LOSS if step == 1 else EARLY_LOSS) * loss
        points.append(within(f"loss of step {step}", rows.get(step, {}).get("loss"), loss, margin))
    return points


def evaluation_points(folder: Path, condition: str | None, name: str, seed: int | None = None) -> list[Point]:
    """The figures of one evaluation; `condition` None: the untouched base.

    Args:
      seed: compare with this seed's own figures (an adapter of the study), not with the range of all seeds.
    """
    file = folder / "summary.json"
    summary: dict[str, Any] = read_summary(folder) if file.is_file() else {}
    if summary and (summary.get("status") != "completed" or summary.get("condition") != condition):
        raise UserError(f"{file}: not a finished evaluation of {condition or 'the base'}")
    correct, no_box = summary.get("correct_strict"), summary.get("extraction_failures")
    points = [
        exactly(f"{name}: problems", summary.get("total"), study.PROBLEMS),
        exactly(f"{name}: prompt tokens", summary.get("prompt_tokens"), study.PROMPT_TOKENS),
    ]
    margins = [
        prediction_half_width([list(values.values()) for values in figures.values()])
        for figures in (study.CORRECT, study.NO_BOX)
    ]
    for title, ours, figures, base, margin in (
        ("right answers", correct, study.CORRECT, study.BASE_CORRECT, margins[0]),
        ("answers without a box", no_box, study.NO_BOX, study.BASE_NO_BOX, margins[1]),
    ):
        if condition is None:
            points.append(within(f"{name}: {title}", ours, base, margin))
        elif seed is not None:
            points.append(within(f"{name}: {title}", ours, figures[condition][seed], margin))
        else:
            points.append(over_seeds(f"{name}: {title}", ours, list(figures[condition].values()), margin))
    return points


def verdict(points: Sequence[Point]) -> str:
    """One sentence: whether the run agrees, by how many points, and what is missing."""
    counts = {kind: [p for p in points if p.judgement == kind] for kind in ("near", "differs", "missing")}
    compared = len(points) - len(counts["missing"])
    agreed = compared - len(counts["differs"])
    text = f"{agreed} of {compared} points agree"
    if counts["near"]:
        text += (
            f", {len(counts['near'])} of them outside the study's range but within what another seed may do"
        )
    if counts["missing"]:
        text += f"; not compared: {', '.join(p.name for p in counts['missing'])}"
    if counts["differs"]:
        return f"does not agree: {', '.join(p.name for p in counts['differs'])}; {text}"
    return f"agrees: {text}" if compared else f"nothing to compare; {text}"


def agrees(points: Sequence[Point]) -> bool:
    """Whether something was compared and nothing differs."""
    kinds = {point.judgement for point in points}
    return "differs" not in kinds and kinds != {"missing"}


def table(points: Sequence[Point], title: str) -> Table:
    """Each figure next to the study's, for the terminal."""
    colours = {
        "equal": "green",
        "in range": "green",
        "near": "yellow",
        "differs": "bold red",
        "missing": "dim",
    }
    lines = Table(title=title, title_justify="left")
    for name in ("figure", "this run", "the study", "agrees within", ""):
        lines.add_column(name, justify="left" if name in ("figure", "") else "right")
    for p in points:
        figure = _number(p.low) if p.low == p.high else f"{_number(p.low)} to {_number(p.high)}"
        widest = "" if p.widest == (p.low, p.high) else " to ".join(map(_number, p.widest))
        ours = "" if p.ours is None else _number(p.ours)
        colour = colours[p.judgement]
        lines.add_row(p.name, ours, figure, widest, f"[{colour}]{p.judgement}[/]")
    return lines


def _number(value: float) -> str:
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.5f}" if abs(value) < 10 else f"{value:,.1f}"
