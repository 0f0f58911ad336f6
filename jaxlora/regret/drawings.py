"""Plots of an experiment: learning curves, losses over rates, batch sizes, placements, ratios.

    for name, draw in FIGURES.items():
        figure = draw(sweeps, scatter)       # None where there is nothing to draw
        save(figure, folder / f"{name}.png")

Colours go from light to dark with the rank; full fine-tuning is black and dashed. Each line has a marker of
its own. Loss axes do not begin at zero, because differences of a hundredth of a nat matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from jaxlora.regret.findings import batch_gaps, matched, rate_ratio
from jaxlora.regret.sweeps import Sweep, find, main_batch, ranks_of
from jaxlora.study.figures import own_style

Drawing = Callable[[Sequence[Sweep], float | None], Figure | None]
_MARKERS = "osD^vP*Xph<>"
_Look = dict[str, Any]
_FULL: _Look = {"color": "#111111", "linestyle": "--", "marker": "x"}
_LOSS = "held-out loss, nats a token\n(axis does not begin at zero)"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without dates, in the style of the study's figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with own_style():
        figure.savefig(path, dpi=130, metadata={"Software": None})


def styled(draw: Drawing, sweeps: Sequence[Sweep], scatter: float | None) -> Figure | None:
    """Draw in the style of the study's figures."""
    with own_style():
        return draw(sweeps, scatter)


def looks_of(sweeps: Sequence[Sweep]) -> dict[str, _Look]:
    """Colour and marker for each label: full fine-tuning is special, the others go from light to dark."""
    others = [s.label for s in sweeps if not s.full]
    looks: dict[str, _Look] = {"full": _FULL}
    for place, label in enumerate(others):
        shade = 0.15 + 0.75 * (place / max(1, len(others) - 1))
        color = colormaps["viridis_r"](shade)
        looks[label] = {"color": color, "marker": _MARKERS[place % len(_MARKERS)], "linestyle": "-"}
    return looks


def canvas(title: str, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.6 if columns == 1 else 11.0, 4.6), layout="constrained")
    axes = [figure.add_subplot(1, columns, place + 1) for place in range(columns)]
    axes[0].set_title(title)
    return figure, axes


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def _name(sweep: Sweep) -> str:
    """The legend entry; it marks a best rate on an edge, for which the loss is only an upper bound."""
    return f"{sweep.name} (edge)" if sweep.on_edge else sweep.name


def _curves(axes: Axes, sweeps: Sequence[Sweep]) -> None:
    """Envelopes over a logarithmic step axis."""
    looks = looks_of(sweeps)
    for sweep in sweeps:
        x, y = [p.step for p in sweep.envelope], [p.loss for p in sweep.envelope]
        axes.plot(x, y, **looks[sweep.label], linewidth=1.2, markersize=4, label=_name(sweep))
    _step_axis(axes)
    axes.set_ylabel(_LOSS)


def _step_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("step (logarithmic)")


