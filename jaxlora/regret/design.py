"""The runs of an experiment: arms at rates a factor of 2 apart, more rates at edges, and repeats.

    cells = cells_of(config, model)                    # the arms, each with the middle of its rates
    wanted = next_runs(config.regret, cells, losses)   # what is left to do, given the results so far

There is no stored state: the remaining runs follow from the configuration and the results so far, so any
number of processes, on one machine after another, arrive at the same runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxlora.config import RegretConfig, RunConfig
from jaxlora.models.spec import ModelConfig
from jaxlora.regret.arms import Arm, parse_arms
from jaxlora.study.grid import rate as shown_rate
from jaxlora.train.rates import published_rate
from jaxlora.train.schedule import plan_run

# Final held-out loss by (cell, rate, seed) at each mark; infinite where a run diverged.
Losses = Mapping["RunId", Mapping[int, float]]
# The ends of a finished grid, `low` or `high`, that need more rates in addition to edges with a best rate.
Ends = Callable[[Sequence["RunId"]], set[str]]


@dataclass(frozen=True)
class Cell:
    """An arm and the middle of its learning rates; each cell gets a learning-rate sweep of its own."""

    arm: Arm
    middle: float  # of its rates
    factor: float = 2.0  # from one rate to the next

    @property
    def batch_rows(self) -> int:
        return self.arm.batch_rows

    @property
    def label(self) -> str:
        return f"{self.arm.label}-b{self.batch_rows}"

    def rate(self, place: int) -> float:
        """The rate `place` grid steps above the middle."""
        return self.middle * self.factor**place


@dataclass(frozen=True)
class RunId:
    """One run: a cell, the position of its rate in grid steps above the cell's middle, and a seed."""

    cell: Cell
    place: int
    seed: int

    @property
    def rate(self) -> float:
        return self.cell.rate(self.place)

    @property
    def name(self) -> str:
        return f"{self.cell.label}-lr{shown_rate(self.rate)}-s{self.seed}"


def cells_of(config: RunConfig, model: ModelConfig) -> list[Cell]:
    """A cell for every arm; the middle of its rates is configured, or given by the published formula.

    Raises:
      UserError: an arm is not understood or impossible, or no rate is published for the family.
    """
    regret = config.regret
    middles = {}
    arms = parse_arms(regret.arms, model, config.train.batch_rows, config.lora.alpha)
    for what, given in (("lora", regret.lora_rate), ("full", regret.full_rate)):
        if any(arm.what == what for arm in arms):
            middles[what] = _two_digits(given or published_rate(model, what))  # type: ignore[arg-type]
    return [Cell(arm, middles[arm.what], regret.factor) for arm in arms]


def _two_digits(value: float) -> float:
    """Round a rate to two digits, so that run names contain it exactly."""
    return float(f"{value:.1e}")


def steps_of(config: RunConfig, arm: Arm, train_rows: int) -> int:
    """Steps of one run of an arm over `train_rows` rows."""
    return plan_run(config.optim, replace(config.train, batch_rows=arm.batch_rows), train_rows).total_steps


def places_of(regret: RegretConfig) -> range:
    """The rates of a grid before it is extended, in steps above the cell's middle."""
    low = -((regret.rates - 1) // 2)
    return range(low, low + regret.rates)


def next_runs(
    regret: RegretConfig, cells: Sequence[Cell], losses: Losses, seed: int = 0, ends: Ends | None = None
) -> list[RunId]:
    """The runs still to be made, as far as is known now; if there are none, the experiment is complete."""
    return [run for cell in cells for run in wanted(regret, cell, losses, seed, ends) if run not in losses]


def wanted(
    regret: RegretConfig, cell: Cell, losses: Losses, seed: int = 0, ends: Ends | None = None
) -> list[RunId]:
    """All runs of a cell known to be needed: its grid, the rates added at its edges, and the repeats.

    Rates are added while the best one, at the end or at a mark, is the lowest or highest of the grid, up to
    `extend` of them. Repeats use other seeds at the rate that is best at the end.
    """
    first = places_of(regret)
    low, high = first[0], first[-1]
    while True:
        grid = [RunId(cell, place, seed) for place in range(low, high + 1)]
        if any(run not in losses for run in grid):
            return grid
        edges = edges_of(grid, losses) | (ends(grid) if ends is not None else set())
        if not edges or high - low + 1 - regret.rates >= regret.extend:
            break
        if "high" in edges:
            high += 1
        else:
            low -= 1
    best = best_run(grid, losses)
    if best is None:
        return grid
    return grid + [RunId(cell, best.place, seed + 1 + extra) for extra in range(regret.repeats)]


def edges_of(grid: Sequence[RunId], losses: Losses) -> set[str]:
    """The edges of the grid, `low` or `high`, that have the best rate at the end or at any mark."""
    found = set()
    for mark in marks_of(grid, losses):
        best = best_run(grid, losses, mark)
        if best is None or best.place == grid[0].place:  # if all diverged, only lower rates can help
            found.add("low")
        elif best.place == grid[-1].place:
            found.add("high")
    return found


def marks_of(grid: Sequence[RunId], losses: Losses) -> list[int]:
    """The steps at which best rates are determined: those recorded by every run of the grid."""
    return sorted(set.intersection(*(set(losses[run]) for run in grid)))


def best_run(grid: Sequence[RunId], losses: Losses, mark: int | None = None) -> RunId | None:
    """The run with the lowest loss at a mark (None: the last); ties go to the lower rate.

    None if no loss is finite.
    """
    mark = marks_of(grid, losses)[-1] if mark is None else mark
    finite = [(losses[run][mark], run.place, run) for run in grid if math.isfinite(losses[run][mark])]
    return min(finite, key=lambda one: one[:2])[2] if finite else None
