"""Evaluate by greedy decoding: a run's selected adapter, the untouched base, or any PEFT adapter.

    jaxlora evaluate --config tiny --run results/tiny-all_layer-seed-0
    jaxlora evaluate --config main --base
    jaxlora evaluate --config main --adapter hf://OWNER/NAME/PATH --out scores
    jaxlora evaluate --config own --run results/own-all_layer-seed-0 --questions quiz.csv --rule last_number
    jaxlora evaluate --config own --run results/own-all_layer-seed-0 --questions b.csv --rule exact --out b

A run is evaluated according to its manifest: --config provides only the benchmark, the limits, the mesh and
the location of the base. Any other adapter runs on the base of --config, with its own placement, rank and
alpha.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from jaxlora.config import RunConfig, from_dict, to_dict
from jaxlora.runtime.errors import UserError


def main() -> None:
    from jaxlora.cli import parse_config

    config, options = parse_config(_parser())
    config = with_questions(config, options)
    named = (options.condition, options.seed, options.any_base or None)
    if options.adapter is None and any(value is not None for value in named):
        raise UserError("--condition, --seed and --any-base need --adapter")
    if options.adapter is not None and options.out is None:
        raise UserError("--adapter needs --out: the folder to write its records to")

    from jaxlora.evals.run import show
    from jaxlora.evals.subjects import (
        adapter_target,
        base_target,
        check_free,
        describe,
        evaluate_target,
        run_config,
        run_target,
    )
    from jaxlora.runtime import hosts
    from jaxlora.runtime.devices import setup

    with_weights = not options.dry_run
    own = config if options.run is None else run_config(config, options.run)
    setup(own.results_dir, own.model.dtype)
    if options.run is not None:
        target = run_target(config, options.run, with_weights)
    elif options.base:
        target = base_target(config, with_weights)
    else:
        target = adapter_target(
            config,
            options.adapter,
            options.out,
            options.condition,
            options.seed,
            with_weights,
            options.any_base,
        )
    if options.out is not None:
        target = replace(target, out=options.out)
    check_free(target.out, options.overwrite)
    if options.dry_run:
        if hosts.is_first():
            print("\n".join(describe(target)))
        return
    show([evaluate_target(target, options.overwrite)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", type=Path, metavar="DIR", help="a finished run; writes DIR/evaluation")
    subject.add_argument(
        "--base",
        action="store_true",
        help="the untouched base; writes <results_dir>/<prefix>-base/evaluation",
    )
    subject.add_argument("--adapter", metavar="DIR", help="a PEFT folder, or hf://OWNER/NAME[@REVISION]/PATH")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write the records to instead")
    parser.add_argument("--condition", help="require this condition of --adapter (default: any)")
    parser.add_argument("--seed", type=int, help="seed of --adapter, if it does not record one")
    parser.add_argument(
        "--questions", metavar="FILE", help="questions and answers; short for --config.eval.benchmark"
    )
    parser.add_argument(
        "--rule", help="grading rule for any file of questions: boxed, last_number, exact or regex:PATTERN"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt for every question")
    parser.add_argument("--columns", metavar="PAIRS", help="with --rule: question=COLUMN,answer=COLUMN")
    parser.add_argument("--any-base", action="store_true", help="accept an --adapter that names another base")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing evaluation")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the plan and stop; nothing is written"
    )
    return parser


def with_questions(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The configuration with the questions given by the short options.

    Raises:
      UserError: the options conflict, or the rule is unknown.
    """
    columns = None if options.columns is None else options.columns.split(",")
    given = {
        "benchmark": options.questions,
        "rule": options.rule,
        "system": options.system,
        "columns": columns,
    }
    values = to_dict(config)
    values["eval"] |= {name: value for name, value in given.items() if value is not None}
    config = from_dict(values)
    if config.eval.rule is not None:
        from jaxlora.evals.rules import rule_named

        rule_named(config.eval.rule)
    return config