def _numbers(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def draw_ranks(sweeps: Sequence[Sweep], scatter: float | None) -> Figure | None:
    """Learning curves of all ranks, and how far each is above the best one."""
    own = _ranks_and_full(sweeps)
    if len(own) < 2:
        return None
    figure, (left, right) = canvas("Lowest loss over rates, by step", 2)
    _curves(left, own)
    looks = looks_of(own)
    lowest = [min(p.loss for p in points) for points in zip(*(s.envelope for s in own), strict=True)]
    for sweep in own:
        x = [p.step for p in sweep.envelope]
        y = [p.loss - low for p, low in zip(sweep.envelope, lowest, strict=True)]
        right.plot(x, y, **looks[sweep.label], linewidth=1.2, markersize=4)
    _step_axis(right)
    right.set_title("Above the lowest of all, nats a token")
    right.set_ylim(bottom=0)
    legend(figure, left)
    return figure


def _ranks_and_full(sweeps: Sequence[Sweep]) -> list[Sweep]:
    full = find(sweeps, None)
    return [*([full] if full else []), *ranks_of(sweeps)]


def draw_rates(sweeps: Sequence[Sweep], scatter: float | None) -> Figure | None:
    """The last loss over the rate, for every rank; the parabola's minimum is circled."""
    own = _ranks_and_full(sweeps)
    return _over_rates(own, scatter, "Last loss over the learning rate, by rank") if own else None


def _over_rates(own: Sequence[Sweep], scatter: float | None, title: str) -> Figure:
    own = [sweep for sweep in own if sweep.best(scatter) is not None]  # omit arms that diverged
    figure, (axes,) = canvas(title)
    looks, lowest, ends = looks_of(own), [], []
    for sweep in own:
        losses = {rate: loss for rate, loss in sorted(sweep.losses().items()) if math.isfinite(loss)}
        axes.plot(*zip(*losses.items(), strict=True), **looks[sweep.label], linewidth=1.2, markersize=5)
        axes.plot([], [], **looks[sweep.label], label=_name(sweep))
        lowest += [min(losses.values())]
        ends += [sorted(losses.values())[min(2, len(losses) - 1)]]
        if (best := sweep.best(scatter)) and not best.edge:
            axes.plot(best.rate, best.loss, "o", markersize=12, markerfacecolor="none", color="#111111")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    room = max(max(ends) - min(lowest), 0.01)
    axes.set_ylim(min(lowest) - 0.05 * room, max(ends) + 0.6 * room)  # diverging runs extend beyond the top
    axes.set_xlabel("learning rate (logarithmic)")
    axes.set_ylabel(_LOSS)
    legend(figure, axes)
    return figure


def draw_best_rates(sweeps: Sequence[Sweep], scatter: float | None) -> Figure | None:
    """The best rate of every rank with its interval, against ten times that of full fine-tuning."""
    ranks, full = ranks_of(sweeps), find(sweeps, None)
    known = [(s.rank or 0, best) for s in ranks if (best := s.best(scatter)) is not None and not best.edge]
    if len(known) < 2:
        return None
    figure, (axes,) = canvas("Best learning rate by rank")
    for rank, best in known:
        axes.plot(rank, best.rate, "o", color="#0B4F8A")
        if best.low is not None and best.high is not None:
            axes.plot([rank, rank], [best.low, best.high], color="#0B4F8A", linewidth=1.2)
    whole = full.best(scatter) if full else None
    if whole and not whole.edge:
        axes.axhline(
            10 * whole.rate, color="#111111", linestyle="--", label="ten times that of full fine-tuning"
        )
        if whole.low and whole.high:
            axes.axhspan(10 * whole.low, 10 * whole.high, color="#DDDDDD", zorder=0)
        axes.legend(fontsize=9)
    axes.set_xscale("log", base=2)
    _numbers(axes)
    axes.set_xlabel("rank")
    axes.set_ylabel("best learning rate (95 % interval from repeats)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def draw_batches(sweeps: Sequence[Sweep], scatter: float | None) -> Figure | None:
    """The last loss over the batch size, and the gap of each rank to full fine-tuning."""
    main = main_batch(sweeps)
    ranks = sorted({s.rank for s in sweeps if s.rank is not None and s.batch_rows != main})
    if not ranks:
        return None
    figure, (left, right) = canvas("Last loss at each cell's best rate", 2)
    sizes = sorted({s.batch_rows for s in sweeps})
    for place, rank in enumerate([None, *ranks]):
        own = [s for size in sizes if (s := find(sweeps, rank, batch_rows=size)) is not None]
        finals = [
            (s.batch_rows, final.mean)
            for s in own
            if not s.on_edge and (final := s.final(scatter)) is not None
        ]
        if not finals:
            continue
        look: _Look = _FULL if rank is None else {"color": f"C{place}", "marker": _MARKERS[place]}
        name = "full" if rank is None else f"r{rank}"
        left.plot(*zip(*finals, strict=True), **look, label=name)
        gaps = {} if rank is None else batch_gaps(sweeps, rank, scatter)
        if gaps:
            values, errors = zip(*gaps.values(), strict=True)
            right.errorbar(list(gaps), values, [2 * e for e in errors], **look, capsize=3)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows a step (logarithmic)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_ylabel(_LOSS)
    right.axhline(0, color="#666666", linewidth=0.8)
    right.set_title("LoRA minus full (bars: 2 standard errors)")
    legend(figure, left)
    return figure


def _placed(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """The placements other than all layers, plus all layers at the same ranks or parameter counts."""
    rows = main_batch(sweeps)
    other = [s for s in sweeps if s.batch_rows == rows and not s.full and s.placement != "all_layer"]
    ranks = {s.rank for s in other}
    equal = {both.label for s in other for _, both in matched(sweeps, s.placement, "all_layer")}
    every = [s for s in ranks_of(sweeps) if s.rank in ranks or s.label in equal]
    return [*every, *other] if other else []


def draw_placements(sweeps: Sequence[Sweep], scatter: float | None) -> Figure | None:
    """Placements of adapters: the last part of the learning curves, and the last losses over seeds."""
    own = _placed(sweeps)
    if len(own) < 2:
        return None
    figure, (left, right) = canvas("Lowest loss over rates, by step", 2)
    late = [s for s in own if len(s.envelope) > 1]
    _curves(left, late)
    middle = max(1, len(late[0].envelope) // 2)
    low, high = (f(p.loss for s in late for p in s.envelope[middle:]) for f in (min, max))
    left.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    left.set_xlim(left=late[0].envelope[middle].step)
    looks = looks_of(own)
    for y, sweep in enumerate(own):
        right.plot(sweep.repeats, [y] * len(sweep.repeats), looks[sweep.label]["marker"], color="#0B4F8A")
    right.set_yticks(range(len(own)), [f"{_name(s)}, {s.parameters / 1e6:.1f} M" for s in own])
    right.invert_yaxis()
    right.set_xlabel("last loss at the best rate, every seed\n(axis does not begin at zero)")
    legend(figure, left)
    return figure


def draw_placement_rates(sweeps: Sequence[Sweep], scatter: float | None) -> Figure | None:
    """The last loss over the rate, for every placement."""
    own = _placed(sweeps)
    return _over_rates(own, scatter, "Last loss over the learning rate, by placement") if own else None


def draw_ratios(sweeps: Sequence[Sweep], scatter: float | None) -> Figure | None:
    """The ratio of best rates, LoRA over full, by step: the first steps of a run amount to a short run."""
    figure, (axes,) = canvas("Best rate of LoRA over that of full fine-tuning, by length of the run")
    drawn = False
    for place, rank in enumerate((4, 16, 64, 256)):
        if (sweep := find(sweeps, rank)) is None:
            continue
        steps = [p.step for p in sweep.envelope]
        found = [(step, one) for step in steps if (one := rate_ratio(sweeps, scatter, rank, step))]
        if not found:
            continue
        drawn = True
        shift = 1 + 0.03 * (place - 1.5)
        x, y = [step * shift for step, _ in found], [one.value for _, one in found]
        axes.plot(x, y, f"{_MARKERS[place]}-", color=f"C{place}", linewidth=1, label=f"r{rank}")
        for at, (_, one) in zip(x, found, strict=True):
            if one.low is not None and one.high is not None:
                axes.plot([at, at], [one.low, one.high], color=f"C{place}", linewidth=1)
    if not drawn:
        return None
    axes.axhline(10, color="#666666", linewidth=0.8, linestyle=":")
    axes.axhline(15, color="#666666", linewidth=0.8, linestyle=":")
    _step_axis(axes)
    _numbers(axes)
    axes.set_xlabel("step (logarithmic); dotted: 10 and 15")
    axes.set_ylabel("ratio (bars: 95 % interval)")
    axes.legend(fontsize=9)
    return figure


FIGURES: dict[str, Drawing] = {
    "ranks": draw_ranks,
    "rates": draw_rates,
    "best-rates": draw_best_rates,
    "batches": draw_batches,
    "placements": draw_placements,
    "placement-rates": draw_placement_rates,
    "ratios": draw_ratios,
}
