"""The command of a study, as started by `launch/study.py`.

    main(argv)        # 0: finished; 1: something failed and may work next time; 2: something waits for you

JAX is imported only after the options have been checked, so that `--help` and mistakes respond at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxlora.runtime.signals import Interrupted, Stop, stop_signals
from jaxlora.study import STAGE_NAMES

if TYPE_CHECKING:
    from jaxlora.study.pipeline import Session


def main(
    description: str | None = None,
    argv: Sequence[str] | None = None,
    experiment: Callable[..., int] | None = None,
) -> int:
    """Run the command line `argv` (None: this process's own) and return the exit code.

    Args:
      experiment: called with the configuration and the options if `config.regret` asks for an experiment.

    Raises:
      UserError: a mistake in the options, in the configuration or in files on disk, in one line.
    """
    with stop_signals() as stop:
        return _run(description, argv, stop, experiment)


def _run(description: str | None, argv: Sequence[str] | None, stop: Stop, experiment: Any) -> int:
    from jaxlora.cli import parse_config
    from jaxlora.config import check_study

    parser = argparse.ArgumentParser(description=description)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--stage",
        choices=STAGE_NAMES,
        metavar="STAGE",
        help=f"run this stage alone; those before it must be done: {', '.join(STAGE_NAMES)}",
    )
    what.add_argument("--status", action="store_true", help="show how far every stage and run is, and stop")
    what.add_argument("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    config, options = parse_config(parser, argv)
    other = experiment is not None and bool(config.regret.arms)
    if not other:
        check_study(config)

    from jaxlora.runtime.devices import setup
    from jaxlora.runtime.progress import console

    setup(config.results_dir, config.model.dtype)
    if other:
        return int(experiment(config, options))
    from jaxlora.study.pipeline import Session
    from jaxlora.study.planning import plan_table, status_tables

    if options.dry_run:
        console.print(plan_table(config))
        return 0
    session = Session(config, stop)
    if options.status:
        for table in status_tables(session):
            console.print(table)
        return 0
    try:
        return _work(session, options.stage)
    except Interrupted as stopped:
        console.print(str(stopped))
        return stopped.exit_code


def _work(session: Session, only: str | None) -> int:
    """Run all stages, or just one; report in one line what is not done, and return the exit code."""
    from jaxlora.runtime.progress import console
    from jaxlora.study.pipeline import run_stages
    from jaxlora.study.stages import STAGES

    unfinished = run_stages(session, [stage for stage in STAGES if only in (None, stage.name)])
    if unfinished:
        text = "the study is not finished: " + "; ".join(unfinished)
        if session.accidents:
            text += ". The same command tries again"
        console.print(text, style="red", markup=False)
        return 1 if session.accidents else 2
    if only in (None, "report"):
        from jaxlora.study.findings import headline, verdicts
        from jaxlora.study.report import stored_comparison

        comparison = stored_comparison(session.results(), session.folder)
        console.print(headline(comparison), style="bold", markup=False)
        for paragraph in verdicts(comparison):
            console.print(paragraph, markup=False)
        console.print(f"the report is {session.folder / 'report.html'}", markup=False)
    return 0
