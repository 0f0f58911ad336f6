"""Plan an experiment for a machine without having it: which arms fit, hours and dollars.

    for row in plan_grid(config, model, machine_named("v5e-16"), train_rows=938_319, row_tokens=600):
        row.label, row.fits, row.hours

Times are lower bounds from the roofline of `jaxlora.estimate`, on the mesh that should be fastest; nothing is
compiled. Hours cover all runs of an arm: its grid, one extra rate for an edge, and its repeats.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from jaxlora.config import LoraConfig, RunConfig
from jaxlora.estimate import FULL, Choice, candidates
from jaxlora.models.spec import ModelConfig
from jaxlora.regret.arms import Arm, parse_arms
from jaxlora.regret.design import steps_of
from jaxlora.regret.runs import look_steps
from jaxlora.runtime.devices import CHIPS, SLICES, Chip, Slice
from jaxlora.runtime.errors import UserError

# NVIDIA's data sheet for the H100 SXM: memory, dense bfloat16, memory rate, NVLink into one GPU, dense int8.
_H100 = Chip("H100", 80e9, 989e12, 3350e9, 450e9, 1979e12)
MACHINES = SLICES | {f"h100-{count}": Slice(f"h100-{count}", _H100, (count,)) for count in (2, 4, 8)}
MULTIPLE = 128  # line lengths are multiples of this; padding is ignored, as rows pack well
EXTRA_RATES = 1  # for a grid whose best rate is on an edge at first


def machine_named(name: str) -> Slice:
    """A TPU slice, or the H100s of one host.

    Raises:
      UserError: there is none with this name.
    """
    if name not in MACHINES:
        raise UserError(f"--topology: {name!r} is not known; give one of {', '.join(MACHINES)}, or all")
    return MACHINES[name]


@dataclass(frozen=True)
class GridRow:
    """One arm on one machine; `choice` is None if nothing fits."""

    arm: Arm
    runs: int
    steps: int
    choice: Choice | None
    gigabytes: float  # per chip, of the choice or of the smallest one that does not fit
    hours: float | None

    @property
    def fits(self) -> bool:
        return self.choice is not None


def plan_grid(
    config: RunConfig, model: ModelConfig, machine: Slice, train_rows: int, row_tokens: float
) -> list[GridRow]:
    """Plan every arm of an experiment on a machine.

    Args:
      train_rows: rows in one epoch.
      row_tokens: mean tokens per row.
    """
    regret, train = config.regret, config.train
    held_out = config.data.validation_rows or 1024
    rows = []
    for arm in parse_arms(regret.arms, model, train.batch_rows, config.lora.alpha):
        runs = regret.rates + EXTRA_RATES + regret.repeats
        steps = steps_of(config, arm, train_rows)
        lora = arm.lora or LoraConfig()
        choices = candidates(
            model,
            lora,
            machine,
            tokens=arm.batch_rows * row_tokens,
            multiple=MULTIPLE,
            what=arm.what,
            longest=train.max_buffer_tokens,
            row_tokens=None if machine.chip.name in CHIPS else row_tokens,
        )
        fitting = [choice for choice in choices if choice.memory < FULL * machine.chip.hbm_bytes]
        best = fitting[0] if fitting else None
        least = best or min(choices, key=lambda choice: choice.memory)
        hours = None
        if best is not None:
            looks = len(look_steps(steps, regret.looks, regret.marks)) + 1
            # A look is a forward pass: a third of a step of full fine-tuning, half of one of an adapter.
            share = looks * held_out / (3 if arm.lora is None else 2) / (steps * arm.batch_rows)
            hours = runs * steps * best.best.seconds * (1 + share) / 3600
        rows.append(GridRow(arm, runs, steps, best, least.memory / 1e9, hours))
    return rows


def grid_table(rows: list[GridRow], machine: Slice, price: float | None) -> Table:
    """The grid as a terminal table with totals; `price` is in dollars per chip-hour."""
    table = Table(title=f"{machine.name}: {machine.n_chips} x {machine.chip.name}", box=None)
    for title in ("arm", "rows a step", "runs", "steps", "mesh", "GB a chip", "hours", "dollars"):
        table.add_column(title, justify="left" if title in ("arm", "mesh") else "right")
    for row in rows:
        choice = row.choice
        mesh = "does not fit"
        if choice is not None:
            axes = f"data {choice.mesh.data}, fsdp {choice.mesh.fsdp}, tensor {choice.mesh.tensor}"
            mesh = axes + (f", remat {choice.remat}".lower() if choice.remat else "")
        table.add_row(
            row.arm.label,
            str(row.arm.batch_rows),
            str(row.runs),
            f"{row.steps:,}",
            mesh,
            f"{row.gigabytes:.1f}",
            "–" if row.hours is None else f"{row.hours:,.1f}",
            _dollars(row.hours, machine, price),
        )
    hours = sum(row.hours or 0 for row in rows)
    table.add_row("all that fit", "", "", "", "", "", f"{hours:,.1f}", _dollars(hours, machine, price))
    return table


def _dollars(hours: float | None, machine: Slice, price: float | None) -> str:
    if hours is None or price is None:
        return "–"
    return f"{hours * machine.n_chips * price:,.0f}"
