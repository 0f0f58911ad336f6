"""Plots of an experiment that learns from rewards: accuracy by step, over rates, and bits.

for name, draw in FIGURES.items():
    save(draw(sweeps), folder / f"{name}.png")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from jaxlora.regret.capacity import BITS_PER_PARAMETER
from jaxlora.regret.drawings import canvas, legend, looks_of
from jaxlora.regret.rewards.findings import (
    KEPT_GAIN,
    accuracies,
    bits_available,
    bits_learned,
    mean_curve,
    plateau,
    start_of,
)
from jaxlora.regret.sweeps import Sweep

SMOOTH = 5  # batches averaged into one point


def draw_accuracy(sweeps: Sequence[Sweep]) -> Figure:
    """At the best rate: held-out accuracy with its range over seeds, and right answers in the batches."""
    figure, (left, right) = canvas("Held-out accuracy at the best rate", 2)
    looks = looks_of(sweeps)
    for sweep in sweeps:
        runs, curve = sweep.at_best, mean_curve(sweep)
        if not curve:
            continue
        look = looks[sweep.label]
        left.plot(*zip(*curve.items(), strict=True), **look, linewidth=1.2, markersize=4, label=sweep.name)
        spread = [[1 - dict(_pairs(run))[step] for run in runs] for step in curve]
        low, high = zip(*map(_ends, spread), strict=True)
        left.fill_between(list(curve), low, high, color=look["color"], alpha=0.12)
        rewards = [run["train"]["correct"] for run in runs]
        n = min(map(len, rewards))
        mean = np.mean([one[:n] for one in rewards], axis=0)
        chunks = [(i, mean[i : i + SMOOTH].mean()) for i in range(0, n, SMOOTH)]
        right.plot(
            [i + SMOOTH / 2 for i, _ in chunks], [y for _, y in chunks], **look, linewidth=1.2, markersize=3
        )
    left.set_ylabel("accuracy (temperature 0); bands: these seeds")
    right.set_title(f"Right answers of the batches, means of {SMOOTH} steps")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_ylim(0, 1)
    legend(figure, left)
    return figure


def _pairs(record: dict) -> list[tuple[int, float]]:
    return [(step, wrong) for step, wrong, _ in record["held_out"]]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def draw_rates(sweeps: Sequence[Sweep]) -> Figure:
    """Final accuracy over the rate, and over the rate as a multiple of each arm's best."""
    figure, (left, right) = canvas("Held-out accuracy at the end, first seed", 2)
    looks, start = looks_of(sweeps), start_of(sweeps)
    for sweep in sweeps:
        found = accuracies(sweep)
        best = max(found, key=lambda rate: found[rate])
        look = looks[sweep.label] | {"linewidth": 1.2, "markersize": 5}
        left.plot(list(found), list(found.values()), **look, label=sweep.name)
        right.plot([rate / best for rate in found], [value - start for value in found.values()], **look)
        if (width := plateau(found, start)) is not None:
            bar = KEPT_GAIN * (found[best] - start)
            right.plot(
                [width.low / best, width.high / best], [bar, bar], color=look["color"], linewidth=3, alpha=0.4
            )
    left.axhline(start, color="#666666", linewidth=0.8, linestyle=":")
    left.set_xlabel("learning rate (logarithmic); dotted: the start")
    right.set_xlabel("rate over the arm's best (logarithmic)")
    left.set_ylabel("accuracy (temperature 0)")
    left.set_ylim(0, 1)
    right.set_title("Gain (bars: rates that keep 80 % of it)")
    for axes in (left, right):
        axes.set_xscale("log")
    legend(figure, left)
    return figure


def draw_bits(sweeps: Sequence[Sweep]) -> Figure:
    """What the adapter can hold, what a run's rewards could teach, and what was learned, by arm."""
    figure, (axes,) = canvas("Bits at the best rate")
    for x, sweep in enumerate(sweeps):
        runs = sweep.at_best
        axes.plot(x, BITS_PER_PARAMETER * sweep.parameters, "_", markersize=22, color="#111111")
        axes.plot([x] * len(runs), [bits_available(run) for run in runs], "o", color="#0B4F8A")
        axes.plot([x] * len(runs), [max(1.0, bits_learned(run)) for run in runs], "^", color="#B5541C")
    axes.plot([], [], "_", markersize=14, color="#111111", label="room: 2 bits a parameter")
    axes.plot([], [], "o", color="#0B4F8A", label="available in the rewards")
    axes.plot([], [], "^", color="#B5541C", label="learned")
    axes.set_yscale("log")
    axes.set_xticks(range(len(sweeps)), [sweep.name for sweep in sweeps])
    axes.set_ylabel("bits (logarithmic)")
    legend(figure, axes)
    return figure


FIGURES: dict[str, Callable[[Sequence[Sweep]], Figure]] = {
    "accuracy": draw_accuracy,
    "rates": draw_rates,
    "bits": draw_bits,
}
