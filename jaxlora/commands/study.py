"""The whole study as one command: gates, baseline, trials, sweep, selection, evaluation, figures, report.

    jaxlora study --config tiny               # in miniature, on a laptop
    jaxlora study --config main --dry-run     # every run, with steps, tokens and hours
    jaxlora study --config main --status      # how far it is
    jaxlora study --config main --stage report

What is there and valid is not done again: the same command goes on wherever it was stopped or killed.
"""

from functools import partial

from jaxlora.study import command

main = partial(command.main, __doc__)
