"""Plan a run on a Cloud TPU slice without the slice: memory, time and cost from the compiled programs.

    python tools/plan.py --config configs/main.py --topology v5e-8
    python tools/plan.py --config configs/main.py --topology all --json plans.json
    python tools/plan.py --config configs/main.py --topology v5e-8 --search
    python tools/plan.py --config configs/main.py --topology v5e-16 --members 4      # a fused sweep

Exit code 0: it fits; 1: it does not, and the output says what would; 2: a mistake in the request. Times are
lower bounds: computing, memory and interconnect are taken to overlap fully and to reach their peak rates.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs; a GPU or TPU here stays free

from rich.console import Console

from jaxlora.cli import parse_config
from jaxlora.config import RunConfig
from jaxlora.runtime.remote import resolve
from jaxlora.estimate import with_mesh
from jaxlora.models.families import load_model_config, published_config
from jaxlora.models.spec import ModelConfig
from jaxlora.plan.fused import FusedPlan, plan_members, print_members
from jaxlora.plan.programs import Workload
from jaxlora.plan.report import Plan, make_plan, print_comparison, print_plan, search
from jaxlora.runtime.chips import SLICES, Slice, slice_named
from jaxlora.runtime.errors import UserError, add_number, run_main
from jaxlora.runtime.progress import make_console
from jaxlora.sharding import whole_mesh


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    study = Workload()
    parser.add_argument("--topology", required=True, help=f"{', '.join(SLICES)}, or all")
    parser.add_argument(
        "--search", action="store_true", help="look for the fastest mesh, remat and buffers that fit"
    )
    add_number(
        parser,
        "--members",
        metavar="N",
        help="compare the step of one run with that of N runs together, on the configuration's mesh or, with"
        " --search, each on its fastest",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the plans as JSON as well; -: only JSON, on stdout"
    )
    add_number(parser, "--price", float, metavar="DOLLARS", help="price of one chip for one hour")
    add_number(parser, "--train-rows", default=study.train_rows, help="[%(default)s, the study's]")
    add_number(parser, "--validation-rows", default=study.validation_rows, help="[%(default)s]")
    row_tokens = "mean tokens a row [%(default)s]"
    add_number(parser, "--row-tokens", float, default=study.row_tokens, help=row_tokens)
    config, options = parse_config(parser)
    check_options(options)

    workload = Workload(options.train_rows, options.validation_rows, options.row_tokens)
    names = list(SLICES) if options.topology == "all" else [options.topology]
    slices = [slice_named(name) for name in names]
    model = find_model(config.model.path)
    console = make_console(stderr=options.json == "-")
    if options.members is None:
        plans, fit = plan_runs(config, model, slices, workload, options.search, options.price, console)
    else:
        plans, fit = plan_groups(config, model, slices, workload, options.members, options.search, console)
    if options.json:
        text = json.dumps([plan.to_json() for plan in plans], indent=1) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    return 0 if fit else 1


def check_options(options: argparse.Namespace) -> None:
    """Refuse before anything is compiled, which takes minutes, what could not be done after it."""
    if options.json and options.json != "-":
        if Path(options.json).exists():
            raise UserError(f"--json: {options.json} exists already; give a new file")
        if not Path(options.json).parent.is_dir():
            raise UserError(f"--json: {Path(options.json).parent} is no folder; make it first")
    if options.members is not None and options.members < 2:
        raise UserError(f"--members: {options.members} is no group; give 2 or more")
    if options.members is not None and options.price is not None:
        raise UserError("--price: the plans of groups have no price; leave out --price or --members")


def plan_runs(
    config: RunConfig,
    model: ModelConfig,
    slices: list[Slice],
    workload: Workload,
    any_mesh: bool,
    price: float | None,
    console: Console,
) -> tuple[list[Plan], bool]:
    """Compile and print the plan of each slice; and whether all fit."""
    plans = []
    for slice_ in slices:
        chosen, step = config, None
        if any_mesh:
            chosen, step = search(config, model, slice_, workload, console)
            if step is None:
                console.print(
                    f"{slice_.name}: nothing that was tried fits; the plan is the configuration's own"
                )
        plans.append(make_plan(chosen, model, slice_, workload, price, step))
        print_plan(plans[-1], console)
    if len(plans) > 1:
        print_comparison(plans, console)
    return plans, all(plan.fits for plan in plans)


def plan_groups(
    config: RunConfig,
    model: ModelConfig,
    slices: list[Slice],
    workload: Workload,
    members: int,
    any_mesh: bool,
    console: Console,
) -> tuple[list[FusedPlan], bool]:
    """Compile and print for each slice what runs trained together gain; and whether all fit."""
    plans = []
    for slice_ in slices:
        own = with_mesh(config, model, slice_).mesh
        mesh = None if any_mesh else whole_mesh(own, slice_.n_chips)
        plan = plan_members(config, model, slice_, workload, members, console, mesh)
        if plan is None:
            console.print(f"{slice_.name}: nothing that was tried fits; give --search, or fewer members")
        else:
            plans.append(plan)
            print_members(plan, console)
    return plans, len(plans) == len(slices)


def find_model(path: str) -> ModelConfig:
    """The model's shape from a directory, or of a published model; nothing is fetched."""
    folder = resolve(path)
    return load_model_config(folder) if Path(folder).is_dir() else published_config(path)


if __name__ == "__main__":
    run_main(main)
