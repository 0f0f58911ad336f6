"""The whole study as one command: gates, baseline, trials, sweep, selection, evaluation, figures, report.

python launch/study.py --config configs/tiny.py               # in miniature, on a laptop
python launch/study.py --config configs/main.py --dry-run     # every run, with steps, tokens and hours
python launch/study.py --config configs/main.py --status      # how far it is
python launch/study.py --config configs/main.py --stage report

What is there and valid is not done again: the same command goes on wherever it was stopped or killed.
"""

from __future__ import annotations

import argparse

from jaxlora.runtime.errors import run_main
from jaxlora.runtime.signals import Interrupted, Stop, stop_signals

STAGE_NAMES = (
    *("gates", "baseline", "learning-rates", "sweep", "selection", "export"),
    *("evaluation", "comparison", "figures", "report"),
)


def main() -> int:
    with stop_signals() as stop:
        return run(stop)


def run(stop: Stop) -> int:
    from jaxlora.cli import parse_config
    from jaxlora.config import check_study

    parser = argparse.ArgumentParser(
        description=__doc__,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--stage", choices=STAGE_NAMES, help="run this stage alone; those before it must be done"
    )
    what.add_argument("--status", action="store_true", help="show how far every stage and run is, and stop")
    what.add_argument("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    config, options = parse_config(parser)
    check_study(config)

    from jaxlora.runtime.devices import setup
    from jaxlora.runtime.progress import console

    setup(config.results_dir, config.model.dtype)
    from jaxlora.study.pipeline import Session, run_stages
    from jaxlora.study.planning import plan_table, status_tables
    from jaxlora.study.stages import STAGES

    if options.dry_run:
        console.print(plan_table(config))
        return 0
    session = Session(config, stop)
    if options.status:
        for table in status_tables(session):
            console.print(table)
        return 0
    try:
        run_stages(session, [stage for stage in STAGES if options.stage in (None, stage.name)])
    except Interrupted as stopped:
        console.print(str(stopped))
        return stopped.exit_code
    if session.accidents:
        text = f"failed: {', '.join(session.accidents)}; the same command tries again"
        console.print(text, style="red", markup=False)
        return 1
    if options.stage in (None, "report"):
        console.print(f"the report is {session.folder / 'report.html'}", markup=False)
    return 0


if __name__ == "__main__":
    run_main(main)
