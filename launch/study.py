"""The whole study as one command: gates, baseline, trials, sweep, selection, evaluation, figures, report.

python launch/study.py --config configs/tiny.py               # in miniature, on a laptop
python launch/study.py --config configs/main.py --dry-run     # every run, with steps, tokens and hours
python launch/study.py --config configs/main.py --status      # how far it is
python launch/study.py --config configs/main.py --stage report

What is there and valid is not done again: the same command goes on wherever it was stopped or killed.
"""

from functools import partial

from jaxlora.runtime.errors import run_main
from jaxlora.study.command import main

if __name__ == "__main__":
    run_main(partial(main, __doc__))
