"""The results of an experiment, cell by cell: curves, envelopes, best rates, repeats.

sweeps = sweeps_of(records)          # of jaxlora.regret.results; nothing else is needed
scatter = scatter_of(sweeps)         # between repeats, in nats
sweep = find(sweeps, rank=16)
sweep.envelope, sweep.best(scatter), sweep.final(scatter)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxlora.regret.fits import BestRate, Curve, Point, best_rate, envelope, pooled_scatter
from jaxlora.runtime.files import Record


@dataclass(frozen=True)
class Final:
    """The loss of a cell at its best rate: the mean over seeds, and its standard error (None: unknown)."""

    mean: float
    error: float | None
    seeds: int


@dataclass(frozen=True)
class Sweep:
    """All runs of one cell.

    With `fresh`, the first seed is left out of the cell's final loss if there are others. It chose the rate,
    so its loss there is biased towards lucky runs.
    """

    label: str
    placement: str
    rank: int | None
    parameters: int
    batch_rows: int
    records: tuple[Record, ...]
    fresh: bool = False

    @property
    def full(self) -> bool:
        return self.rank is None

    @property
    def steps(self) -> int:
        return int(self.records[0]["steps"])

    @property
    def name(self) -> str:
        """The name in tables and legends."""
        return "full" if self.full else f"{self.placement} r{self.rank}"

    @cached_property
    def grid(self) -> dict[float, Record]:
        """The runs of the first seed, by rate."""
        first = min(record["seed"] for record in self.records)
        return {record["rate"]: record for record in self.records if record["seed"] == first}

    @property
    def curves(self) -> dict[float, Curve]:
        """Held-out loss per weighted token, by rate, without step 0."""
        return {
            rate: [(step, loss) for step, loss, _ in record["held_out"] if step > 0]
            for rate, record in self.grid.items()
        }

    @cached_property
    def envelope(self) -> list[Point]:
        diverged = frozenset(rate for rate, r in self.grid.items() if r["diverged_at"] is not None)
        return envelope(self.curves, diverged)

    def losses(self, step: int | None = None) -> dict[float, float]:
        """Held-out loss by rate at a step (None: the last); infinite once diverged."""
        step = self.steps if step is None else step
        return {rate: dict(curve).get(step, math.inf) for rate, curve in self.curves.items()}

    def best(self, scatter: float | None, step: int | None = None) -> BestRate | None:
        return best_rate(self.losses(step), scatter)

    @cached_property
    def on_edge(self) -> bool:
        """Whether the best rate is the lowest or highest of the grid, or there is none."""
        best = self.best(None)
        return best is None or best.edge is not None

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """Last losses at the best rate tried, by seed; empty if no run finished."""
        return {record["seed"]: record["held_out"][-1][1] for record in self.at_best}

    @cached_property
    def at_best(self) -> list[Record]:
        """The finished runs at the best rate tried, sorted by seed; see `fresh`."""
        best = self.best(None)
        if best is None:
            return []
        found = sorted(
            (r for r in self.records if r["rate"] == best.on_grid and r["diverged_at"] is None),
            key=lambda record: record["seed"],
        )
        return found[1:] if self.fresh and len(found) > 1 else found

    @property
    def repeats(self) -> list[float]:
        """The values of `by_seed` as a list."""
        return list(self.by_seed.values())

    def final(self, scatter: float | None) -> Final | None:
        """The final loss; None if no run finished."""
        if not (found := self.repeats):
            return None
        error = None if scatter is None else scatter / math.sqrt(len(found))
        return Final(sum(found) / len(found), error, len(found))

    @property
    def best_record(self) -> Record | None:
        best = self.best(None)
        return None if best is None else self.grid[best.on_grid]


def sweeps_of(records: Iterable[Record], fresh: bool = False) -> list[Sweep]:
    """The cells that have results: full fine-tuning first, then by placement, rank and batch size.

    `fresh` is as in `Sweep`.
    """
    cells: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        cells.setdefault((record["arm"], record["batch_rows"]), []).append(record)
    found = [
        Sweep(arm, own[0]["placement"], own[0]["rank"], own[0]["parameters"], rows, tuple(own), fresh)
        for (arm, rows), own in cells.items()
    ]
    return sorted(found, key=lambda s: (s.batch_rows, not s.full, s.placement, s.rank or 0))


def scatter_of(sweeps: Sequence[Sweep]) -> float | None:
    """Standard deviation of a run's last loss between seeds, pooled over cells; None without repeats.

    What a seed has in common across all cells of a batch size is removed, and the result is widened for few
    repeats, as in `pooled_scatter`.
    """
    return pooled_scatter(
        [{(sweep.batch_rows, seed): loss for seed, loss in sweep.by_seed.items()} for sweep in sweeps]
    )


def find(
    sweeps: Sequence[Sweep], rank: int | None, placement: str = "all_layer", batch_rows: int | None = None
) -> Sweep | None:
    """The sweep of a rank (None: full fine-tuning), at this batch size or the most common one."""
    rows = main_batch(sweeps) if batch_rows is None else batch_rows
    for sweep in sweeps:
        if sweep.batch_rows == rows and sweep.rank == rank and (rank is None or sweep.placement == placement):
            return sweep
    return None


def main_batch(sweeps: Sequence[Sweep]) -> int | None:
    """The most common batch size among the cells."""
    sizes = [sweep.batch_rows for sweep in sweeps]
    return max(sizes, key=lambda size: (sizes.count(size), -size)) if sizes else None


def ranks_of(sweeps: Sequence[Sweep], placement: str = "all_layer") -> list[Sweep]:
    """The sweeps of one placement at the main batch size, by rank."""
    rows = main_batch(sweeps)
    found = [s for s in sweeps if s.placement == placement and s.batch_rows == rows]
    return sorted(found, key=lambda s: s.rank or 0)
