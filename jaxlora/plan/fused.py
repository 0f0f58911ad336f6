"""What runs trained together gain on a slice: the step of a group beside the step of one run.

plan = plan_members(config, model, slice_named("v5e-16"), Workload(), 4, console, MeshConfig(1, 16, 1))
plan.gain, print_members(plan, console)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxlora.config import MeshConfig, RunConfig
from jaxlora.models.spec import ModelConfig
from jaxlora.plan.programs import Program, Workload
from jaxlora.plan.report import GIB, search
from jaxlora.runtime.chips import Slice


@dataclass(frozen=True)
class FusedPlan:
    """The training step of one run beside that of several runs in one program, each with its own choice."""

    slice: Slice
    members: int
    lone: Program
    fused: Program
    lone_speed: float  # real tokens/s
    fused_speed: float

    @property
    def gain(self) -> float:
        """How many times as many tokens a second as lone runs one after another."""
        return self.fused_speed / self.lone_speed

    def to_json(self) -> dict[str, Any]:
        """Plain values, those of the two programs of one chip and one step."""
        return {
            "slice": self.slice.to_json(),
            "members": self.members,
            "gain": self.gain,
            "one run": self.lone.to_json() | {"tokens_per_second": self.lone_speed},
            "together": self.fused.to_json() | {"tokens_per_second": self.fused_speed},
        }


def plan_members(
    config: RunConfig,
    model: ModelConfig,
    slice_: Slice,
    workload: Workload,
    members: int,
    console: Console,
    mesh: MeshConfig | None,
) -> FusedPlan | None:
    """Compile both steps, each with the fastest choice that fits; None where one fits with none.

    Args:
      mesh: of both; None: each has its own.
    """
    steps = []
    for count in (1, members):
        _, step = search(config, model, slice_, workload, console, count, mesh)
        if step is None:
            return None
        steps.append(step)
    tokens = config.train.batch_rows * workload.row_tokens
    speeds = [n * tokens / step.best.seconds for n, step in zip((1, members), steps, strict=True)]
    return FusedPlan(slice_, members, steps[0], steps[1], speeds[0], speeds[1])


def print_members(plan: FusedPlan, console: Console) -> None:
    """Both steps side by side, and what the group gains."""
    table = Table("a chip, a step", "one run", f"{plan.members} runs", title=plan.slice.name)
    steps = plan.lone, plan.fused
    rows: list[tuple[str, Callable[[Program], str]]] = [
        ("tokens, padding included", lambda p: f"{p.tokens:,}"),
        ("peak, GiB", lambda p: f"{p.memory.total / GIB:.2f}"),
        ("compute, ms", lambda p: f"{p.best.compute * 1e3:.1f}"),
        ("memory, ms", lambda p: f"{p.best.memory * 1e3:.1f}"),
        ("interconnect, ms", lambda p: f"{p.best.interconnect * 1e3:.1f}"),
        ("at best, ms", lambda p: f"{p.best.seconds * 1e3:.1f}"),
    ]
    for name, cell in rows:
        table.add_row(name, *(cell(step) for step in steps))
    table.add_row("tokens/s", f"{plan.lone_speed:,.0f}", f"{plan.fused_speed:,.0f}")
    console.print(table)
    console.print(
        f"{plan.slice.name}: {plan.members} runs together, {plan.gain:.2f} times the tokens/s of lone runs"
    )
