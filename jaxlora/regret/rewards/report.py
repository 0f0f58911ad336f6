"""Write up an experiment that learns from rewards: a Markdown page, CSV tables and plots.

    path = write_report(lab)       # results/<prefix>-regret/REGRET.md, with *.csv and *.png beside it

Everything in it comes from the runs' result files and the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxlora.regret.capacity import BITS_PER_PARAMETER
from jaxlora.regret.drawings import save
from jaxlora.regret.report import PAGE, claims_table
from jaxlora.regret.rewards.drawings import FIGURES
from jaxlora.regret.rewards.findings import (
    KEPT_GAIN,
    accuracies,
    bits_available,
    bits_learned,
    findings,
    mean_curve,
    plateau,
    start_of,
)
from jaxlora.regret.rewards.lab import RewardLab
from jaxlora.regret.sweeps import Sweep, scatter_of, sweeps_of
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, write_text_atomic
from jaxlora.runtime.folders import claimed
from jaxlora.study.figures import csv_text, own_style

CAPTIONS = {
    "accuracy": "Held-out accuracy by step at each arm's best rate, a mean over seeds but the first.",
    "rates": "Held-out accuracy at the end over the rate.",
    "bits": "What an adapter may hold, what the rewards could teach, and what was learned.",
}


def write_report(lab: RewardLab) -> Path:
    """Write the page, the tables and the plots, and return the page's path.

    Raises:
      UserError: there are no runs.
    """
    records = list(lab.folder.records().values())
    if not records:
        raise UserError(f"{lab.folder.runs}: no run is there; run the experiment first")
    page = lab.folder.path / PAGE
    with claimed(page, wait=True):
        sweeps = sweeps_of(records, fresh=True)
        for name, draw in FIGURES.items():
            with own_style():
                figure = draw(sweeps)
            save(figure, lab.folder.path / f"{name}.png")
        write_text_atomic(lab.folder.path / "runs.csv", runs_csv(records))
        write_text_atomic(lab.folder.path / "arms.csv", csv_text(ARM_COLUMNS, arms(sweeps)))
        write_text_atomic(lab.folder.path / "curves.csv", curves_csv(sweeps))
        write_text_atomic(page, page_of(lab, sweeps))
    return page


# --- Tables -------------------------------------------------------------------------------------------------

RUN_COLUMNS = (
    *("name", "arm", "rank", "parameters", "rate", "seed", "steps", "start", "end", "highest", "truncated"),
    *("sampled_end", "bits_available", "bits_learned", "diverged_at", "stood_still_at"),
    *("seconds", "compiling", "step_seconds"),
)


def runs_csv(records: Iterable[Record]) -> str:
    """One line per run; accuracies are at temperature 0, except `sampled_end`, of the last batches."""
    rows = []
    for record in records:
        right = [1 - wrong for _, wrong, _ in record["held_out"]]
        own = {
            "start": right[0],
            "end": right[-1],
            "highest": max(right),
            "truncated": record["held_out"][-1][2],
        }
        own |= {"sampled_end": float(np.mean(record["train"]["correct"][-5:]))}
        own |= {"bits_available": bits_available(record), "bits_learned": bits_learned(record)}
        seconds = record["seconds"]
        own |= {"seconds": seconds["all"], "compiling": seconds["compiling"], "step_seconds": seconds["step"]}
        rows.append(record | own)
    return csv_text(RUN_COLUMNS, rows)


ARM_COLUMNS = (
    *("name", "parameters", "rates", "best_rate", "edge", "end", "error", "highest", "seeds"),
    *("plateau_low", "plateau_high", "plateau_open", "room_bits", "bits_available", "bits_learned"),
    *("runs", "diverged", "seconds"),
)


def arms(sweeps: Sequence[Sweep]) -> list[Record]:
    """One row per arm, at its best rate: means over seeds."""
    scatter, start = scatter_of(sweeps), start_of(sweeps)
    rows = []
    for sweep in sweeps:
        row: Record = {
            "name": sweep.name,
            "parameters": sweep.parameters,
            "rates": len(sweep.grid),
            "room_bits": BITS_PER_PARAMETER * sweep.parameters,
            "runs": len(sweep.records),
            "diverged": sum(record["diverged_at"] is not None for record in sweep.records),
            "seconds": float(np.median([record["seconds"]["all"] for record in sweep.records])),
        }
        best, final, runs = sweep.best(scatter), sweep.final(scatter), sweep.at_best
        if best is not None and final is not None:
            row |= {"best_rate": best.on_grid, "edge": best.edge, "end": 1 - final.mean}
            row |= {"error": final.error, "seeds": final.seeds, "highest": max(mean_curve(sweep).values())}
            row |= {name: float(np.mean([of(run) for run in runs])) for name, of in _BITS.items()}
        if (width := plateau(accuracies(sweep), start)) is not None:
            row |= {"plateau_low": width.low, "plateau_high": width.high, "plateau_open": width.is_open}
        rows.append(row)
    return rows


_BITS = {"bits_available": bits_available, "bits_learned": bits_learned}


def curves_csv(sweeps: Sequence[Sweep]) -> str:
    """Held-out accuracy at each look at the best rate, averaged over seeds."""
    rows = [
        {"name": sweep.name, "step": step, "accuracy": value}
        for sweep in sweeps
        for step, value in mean_curve(sweep).items()
    ]
    return csv_text(("name", "step", "accuracy"), rows)


# --- The page -----------------------------------------------------------------------------------------------


def page_of(lab: RewardLab, sweeps: Sequence[Sweep]) -> str:
    """The whole page."""
    parts = [
        f"# LoRA Without Regret, from rewards: {lab.config.prefix}",
        f"Every condition at its own best learning rate, found on a grid of factors of"
        f" {lab.config.regret.factor:g} that is extended while the best one, or the range of good ones, lies"
        " on an edge. Written by `jaxlora study`; the rules are those of"
        " `jaxlora/regret/rewards/findings.py`.",
        _settings(lab, sweeps),
        "## Claims",
        claims_table(findings(sweeps)),
        "## Arms",
        _arm_table(sweeps),
        *(f"![{caption}]({name}.png)\n\n{caption}" for name, caption in CAPTIONS.items()),
        "Numbers behind the pictures: `arms.csv`, `curves.csv`, `runs.csv`.",
    ]
    return "\n\n".join(parts) + "\n"


def _settings(lab: RewardLab, sweeps: Sequence[Sweep]) -> str:
    config, job = lab.config, lab.first
    rl, optim, records = config.rl, config.optim, [record for s in sweeps for record in s.records]
    seconds, scatter = sum(record["seconds"]["all"] for record in records), scatter_of(sweeps)
    apart = [x for record in records if (x := record["train"]["kl"][0]) is not None]
    example = " / ".join(str(turn["content"]) for turn in job.problems[0].messages)
    repeats = sum(len(sweep.repeats) - 1 for sweep in sweeps if len(sweep.repeats) > 1)
    lines = [
        f"problems: {len(job.problems):,} of `{rl.problems}`, held out {len(job.eval_problems):,} of"
        f" `{rl.eval_problems}`; the first one is: {example}; reward `{rl.reward}`",
        f"{records[0]['steps']} steps of {rl.prompts} prompts x {rl.group} answers, at most"
        f" {rl.max_new_tokens} tokens, temperature {rl.temperature:g}; objective `{rl.loss}`, advantages are"
        " rewards minus the group's mean, no divergence term, one update a batch",
        f"Adam {optim.b1:g}/{optim.b2:g}, eps {optim.eps:g} outside the root, no decay, no clipping,"
        f" constant rate; alpha {config.lora.alpha:g} for every rank; computed in {config.model.dtype}, what"
        " is trained in float32",
        f"{len(records)} runs ({sum(r['diverged_at'] is not None for r in records)} diverged,"
        f" {sum(r['stood_still_at'] is not None for r in records)} ended in constant groups) on"
        f" {', '.join(sorted({r['device'] for r in records}))}: {seconds / 3600:.2f} hours of processes",
        f"accuracy at the start {start_of(sweeps):.3f}; at temperature 0, on the held-out problems, here and"
        " below",
        "scatter between seeds (samples, order of problems, initialisation), widened by Student's t for few"
        " repeats: "
        + ("unknown, no repeats" if scatter is None else f"{scatter:.4f}, pooled over {repeats} repeats"),
    ]
    if apart:
        lines.append(
            "sampler and learner differ on policy by at most"
            f" {np.sqrt(2 * max(apart)):.2g} in a log-probability (root mean square of a first batch)"
        )
    return "\n".join(f"- {line}" for line in lines)


def _arm_table(sweeps: Sequence[Sweep]) -> str:
    titles = (
        *(
            "arm",
            "trained",
            "rates",
            "best rate",
            f"rates that keep {KEPT_GAIN:.0%}",
            "accuracy",
            "±",
            "seeds",
        ),
        *("highest", "room, kbit", "available, kbit", "learned, kbit", "s a run"),
    )
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for row in arms(sweeps):
        lines.append("| " + " | ".join(_arm_texts(row)) + " |")
    note = (
        "Accuracy: at the end, at the rate that was best with the first seed, a mean over the other seeds, as"
        " that one is there because it went well; ± its standard error from the pooled scatter. Room: 2 bits"
        " a parameter. Available: the entropy of the rewards of each group, summed over the run. Learned: by"
        " how much the right answers to all problems to learn from became shorter to write down (mean log2"
        " of the share of right answers, last batches minus first)."
    )
    return "\n".join([*lines, "", note])


def _arm_texts(row: Record) -> list[str]:
    def shown(name: str, form: str, unit: float = 1.0) -> str:
        value = row.get(name)
        return "–" if value is None else format(value / unit, form)

    rate = shown("best_rate", ".2g") + (f" ({row['edge']} edge)" if row.get("edge") else "")
    width = "–"
    if "plateau_low" in row:
        times = row["plateau_high"] / row["plateau_low"]
        width = f"{row['plateau_low']:.2g} to {row['plateau_high']:.2g}"
        width += f", {'at least ' if row['plateau_open'] else ''}{times:.2g} times"
    return [
        row["name"],
        f"{row['parameters'] / 1e6:.2f} M",
        str(row["rates"]),
        rate,
        width,
        shown("end", ".3f"),
        shown("error", ".3f"),
        str(row.get("seeds", 0)),
        shown("highest", ".3f"),
        shown("room_bits", ",.0f", 1e3),
        shown("bits_available", ",.1f", 1e3),
        shown("bits_learned", ",.1f", 1e3),
        shown("seconds", ".0f"),
    ]
