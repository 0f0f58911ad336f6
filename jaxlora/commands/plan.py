"""Plan a run on a Cloud TPU slice without the slice: memory, time and cost from the compiled programs.

    jaxlora plan --config own --config.data.train_path=rows.jsonl      # here: steps, tokens, does it fit?
    jaxlora plan --config main --topology v5e-8
    jaxlora plan --config main --topology all --json plans.json
    jaxlora plan --config main --topology v5e-8 --search
    jaxlora plan --config regret/rank --topology h100-8 --train-rows 938319     # every arm of an experiment
    jaxlora plan --config rl_gsm8k --topology v5e-8 --answer-tokens 170     # learning from rewards

For a configuration that sets a field of `rl`, sampler and learner are compiled. The plan shows how the time
of a batch splits into sampling, scoring (measured on this machine) and learning, and the totals for the
configured run and for one of 10,000 problems x 32 answers.

Exit code 0: it fits; 1: it does not fit, and the output says what would; 2: a mistake in the input. Times are
lower bounds: compute, memory and interconnect are assumed to overlap fully and to reach their peak rates.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.cli import parse_config
from jaxlora.config import RLConfig, RunConfig
from jaxlora.runtime.errors import UserError, add_number
from jaxlora.runtime.progress import make_console
from jaxlora.runtime.remote import resolve

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlora.models.spec import ModelConfig
    from jaxlora.plan.programs import Workload
    from jaxlora.plan.report import Plan
    from jaxlora.rl.planning import Expected, RewardsPlan
    from jaxlora.runtime.devices import Slice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--topology",
        metavar="SLICE",
        help="a slice such as v5e-8 or v6e-8, or all [the devices of this machine]",
    )
    parser.add_argument(
        "--search", action="store_true", help="search for the fastest mesh, remat and micro-batches that fit"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the plans as JSON; -: print only JSON, on stdout"
    )
    add_number(parser, "--price", float, metavar="DOLLARS", help="price per chip-hour")
    add_number(parser, "--train-rows", metavar="N", help="rows per epoch [the study's]")
    add_number(parser, "--validation-rows", metavar="N", help="rows per validation [the study's]")
    add_number(parser, "--row-tokens", float, metavar="N", help="mean tokens per row [the study's]")
    add_number(parser, "--prompt-tokens", float, metavar="N", help="mean tokens per prompt [120]")
    add_number(
        parser,
        "--answer-tokens",
        float,
        metavar="N",
        help="mean tokens per sampled answer [a third of rl.max_new_tokens]",
    )
    config, options = parse_config(parser)
    check_options(options, kind_of(config))
    if options.topology is not None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs; a GPU or TPU here stays free
    if config.regret.arms:
        return plan_experiment(config, options)
    if options.topology is None:
        return plan_here(config)

    from jaxlora.plan.programs import Workload
    from jaxlora.runtime.devices import SLICES, slice_named

    names = list(SLICES) if options.topology == "all" else [options.topology]
    slices = [slice_named(name) for name in names]
    model = find_model(config.model.path)
    console = make_console(stderr=options.json == "-")
    plans: Sequence[Plan | RewardsPlan]
    if learns_from_rewards(config):
        from jaxlora.rl.planning import Expected

        expected = Expected(**given(options, "prompt_tokens", "answer_tokens"))
        plans = plan_rewards(config, model, slices, expected, options.price, console)
    else:
        workload = Workload(**given(options, "train_rows", "validation_rows", "row_tokens"))
        plans = plan_slices(config, model, slices, workload, options.search, options.price, console)
    if options.json:
        text = json.dumps([plan.to_json() for plan in plans], indent=1) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    return 0 if all(plan.fits for plan in plans) else 1


def plan_experiment(config: RunConfig, options: argparse.Namespace) -> int:
    """Print the plans of an experiment's arms; returns 0 if all of them fit."""
    from jaxlora.plan.programs import Workload
    from jaxlora.regret.planning import MACHINES, grid_table, machine_named, plan_grid

    usual = Workload()
    names = list(MACHINES) if options.topology == "all" else [options.topology]
    machines = [machine_named(name) for name in names]
    model = find_model(config.model.path)
    fits = True
    for machine in machines:
        rows = plan_grid(
            config,
            model,
            machine,
            options.train_rows or usual.train_rows,
            options.row_tokens or usual.row_tokens,
        )
        make_console(stderr=False).print(grid_table(rows, machine, options.price))
        fits = fits and all(row.fits for row in rows)
    return 0 if fits else 1


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the named options that were given."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


