"""Write up an experiment's results: a Markdown page, CSV tables and plots.

    path = write_report(lab)       # results/<prefix>-regret/REGRET.md, with *.csv and *.png beside it

The page answers the claims one by one, then lists every cell. Everything in it comes from the runs' result
files and the configuration.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxlora.models.families import count_matrix_parameters
from jaxlora.models.spec import ModelConfig
from jaxlora.regret.capacity import code_length, flops_ratio
from jaxlora.regret.drawings import FIGURES, save, styled
from jaxlora.regret.findings import Finding, findings
from jaxlora.regret.sweeps import Sweep, scatter_of, sweeps_of
from jaxlora.regret.worker import Lab
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, write_text_atomic
from jaxlora.runtime.folders import claimed
from jaxlora.study.figures import csv_text
from jaxlora.train.rates import outside_domain

PAGE = "REGRET.md"
CAPTIONS = {
    "ranks": "Held-out loss of every rank and of full fine-tuning, the lowest over rates at each step.",
    "rates": "Held-out loss at the last step over the rate. Rings: minima of the parabolas.",
    "best-rates": "Best rates by rank, beside ten times that of full fine-tuning.",
    "batches": "Batch sizes, each cell at its own best rate, one epoch; cells on an edge are left out.",
    "placements": "Where adapters sit; of a cell on an edge the lowest loss so far.",
    "placement-rates": "The same over the rate.",
    "ratios": "The ratio of best rates as runs grow longer.",
}


def write_report(lab: Lab) -> Path:
    """Write the page, the tables and the plots, and return the page's path.

    Raises:
      UserError: there are no runs.
    """
    records = list(lab.folder.records().values())
    if not records:
        raise UserError(f"{lab.folder.runs}: no run is there; run the experiment first")
    page = lab.folder.path / PAGE
    with claimed(page, wait=True):
        sweeps = sweeps_of(records)
        scatter = scatter_of(sweeps)
        drawn = []
        for name, draw in FIGURES.items():
            if (figure := styled(draw, sweeps, scatter)) is not None:
                save(figure, lab.folder.path / f"{name}.png")
                drawn.append(name)
        write_text_atomic(lab.folder.path / "cells.csv", cells_csv(sweeps, scatter))
        write_text_atomic(lab.folder.path / "curves.csv", curves_csv(sweeps))
        write_text_atomic(lab.folder.path / "runs.csv", runs_csv(records))
        write_text_atomic(page, page_of(lab, sweeps, drawn))
    return page


# --- Tables -------------------------------------------------------------------------------------------------

RUN_COLUMNS = (
    *("name", "arm", "placement", "rank", "parameters", "batch_rows", "rate", "seed", "steps"),
    *("held_out", "held_out_by_row", "diverged_at", "seconds", "compiling"),
)


def runs_csv(records: Iterable[Record]) -> str:
    """One line per run, with its last held-out loss by both definitions."""
    rows = []
    for record in records:
        _, by_token, by_row = record["held_out"][-1]
        seconds = record["seconds"]
        own = {"held_out": by_token, "held_out_by_row": by_row, "seconds": seconds["all"]}
        rows.append(record | own | {"compiling": seconds["compiling"]})
    return csv_text(RUN_COLUMNS, rows)


CELL_COLUMNS = (
    *("name", "batch_rows", "steps", "parameters", "best_rate", "low", "high", "tried", "edge"),
    *("loss", "error", "seeds", "loss_by_row", "bits", "bits_a_token", "runs", "seconds", "compiling"),
)


def cells(sweeps: Sequence[Sweep], scatter: float | None) -> list[Record]:
    """One row per cell: its best rate with an interval, its loss there, bits, seconds."""
    rows = []
    for sweep in sweeps:
        best, final, record = sweep.best(scatter), sweep.final(scatter), sweep.best_record
        row: Record = {
            "name": sweep.name,
            "batch_rows": sweep.batch_rows,
            "steps": sweep.steps,
            "parameters": sweep.parameters,
            "runs": len(sweep.records),
            "seconds": min(r["seconds"]["all"] - r["seconds"]["compiling"] for r in sweep.records),
            "compiling": max(r["seconds"]["compiling"] for r in sweep.records),
        }
        if best is not None and final is not None and record is not None:
            weight = sum(record["train"]["weight"][: record["steps_per_epoch"]])
            bits = code_length(record["train"]["nll"], record["steps_per_epoch"])
            row |= {
                **{"best_rate": best.rate, "low": best.low, "high": best.high, "tried": best.on_grid},
                **{"edge": best.edge, "loss": final.mean, "error": final.error, "seeds": final.seeds},
                **{"loss_by_row": record["held_out"][-1][2], "bits": bits, "bits_a_token": bits / weight},
            }
        rows.append(row)
    return rows


def cells_csv(sweeps: Sequence[Sweep], scatter: float | None) -> str:
    return csv_text(CELL_COLUMNS, cells(sweeps, scatter))


def curves_csv(sweeps: Sequence[Sweep]) -> str:
    """The envelope of every cell: step, loss, and the rate that attains it."""
    rows = [
        {"name": s.name, "batch_rows": s.batch_rows, "step": p.step, "loss": p.loss, "rate": p.rate}
        for s in sweeps
        for p in s.envelope
    ]
    return csv_text(("name", "batch_rows", "step", "loss", "rate"), rows)


# --- The page -----------------------------------------------------------------------------------------------


def page_of(lab: Lab, sweeps: Sequence[Sweep], drawn: Sequence[str]) -> str:
    """The whole page."""
    scatter = scatter_of(sweeps)
    model = lab.first.base.config
    parts = [
        f"# LoRA Without Regret: {lab.config.prefix}",
        "Every condition at its own best learning rate, found on a grid of factors of 2 that is extended"
        " while the best one lies on an edge. Written by `jaxlora study`; the rules are those of"
        " `jaxlora/regret/findings.py`.",
        _settings(lab, sweeps, scatter),
        "## Claims",
        claims_table(findings(sweeps)),
        "## Cells",
        _cell_table(sweeps, scatter, model),
        *(f"![{CAPTIONS[name]}]({name}.png)\n\n{CAPTIONS[name]}" for name in drawn),
        "Numbers behind the pictures: `cells.csv`, `curves.csv`, `runs.csv`.",
    ]
    return "\n\n".join(parts) + "\n"


def _settings(lab: Lab, sweeps: Sequence[Sweep], scatter: float | None) -> str:
    config, job = lab.config, lab.first
    records = [record for sweep in sweeps for record in sweep.records]
    optim, seconds = config.optim, sum(record["seconds"]["all"] for record in records)
    diverged = sum(record["diverged_at"] is not None for record in records)
    lines = [
        f"{len(job.train_rows):,} rows, {config.train.epochs} epoch(s), held out {len(job.validation_rows):,}"
        " rows; loss on answers, reported as the mean over weighted tokens (and beside it in `runs.csv`"
        " as the"
        " mean over rows)",
        *(report.describe() for report in dict.fromkeys(job.reports)),
        f"Adam {optim.b1:g}/{optim.b2:g}, eps {optim.eps:g} outside the root, weight decay"
        f" {optim.weight_decay:g},"
        f" no clipping, constant rate, no warm-up; alpha {config.lora.alpha:g} for every rank",
        f"computed in {config.model.dtype}; what is trained, its gradients and moments in float32 (full"
        " fine-tuning: all weights, the tied head included)",
        f"{len(records)} runs ({diverged} diverged) on {', '.join(sorted({r['device'] for r in records}))}:"
        f" {seconds / 3600:.2f} hours of processes, {3600 * len(records) / seconds:.0f} runs in an hour"
        f" of one{_speed(records)}",
        "scatter between seeds (order of rows and initialisation), without what one seed does to all cells of"
        " a batch size, widened by Student's t for few repeats: "
        + ("unknown, no repeats" if scatter is None else f"{scatter:.5f} nats, {_repeats(sweeps)}"),
    ]
    theory = job.base.config.hidden_size / (2 * config.lora.alpha)
    lines.append(
        "a theory of invariance to the rank alone would give hidden / (2 alpha) for the ratio of best rates: "
        f"{theory:.3g} for this model"
    )
    skipped = Counter(bad.reason for report in dict.fromkeys(job.reports) for bad in report.skipped)
    lines += [f"skipped: {count:,} rows, {reason}" for reason, count in skipped.most_common()]
    if doubt := outside_domain(job.base.config):
        lines.append(f"the middle of the grids is the published formula's rate: {doubt}")
    return "\n".join(f"- {line}" for line in lines)


def _speed(records: Sequence[Record]) -> str:
    """Runs per hour of wall time, including compilation, over the runs that record when they ended."""
    own = [(r["ended"] - r["seconds"]["all"], r["ended"]) for r in records if "ended" in r]
    if not own:
        return ""
    wall, until = 0.0, -math.inf  # the time during which any process was making a run
    for start, end in sorted(own):
        wall += max(0.0, end - max(start, until))
        until = max(until, end)
    return f"; by the clock {len(own)} runs in {wall:,.0f} s, {3600 * len(own) / wall:,.0f} in an hour"


def _repeats(sweeps: Sequence[Sweep]) -> str:
    """The number of repeats behind the scatter, and their losses in each cell."""
    own = [sweep for sweep in sweeps if len(sweep.repeats) > 1]
    count = sum(len(sweep.repeats) - 1 for sweep in own)
    few = "; so few give errors and intervals that are rough themselves" if count < 10 else ""
    shown = ", ".join(
        f"{sweep.name}, {sweep.batch_rows} rows: {' '.join(f'{loss:.4f}' for loss in sweep.repeats)}"
        for sweep in own[:6]
    )
    return f"pooled over {count} repeats ({shown}){few}"


def claims_table(found: Sequence[Finding]) -> str:
    """A table of claims with figures and verdicts, followed by the rules."""
    table = ["| claim | ours | verdict |", "|---|---|---|"]
    table += [f"| {one.claim} | {_cell(one.figure)} | **{one.verdict}** |" for one in found]
    rules = [
        f"- *{one.claim}.* Rule: {one.rule}." + (f" Others: {one.against}." if one.against else "")
        for one in found
    ]
    return "\n".join([*table, "", "Rules, and what others found:", "", *rules])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _cell_table(sweeps: Sequence[Sweep], scatter: float | None, model: ModelConfig) -> str:
    weights = count_matrix_parameters(model)
    titles = (
        *("condition", "rows a step", "steps", "trained", "FLOPs", "best rate", "95 %"),
        *("loss", "±", "seeds", "bits a token", "s a run", "s compiling"),
    )
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    by_name = {(s.name, s.batch_rows): s for s in sweeps}
    for row in cells(sweeps, scatter):
        full = by_name[row["name"], row["batch_rows"]].full
        flops = 1.0 if full else flops_ratio(weights, row["parameters"])
        lines.append("| " + " | ".join(_cell_texts(row, flops)) + " |")
    note = (
        "FLOPs: (2W + 3P) / (3W) of full fine-tuning's, head counted. Loss: mean over seeds at the best"
        " rate that"
        " was tried, ± its standard error from the pooled scatter. Bits: code length of the first pass."
        " Seconds of"
        " the fastest run without compiling, evaluations included, and the longest compilation."
    )
    return "\n".join([*lines, "", note])


def _cell_texts(row: Record, flops: float) -> list[str]:
    def shown(name: str, form: str) -> str:
        value: Any = row.get(name)
        return "–" if value is None else format(value, form)

    between = "–"
    if row.get("edge"):
        between = f"on the {row['edge']} edge"
    elif row.get("low") is not None:
        between = f"{row['low']:.2g} to {row['high']:.2g}"
    return [
        row["name"],
        f"{row['batch_rows']}",
        f"{row['steps']:,}",
        f"{row['parameters'] / 1e6:.2f} M",
        f"{flops:.2f}",
        shown("best_rate", ".2g"),
        between,
        shown("loss", ".4f"),
        shown("error", ".4f"),
        shown("seeds", "d"),
        shown("bits_a_token", ".3f"),
        shown("seconds", ".1f"),
        shown("compiling", ".1f"),
    ]
