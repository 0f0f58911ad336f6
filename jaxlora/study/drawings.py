"""The drawing functions: each turns one `Table` into one matplotlib figure.

    figure = draw_validation_nll(table)      # figure.savefig(...) is for jaxlora.study.figures

Conditions differ in lightness, marker and line style as well as hue, so that they remain distinct in
greyscale and for colour-blind readers. Axes that do not begin at zero say so in their label; bars always
begin at zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxlora.runtime.files import Record
from jaxlora.study import tables
from jaxlora.study.grid import Setting
from jaxlora.study.tables import Table

# Dark, light and middle: distinguishable by lightness alone. The hues are Okabe and Ito's, adjusted.
_KNOWN_LOOKS: dict[str, dict[str, Any]] = {
    "attention_only": {"color": "#0B4F8A", "marker": "o", "linestyle": "-"},
    "all_layer": {"color": "#E08A00", "marker": "s", "linestyle": "--"},
    "mlp_only": {"color": "#009E73", "marker": "^", "linestyle": ":"},
}
_OTHER_LOOKS: list[dict[str, Any]] = [
    {"color": "#5B2A6E", "marker": "D", "linestyle": "-."},
    {"color": "#56B4E9", "marker": "v", "linestyle": (0, (5, 1, 1, 1))},
    {"color": "#222222", "marker": "P", "linestyle": (0, (1, 1))},
]
_MARKERS = "osD^vP*Xph"
FEW = 4  # up to this many lines leave room for a legend and for labels next to points
_INK = "#222222"
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 9}
_NOT_FROM_ZERO = "(axis does not begin at zero)"


# --- Shared parts -------------------------------------------------------------------------------------------


def looks(settings: Iterable[Setting]) -> dict[Setting, dict[str, Any]]:
    """Colour, marker and line style by setting; the study's conditions look the same in every figure.

    Several settings of one condition (such as ranks) share its hue, from dark to light, each with its own
    marker.
    """
    others = cycle(_OTHER_LOOKS)
    by_condition: dict[str, list[Setting]] = {}
    for setting in sorted(set(settings), key=lambda setting: setting.order):
        by_condition.setdefault(setting.condition, []).append(setting)
    found = {}
    for condition, own in by_condition.items():
        look = _KNOWN_LOOKS.get(condition) or next(others)
        for place, setting in enumerate(own):
            found[setting] = look
            if len(own) > 1:
                paler = _mixed(look["color"], 0.65 * place / (len(own) - 1))
                found[setting] = look | {"color": paler, "marker": _MARKERS[place % len(_MARKERS)]}
    return found


def _mixed(color: str, white: float) -> str:
    """The colour mixed with a share of white."""
    return to_hex(tuple(part + (1 - part) * white for part in to_rgb(color)))  # type: ignore[arg-type]


def _canvas(table: Table, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(table.title)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Place the legend inside the axes, or next to them if it would cover the lines."""
    if len(axes.get_legend_handles_labels()[1]) <= FEW + 2:
        axes.legend(fontsize=9)
    else:
        figure.set_size_inches(9.4, max(figure.get_figheight(), 4.4))
        figure.legend(loc="outside right upper", fontsize=8)


def _label_height(axes: Axes, text: str) -> None:
    axes.set_ylabel(f"{text}\n{_NOT_FROM_ZERO}" if axes.get_ylim()[0] > 0 else text)


def _table_looks(table: Table) -> dict[Setting, dict[str, Any]]:
    return looks(row["setting"] for row in table.rows)


