"""Analyse curves: envelopes over rates, best rates with uncertainty, lines in log step.

    points = envelope({2.6e-4: curve, 5.2e-4: curve})       # the lowest loss at each step, and its rate
    best = best_rate({2.6e-4: 1.02, 5.2e-4: 1.0, 1.04e-3: 1.03}, scatter=0.001)
    best.rate, best.low, best.high                          # of a parabola in log rate
    ratio(best, other)                                      # with an interval
    line_in_log(points), departure(points, reference, by=0.002)

Nothing is smoothed. Whatever the data do not support is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jaxlora.runtime.errors import UserError

DRAWS = 2000  # samples of the noise between repeats, for intervals
Curve = Sequence[tuple[int, float]]  # step, held-out loss


@dataclass(frozen=True)
class Point:
    """The lowest loss over rates at a step, and the rate that has it."""

    step: int
    loss: float
    rate: float


def envelope(curves: Mapping[float, Curve], diverged: frozenset[float] = frozenset()) -> list[Point]:
    """The pointwise minimum over rates; ties go to the lower rate.

    Args:
      curves: by rate.
      diverged: rates whose curve ends early; they count as far as they go.

    Raises:
      UserError: the curves were evaluated at different steps.
    """
    if not curves:
        return []
    whole = {rate: curve for rate, curve in curves.items() if rate not in diverged} or curves
    grid = max(([step for step, _ in curve] for curve in whole.values()), key=len)
    for rate, curve in curves.items():
        steps = [step for step, _ in curve]
        if steps != grid[: len(steps)] or (rate not in diverged and len(steps) < len(grid)):
            odd = next(iter(sorted(set(steps) ^ set(grid))), None)
            raise UserError(
                f"the curve of rate {rate:g} has other steps than the others (step {odd}), so they have no"
                " common minimum; make its run again with the same config.regret.looks and marks"
            )
    points = []
    for place, step in enumerate(grid):
        here = [(curve[place][1], rate) for rate, curve in curves.items() if place < len(curve)]
        loss, rate = min(here)
        points.append(Point(step, loss, rate))
    return points


@dataclass(frozen=True)
class BestRate:
    """A best rate. `draws` are samples of its log2, given the scatter between repeats."""

    rate: float  # at the parabola's minimum
    on_grid: float  # the rate tried that has the lowest loss
    loss: float  # of `on_grid`
    low: float | None  # of a 95 % interval; None: no repeats, or on an edge
    high: float | None
    edge: str | None  # "low" or "high" if the best rate is the last of the grid
    draws: np.ndarray | None = None


def best_rate(losses: Mapping[float, float], scatter: float | None = None, seed: int = 0) -> BestRate | None:
    """The minimum of a parabola through the three points around the lowest one, in log rate.

    Args:
      losses: by rate; not finite where a run diverged.
      scatter: standard deviation of the loss between repeats; the interval comes from repeating this estimate
        on losses with that much added noise.

    Returns:
      None if no loss is finite. On an edge, the edge itself, without an interval.
    """
    rates = sorted(losses)
    values = np.array([losses[rate] if math.isfinite(losses[rate]) else np.inf for rate in rates])
    if not np.isfinite(values).any():
        return None
    logs = np.log2(rates)
    place = int(np.argmin(values))
    edge = "low" if place == 0 else "high" if place == len(rates) - 1 else None
    draws = None
    if scatter is not None and edge is None:
        noise = np.random.default_rng(seed).normal(0, scatter, (DRAWS, len(rates)))
        draws = np.array([_vertex(logs, values + one) for one in noise])
    low, high = (None, None) if draws is None else (float(2**x) for x in np.quantile(draws, (0.025, 0.975)))
    vertex = float(2 ** _vertex(logs, values))
    return BestRate(vertex, rates[place], float(values[place]), low, high, edge, draws)


def _vertex(logs: np.ndarray, values: np.ndarray) -> float:
    """Log2 of the parabola's minimum; on an edge or next to a diverged run, of the lowest point itself."""
    place = int(np.argmin(values))
    if place in (0, len(values) - 1):
        return float(logs[place])
    x, y = logs[place - 1 : place + 2], values[place - 1 : place + 2]
    if not np.isfinite(y).all():
        return float(x[1])
    left, right = (y[0] - y[1]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if left + right <= 0:  # all three equal
        return float(x[1])
    # Where the slope, interpolated between the midpoints of the two chords, is zero.
    middle_left, middle_right = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2
    found = middle_left + (middle_right - middle_left) * left / (left + right)
    return float(np.clip(found, x[0], x[2]))


@dataclass(frozen=True)
class Ratio:
    """The ratio of two best rates, with a 95 % interval if both have one."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def ratio(first: BestRate | None, second: BestRate | None) -> Ratio | None:
    """The ratio of two best rates; None if either is on an edge of its grid and so not known to be best."""
    if first is None or second is None or first.edge or second.edge:
        return None
    value = first.rate / second.rate
    if first.draws is None or second.draws is None:
        return Ratio(value, None, None)
    # Both were drawn with the same noise; rotating one makes them independent.
    low, high = np.quantile(first.draws - np.roll(second.draws, DRAWS // 2), (0.025, 0.975))
    return Ratio(value, float(2**low), float(2**high))


@dataclass(frozen=True)
class Line:
    """loss = a + b ln(step), fitted by least squares; `r2` is the fraction of variance explained."""

    a: float
    b: float
    r2: float
    steps: tuple[int, int]


def line_in_log(points: Sequence[Point], first: int = 1) -> Line | None:
    """The line through the points from step `first` on; None for fewer than three points."""
    chosen = [point for point in points if point.step >= max(first, 1)]
    if len(chosen) < 3:
        return None
    x, y = np.log([p.step for p in chosen]), np.array([p.loss for p in chosen])
    b, a = np.polyfit(x, y, 1)
    spread = float(np.sum((y - y.mean()) ** 2))
    r2 = 1 - float(np.sum((y - a - b * x) ** 2)) / spread if spread else 1.0
    return Line(float(a), float(b), r2, (chosen[0].step, chosen[-1].step))


def departure(points: Sequence[Point], reference: Sequence[Point], by: float) -> int | None:
    """The step from which a curve stays more than `by` above the reference; None if it does not at the end.

    Raises:
      UserError: the two have different steps.
    """
    if [p.step for p in points] != [p.step for p in reference]:
        raise UserError(
            "two envelopes with different steps cannot be compared; make both with the same looks"
        )
    left = None
    for point, other in zip(points, reference, strict=True):
        if point.loss - other.loss <= by:
            left = None
        elif left is None:
            left = point.step
    return left


def pooled_scatter(cells: Sequence[Mapping[Hashable, float]]) -> float | None:
    """Standard deviation of a run's loss between repeats, widened for few repeats; None without any.

    It is multiplied by the ratio of the 97.5% quantiles of Student's t and the normal distribution, so that
    two standard errors mean the same after few repeats as after many: by 1.42 for 4 degrees of freedom, by
    1.07 for 18.

    What cells have in common is removed: a row order that is hard for all of them does not affect differences
    between them. The scatter is the residual of a least-squares fit with one number per cell and one per
    common name.

    Args:
      cells: losses of each cell's repeats, keyed by what they share with those of other cells.
    """
    own = [cell for cell in cells if len(cell) > 1]
    if not own:
        return None
    counts = Counter(name for cell in own for name in cell)
    common = [name for name, count in counts.items() if count > 1]
    rows = [(place, name, loss) for place, cell in enumerate(own) for name, loss in cell.items()]
    parts = [
        [float(place == i) for i in range(len(own))] + [float(name == one) for one in common]
        for place, name, _ in rows
    ]
    design, losses = np.array(parts), np.array([loss for *_, loss in rows])
    fitted, _, rank, _ = np.linalg.lstsq(design, losses, rcond=None)
    freedom = len(rows) - rank
    if freedom < 1:
        return None
    deviation = np.sqrt(np.sum(np.square(losses - design @ fitted)) / freedom)
    return float(deviation * stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975))


def slope(x: Sequence[float], y: Sequence[float], noise: float | None) -> tuple[float, float | None]:
    """The slope of a least-squares line, and its standard error from the noise of each y (None: unknown)."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    spread = float(np.sum((xs - xs.mean()) ** 2))
    value = float(np.sum((xs - xs.mean()) * (ys - ys.mean())) / spread)
    return value, None if noise is None else noise / math.sqrt(spread)
