"""Learn from rewards: sample answers, grade them, step towards the better ones, as configured.

    jaxlora rl --config rl_tiny
    jaxlora rl --config rl_gsm8k --config.lora.rank=1 --config.seed=1
    jaxlora rl --report results/rl-tiny-all_layer-seed-0     # a page of its answers so far, to browse

The same command resumes a stopped run. Exit codes: 0 done, 2 a mistake in the input, 75 stopped by SIGTERM,
130 stopped by Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.signals import Interrupted, Stop, stop_signals

SHOWN = 2  # prompts


def main() -> int:
    with stop_signals() as stop:
        return run(stop)


def run(stop: Stop) -> int:
    from jaxlora.cli import parse_config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--report",
        metavar="RUN",
        help="write RUN/answers.html for a run, finished or not, and stop; takes no --config",
    )
    if (folder := asked_report(sys.argv[1:])) is not None:
        return report(folder)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the first prompts and the plan, and stop; nothing is written",
    )
    config, options = parse_config(parser)

    from jaxlora.runtime.devices import setup
    from jaxlora.runtime.progress import console
    from jaxlora.runtime.text import harmless

    setup(config.results_dir, config.model.dtype)
    from jaxlora.rl.job import describe, prepare

    job = prepare(config, with_weights=not options.dry_run)
    if options.dry_run:
        for problem, prompt in list(zip(job.problems, job.prompts, strict=True))[:SHOWN]:
            told = f"problem {problem.id}, answer {problem.answer}, as the model sees it:"
            console.print(harmless(told), markup=False)
            console.print(harmless(str(job.tokenizer.decode(prompt))), markup=False, highlight=False)
    table = describe(job)
    if options.dry_run:
        from jaxlora.rl.workload import told_time

        table.add_row("[bold]time[/bold]", told_time(job))
    console.print(table)
    if options.dry_run:
        return 0

    from jaxlora.rl.loop import learn

    try:
        result = learn(job, stop=stop)
    except Interrupted as stopped:
        console.print(str(stopped))
        return stopped.exit_code
    if result.accuracy is not None:
        console.print(f"step {result.step}: held-out accuracy {result.accuracy:.2%}")
    where = f"everything is in {config.run_dir}; browse the answers in answers.html"
    console.print(f"{where}; curves: tensorboard --logdir {config.results_dir}", markup=False)
    return 0


def asked_report(words: list[str]) -> str | None:
    """The run whose page is requested, if any; it must be the only option then."""
    names = [i for i, word in enumerate(words) if word.partition("=")[0] == "--report"]
    if not names or "--help" in words or "-h" in words:
        return None
    name, equals, folder = words[names[0]].partition("=")
    given = [folder] if equals else words[names[0] + 1 : names[0] + 2]
    if len(words) != (1 if equals else 2) or not given[0]:
        raise UserError(f"{name}: takes the directory of a run and no other option")
    return given[0]


def report(folder: str) -> int:
    from jaxlora.rl.page import write_page
    from jaxlora.runtime.progress import console

    console.print(f"the answers are in {write_page(Path(folder))}", markup=False, soft_wrap=True)
    return 0
