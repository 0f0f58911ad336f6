"""The whole study as one command: gates, baseline, trials, sweep, selection, evaluation, figures, report.

    jaxlora study --config tiny               # in miniature, on a laptop
    jaxlora study --config main --dry-run     # every run, with steps, tokens and hours
    jaxlora study --config main --status      # progress so far
    jaxlora study --config main --stage report
    jaxlora study --config regret/tiny        # adapters against full fine-tuning, see jaxlora/regret

Existing valid results are not recomputed: the same command resumes wherever it was stopped or killed.
"""

import argparse
from functools import partial

from jaxlora.config import RunConfig
from jaxlora.study import command


def _experiment(config: RunConfig, options: argparse.Namespace) -> int:
    from jaxlora.regret.command import main

    return main(config, dry_run=options.dry_run, status=options.status, only=options.stage)


main = partial(command.main, __doc__, experiment=_experiment)