# Options that do not apply to each kind of plan, and what the error says about them.
_ONLY = {
    "rewards": ("search", "train_rows", "validation_rows", "row_tokens"),
    "arms": ("search", "json", "validation_rows", "prompt_tokens", "answer_tokens"),
    "rows": ("prompt_tokens", "answer_tokens"),
}
_INSTEAD = {
    "rewards": "is for supervised runs, not for learning from rewards",
    "arms": "is for one run, not for the arms of an experiment",
    "rows": "is for learning from rewards: this configuration sets no field of rl",
}


def check_options(options: argparse.Namespace, kind: str) -> None:
    """Refuse options that do not apply, and output that cannot be written, before minutes of compiling."""
    of_lengths = ("train_rows", "validation_rows", "row_tokens", "prompt_tokens", "answer_tokens")
    of_slices = ("search", "json", "price", *of_lengths)
    if options.topology is None and (odd := [name for name in of_slices if getattr(options, name)]):
        raise UserError(f"--{odd[0].replace('_', '-')} is for a slice: give --topology as well")
    if odd := [name for name in _ONLY[kind] if getattr(options, name)]:
        raise UserError(f"--{odd[0].replace('_', '-')} {_INSTEAD[kind]}; leave it out")
    if options.json and options.json != "-":
        if Path(options.json).exists():
            raise UserError(f"--json: {options.json} exists already; give a new file")
        if not Path(options.json).parent.is_dir():
            raise UserError(f"--json: {Path(options.json).parent} is not a folder; create it first")


def kind_of(config: RunConfig) -> str:
    """The kind of plan for a configuration."""
    if config.regret.arms:
        return "arms"
    return "rewards" if learns_from_rewards(config) else "rows"


def plan_here(config: RunConfig) -> int:
    """Print the plan of `jaxlora train --dry-run` or `jaxlora rl --dry-run`; returns 1 if it does not fit in
    the memory of this machine's devices."""
    from jaxlora.runtime.devices import setup
    from jaxlora.runtime.progress import console

    setup(config.results_dir, config.model.dtype)
    from jaxlora.rl import job as rewards
    from jaxlora.rl.workload import told_time
    from jaxlora.train import job as rows

    if learns_from_rewards(config):
        rl_job = rewards.prepare(config, with_weights=False)
        table, needed, mesh = rewards.describe(rl_job), rewards.memory_here(rl_job), rl_job.mesh
        table.add_row("[bold]time[/bold]", told_time(rl_job))
    else:
        job = rows.prepare(config, with_weights=False)
        table, needed, mesh = rows.describe(job), rows.memory_per_device(job), job.mesh
    console.print(table)
    return 1 if rows.fits(needed, mesh.devices.flat[0]) is False else 0


def learns_from_rewards(config: RunConfig) -> bool:
    """Whether the configuration is for `jaxlora rl`, that is, sets a field of `rl`."""
    return config.rl != RLConfig()


def plan_slices(
    config: RunConfig,
    model: ModelConfig,
    slices: list[Slice],
    workload: Workload,
    any_mesh: bool,
    price: float | None,
    console: Console,
) -> list[Plan]:
    """Compile and print a plan for each slice.

    Args:
      any_mesh: search for the fastest mesh, remat and micro-batches instead of using the configured ones.
    """
    from jaxlora.plan.report import make_plan, print_comparison, print_plan, search

    plans = []
    for slice_ in slices:
        chosen, step = config, None
        if any_mesh:
            chosen, step = search(config, model, slice_, workload, console)
            if step is None:
                console.print(
                    f"{slice_.name}: none of the choices tried fits; here is the plan as configured"
                )
        plans.append(make_plan(chosen, model, slice_, workload, price, step))
        print_plan(plans[-1], console)
    if len(plans) > 1:
        print_comparison(plans, console)
    return plans


def plan_rewards(
    config: RunConfig,
    model: ModelConfig,
    slices: list[Slice],
    expected: Expected,
    price: float | None,
    console: Console,
) -> list[RewardsPlan]:
    """Compile and print a reinforcement-learning plan for each slice."""
    from jaxlora.rl.planning import plan_rewards, print_rewards

    plans = []
    for slice_ in slices:
        plans.append(plan_rewards(config, model, slice_, expected, price))
        print_rewards(plans[-1], console)
    return plans


def find_model(path: str) -> ModelConfig:
    """The shape of a model in a directory, or of a published model; nothing is downloaded."""
    from jaxlora.models.families import load_model_config, published_config

    folder = resolve(path)
    return load_model_config(folder) if Path(folder).is_dir() else published_config(path)
