"""Write `jaxlora/regret/FULL_SIZE.md`: the planner's estimates for the experiments on large models.

python tools/full_size.py                # a few seconds; nothing is downloaded and no accelerator is needed
python tools/full_size.py --stdout       # print the page instead

For other machines, prices and rows: `jaxlora plan --config regret/rank --topology v5p-8 --price 4.2 ...`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxlora.cli import load_config
from jaxlora.models.families import count_parameters, published_config
from jaxlora.regret.planning import GridRow, machine_named, plan_grid

PAGE = Path(__file__).parent.parent / "jaxlora" / "regret" / "FULL_SIZE.md"
MODELS = ("Llama-3.1-8B", "Llama-3.2-1B", "Qwen3-8B-Base")
MACHINES = {"v5e-16": 1.20, "v6e-8": 2.70, "h100-8": 2.50}  # dollars per chip-hour
# Rows per epoch and mean tokens per row: Tulu 3 without its held-out rows; 10,000 questions of OpenThoughts
# 3. The tokens are round numbers, not counts.
GRIDS = {"rank": (938_319, 700), "placement": (938_319, 700), "batch": (10_000, 12_000)}


def planned(grid: str, model: str, machine: str) -> list[GridRow]:
    config = load_config(f"regret/{grid}", {})
    rows, tokens = GRIDS[grid]
    return plan_grid(config, published_config(model), machine_named(machine), rows, tokens)


def dollars(hours: float, machine: str) -> float:
    return hours * machine_named(machine).n_chips * MACHINES[machine]


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(row: GridRow, machine: str) -> list[str]:
    """Gigabytes per chip, hours and dollars of one arm on one machine."""
    if row.hours is None:
        return [f"does not fit ({row.gigabytes:,.0f})", "–", "–"]
    return [f"{row.gigabytes:.0f}", f"{row.hours:,.1f}", f"{dollars(row.hours, machine):,.0f}"]


def arms_table(grid: str, model: str) -> str:
    """Every arm of a grid on every machine."""
    by_machine = {machine: planned(grid, model, machine) for machine in MACHINES}
    titles = ["arm", "runs", "steps"]
    titles += [f"{name}: {what}" for name in MACHINES for what in ("GB a chip", "hours", "dollars")]
    lines = []
    for number, row in enumerate(next(iter(by_machine.values()))):
        label = row.arm.label if grid != "batch" else f"{row.arm.label}, {row.arm.batch_rows} rows"
        line = [label, str(row.runs), f"{row.steps:,}"]
        for machine, rows in by_machine.items():
            line += cell(rows[number], machine)
        lines.append(line)
    total = ["all that fit", "", ""]
    for machine, rows in by_machine.items():
        hours = sum(row.hours or 0 for row in rows)
        total += ["", f"{hours:,.0f}", f"{dollars(hours, machine):,.0f}"]
    return table(titles, [*lines, total])


def state_line(model: str) -> str:
    config = published_config(model)
    count = count_parameters(config)
    return (
        f"{count / 1e9:.2f} billion parameters. Full fine-tuning keeps {16 * count / 1e9:,.0f} GB in float32"
        f" (weights, gradients, two moments) and {2 * count / 1e9:,.0f} GB of bfloat16 copies; an adapter of"
        " rank r keeps the copies, and 16 bytes a parameter of its own."
    )


def page() -> str:
    prices = ", ".join(f"{name} ${price:.2f}" for name, price in MACHINES.items())
    parts = [
        "# The experiments at full size, on paper",
        "Which arms fit, hours and dollars, by the planner's arithmetic: no run stands behind this page."
        " Written by `python tools/full_size.py`; for other machines, prices and rows `jaxlora plan --config"
        " regret/rank --topology v5p-8 --price 4.2 --train-rows N --row-tokens N`.",
        "- Hours are lower bounds, of all runs of an arm one after another: its grid, one more rate, its"
        " repeats, and the looks at held-out rows. Products, memory and links are taken to overlap and to"
        " reach their peak rates. One H100 reached half of its peak when it trained adapters on Qwen3-8B"
        " (`tools/bench.md`): expect about twice the hours.\n"
        f"- A chip-hour is taken to cost: {prices}. Times the chips of a machine.\n"
        "- Rows: Tulu 3, 938,319 of 700 tokens, 128 a step (`rank`, `placement`); OpenThoughts 3, 10,000 of"
        " 12,000 tokens (`batch`). The tokens are round numbers, not counts.\n"
        "- The mesh is the one with the lowest bound among those whose memory stays below 90% of a chip's;"
        " where none does, the least that any needs stands in parentheses.",
    ]
    for model in MODELS:
        parts += [f"## {model}", state_line(model)]
        for grid in GRIDS:
            parts += [f"### {model}: `regret/{grid}`", arms_table(grid, model)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stdout", action="store_true", help="print the page instead of writing it")
    if parser.parse_args().stdout:
        sys.stdout.write(page())
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
