"""The command of an experiment: what `launch/study.py` does if `config.regret.arms` is set.

code = main(config, dry_run=False, status=False)      # 0: finished
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from jaxlora.config import RunConfig
from jaxlora.regret.design import places_of
from jaxlora.regret.rewards.lab import RewardLab
from jaxlora.regret.worker import Lab, work
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console


def main(config: RunConfig, *, dry_run: bool = False, status: bool = False, only: str | None = None) -> int:
    """Make the remaining runs and write the report, or only show what there is to do.

    Args:
      only: a stage's name, as in a study; `report` writes the report of the finished runs.

    Raises:
      UserError: a mistake in the configuration, or results of a different one.
    """
    check(config, only)
    lab: Any = Lab(config) if config.regret.by == "likelihood" else RewardLab(config)
    if dry_run or status:
        if config.regret.by == "likelihood":
            for report in dict.fromkeys(lab.first.reports):
                console.print(report.describe(), markup=False)
        console.print(plan_table(lab))
        return 0
    if only != "report":
        work(lab)
    if config.regret.by == "likelihood":
        from jaxlora.regret import report
    else:
        from jaxlora.regret.rewards import report  # type: ignore[no-redef]

    path = report.write_report(lab)
    console.print(f"the report is {path}", markup=False)
    return 0


def check(config: RunConfig, only: str | None) -> None:
    """Refuse settings that an experiment would ignore.

    Raises:
      UserError: names the field and what to do.
    """
    if only not in (None, "report"):
        raise UserError(f"--stage {only}: an experiment of config.regret has only the stage report")
    if config.name is not None:
        raise UserError("config.name is ignored by experiments, which name their runs; set config.prefix")
    if config.lora.start is not None:
        raise UserError("config.lora.start: every arm starts from the base; give none")
    if config.lora.dropout:
        raise UserError("config.lora.dropout: arms are trained without dropout; give 0")
    if config.regret.by == "likelihood" and config.regret.factor != 2:
        raise UserError("config.regret.factor: rates compared by likelihood are a factor of 2 apart; give 2")
    if config.train.early_stopping is not None:
        raise UserError(
            "config.train.early_stopping: all runs of an arm take the same number of steps; give none"
        )


def plan_table(lab: Any) -> Table:
    """A table of every cell with its learning rates, and its finished and remaining runs."""
    records = lab.folder.records()
    table = Table(box=None)
    for title in ("arm", "rows a step", "steps", "parameters", "rates", "done", "left"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    left = lab.left()
    places = places_of(lab.config.regret)
    for cell in lab.cells:
        done = sum(
            1 for r in records.values() if (r["arm"], r["batch_rows"]) == (cell.arm.label, cell.batch_rows)
        )
        own = [run for run in left if run.cell == cell]
        table.add_row(
            cell.arm.label,
            str(cell.batch_rows),
            f"{lab.steps(cell):,}",
            f"{cell.arm.parameters:,}",
            f"{cell.rate(places[0]):.2g} to {cell.rate(places[-1]):.2g}",
            str(done),
            str(len(own)),
        )
    return table