def _groups(table: Table, *names: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in table.rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


# --- Drawings -----------------------------------------------------------------------------------------------


def draw_table(table: Table) -> Figure:
    """Draw the table itself, as a picture for slides."""
    cells = [[column.title for column in table.columns], *table.shown()]
    widths = [max(len(row[i]) for row in cells) + 2 for i in range(len(table.columns))]
    figure = Figure(figsize=(max(6.0, 0.088 * sum(widths)), 0.55 + 0.27 * len(cells)))
    axes = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    axes.set_axis_off()
    axes.set_xlim(0, sum(widths))
    axes.set_ylim(len(cells) + 0.3, -1.6)
    axes.text(0.5, -0.9, table.title, weight="bold", size=11, va="center")
    for row, texts in enumerate(cells):
        right = 0.0
        for column, text in enumerate(texts):
            right += widths[column]
            x, align = (0.5, "left") if column == 0 else (right - 0.5, "right")
            axes.text(
                x, row + 0.5, text, ha=align, va="center", size=9, weight="bold" if row == 0 else "normal"
            )
        axes.axhline(row + 1, color="#666666" if row == 0 else "#E6E6E6", linewidth=0.8)
    return figure


def draw_accuracy(table: Table, threshold: float) -> Figure:
    """A dot for every seed and score, a line from minimum to maximum, a tick at the mean."""
    conditions = looks(row["condition"] for row in table.rows if row["condition"])
    figure, axes = _canvas(table, 1.9 + (0.85 if len(conditions) <= FEW else 0.42) * len(conditions))
    scores = (("accuracy", "strict score", -0.16, True), ("accuracy_numeric", "numeric score", 0.16, False))
    values = [row[name] for row in table.rows for name, *_ in scores]
    for y, (condition, look) in enumerate(conditions.items()):
        for name, _, shift, filled in scores:
            seeds = [row[name] for row in table.rows if row["condition"] == condition]
            axes.plot([min(seeds), max(seeds)], [y + shift] * 2, color=look["color"], linewidth=1)
            axes.plot(sum(seeds) / len(seeds), y + shift, "|", color=_INK, markersize=17, markeredgewidth=1.6)
            axes.plot(
                seeds,
                [y + shift] * len(seeds),
                look["marker"],
                color=look["color"],
                markerfacecolor=look["color"] if filled else "white",
                markersize=6.5,
                alpha=0.9,
            )
    for row in table.rows:
        if row["condition"] is None:
            for name, label, _, filled in scores:
                line = "-" if filled else ":"
                axes.axvline(
                    row[name], color=_INK, linestyle=line, linewidth=1.2, label=f"untouched base, {label}"
                )
    high = max(*values, 2 * threshold)
    low = min(*values, high - 2 * threshold)  # room for the ruler, even if all scores are alike
    room = (high - low) * 0.12
    axes.set_xlim(low - room, high + room)
    axes.plot([], [], "o", color=_INK, label="one seed, strict score")
    axes.plot([], [], "o", color=_INK, markerfacecolor="white", label="one seed, numeric score")
    axes.plot(
        [], [], "|", color=_INK, markersize=12, markeredgewidth=1.6, linestyle="", label="mean of the seeds"
    )
    bar = len(conditions) - 0.42
    axes.plot([high - threshold, high], [bar, bar], color=_INK, linewidth=2.5, solid_capstyle="butt")
    axes.text(
        high - threshold - room / 6, bar, f"a difference of {threshold:g}", ha="right", va="center", size=8
    )
    axes.set_ylim(len(conditions) - 0.25, -0.55)
    axes.set_yticks(range(len(conditions)), [str(setting) for setting in conditions])
    axes.grid(axis="y", visible=False)
    note = f" {_NOT_FROM_ZERO}" if axes.get_xlim()[0] > 0 else ""
    axes.set_xlabel(f"share of {table.rows[0]['total']:,} problems answered rightly{note}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def draw_disagreement(table: Table) -> Figure:
    """For each seed, how many problems only one of two conditions got right, on either side of zero."""
    rows = [row for row in table.rows if row["score"] == "strict" and row["seed"] != "all"]
    colors = looks(Setting(name) for row in rows for name in _conditions(row))
    several = len({_conditions(row) for row in rows}) > 1
    figure, axes = _canvas(table, 1.7 + 0.42 * len(rows))
    for y, row in enumerate(rows):
        for side, count in ((-1, row["only_first"]), (1, row["only_second"])):
            condition = Setting((row["first"] if side < 0 else row["second"]).condition)
            axes.barh(y, side * count, color=colors[condition]["color"], height=0.62)
            axes.annotate(str(count), (side * count, y), (12 * side, 0), **_BESIDE, ha="center")
    widest = max(max(row["only_first"], row["only_second"]) for row in rows) or 1
    axes.axvline(0, color=_INK, linewidth=1)
    axes.set_xlim(-1.18 * widest, 1.18 * widest)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_row_label(row, several) for row in rows])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("problems that only one of the two got right (strict score)")
    for condition, look in colors.items():
        axes.barh(0, 0, color=look["color"], label=f"only {condition}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _conditions(row: Record) -> tuple[str, str]:
    return row["first"].condition, row["second"].condition


def _row_label(row: Record, several: bool) -> str:
    """What distinguishes this row: the conditions if they vary, their other axes, the seed."""
    names = [" | ".join(_conditions(row))] if several else []
    shared = "-".join(row["first"].axes)
    return ", ".join([*names, *([shared] if shared else []), f"seed {row['seed']}"])


def draw_validation_nll(table: Table) -> Figure:
    """One line per run; the selected checkpoints are circled."""
    look = _table_looks(table)
    figure, axes = _canvas(table, 3.9)
    shown = set()
    for (_, setting), rows in _groups(table, "run_id", "setting").items():
        label = None if setting in shown else str(setting)
        shown.add(setting)
        steps, values = [row["step"] for row in rows], [row["validation_nll"] for row in rows]
        axes.plot(steps, values, **look[setting], linewidth=1.3, markersize=4, label=label)
        for row in rows:
            if row["selected"]:
                _ring(axes, row["step"], row["validation_nll"])
    _ring(axes, [], [], "selected checkpoint")
    axes.set_xlabel("optimizer step")
    _label_height(axes, "validation mean NLL")
    _legend(figure, axes)
    return figure


def _ring(axes: Axes, x: Any, y: Any, label: str | None = None) -> None:
    axes.plot(x, y, "o", color=_INK, markersize=11, markerfacecolor="none", label=label, linestyle="")


def draw_learning_rates(table: Table) -> Figure:
    """Lowest validation NLL against the learning rate; selected rates are circled, failed runs crossed."""
    look = _table_looks(table)
    figure, axes = _canvas(table, 3.6)
    for (setting,), rows in _groups(table, "setting").items():
        finished = [row for row in rows if row["validation_nll"] is not None]
        rates, values = (
            [row["learning_rate"] for row in finished],
            [row["validation_nll"] for row in finished],
        )
        axes.plot(rates, values, **look[setting], linewidth=1.3, markersize=6, label=str(setting))
        for row in finished:
            if row["selected"]:
                _ring(axes, row["learning_rate"], row["validation_nll"])
        for row in rows:
            if row["validation_nll"] is None:
                mark = axes.get_xaxis_transform()
                axes.plot(row["learning_rate"], 0.97, "x", color=look[setting]["color"], transform=mark)
    _ring(axes, [], [], "selected rate")
    if any(row["validation_nll"] is None for row in table.rows):
        axes.plot([], [], "x", color=_INK, label="failed or unfinished (no value)", linestyle="")
    axes.set_xscale("log")
    rates = sorted({row["learning_rate"] for row in table.rows})
    axes.set_xticks(rates, [tables.rate(value) for value in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate (logarithmic)")
    _label_height(axes, "lowest validation mean NLL")
    _legend(figure, axes)
    return figure


def draw_rate_minimum(table: Table) -> Figure:
    """The lower envelope over learning rates, by step; with few lines, points are labelled with the rate."""
    look = _table_looks(table)
    figure, axes = _canvas(table, 3.6)
    groups = _groups(table, "setting")
    for (setting,), rows in groups.items():
        steps, values = [row["step"] for row in rows], [row["validation_nll"] for row in rows]
        axes.plot(steps, values, **look[setting], linewidth=1.3, markersize=5, label=str(setting))
        for row in rows if len(groups) <= FEW else ():
            place = (row["step"], row["validation_nll"])
            axes.annotate(tables.rate(row["learning_rate"]), place, (0, 10), **_BESIDE, ha="center")
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel("optimizer step")
    _label_height(axes, "lowest validation mean NLL")
    _legend(figure, axes)
    return figure


def draw_throughput(table: Table) -> Figure:
    """Median tokens per second of every run, from zero, with the 10th to 90th percentile of its steps."""
    look = _table_looks(table)
    figure, axes = _canvas(table, 1.3 + 0.34 * len(table.rows))
    for y, row in enumerate(table.rows):
        axes.barh(y, row["median"], color=look[row["setting"]]["color"], height=0.6)
        axes.plot([row["slow"], row["fast"]], [y, y], color=_INK, linewidth=1.4, marker="|", markersize=7)
        axes.annotate(f"{row['median']:,.0f}", (max(row["fast"], row["median"]), y), (6, 0), **_BESIDE)
    axes.set_yticks(range(len(table.rows)), [f"{row['setting']}, seed {row['seed']}" for row in table.rows])
    axes.set_ylim(len(table.rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max(row["fast"] for row in table.rows))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("real tokens a second\n(bar: median; line: 10th to 90th percentile of steps)")
    return figure
