"""Learn from rewards: sample answers, grade them, step towards the better ones; as a configuration says.

    jaxlora rl --config rl_tiny
    jaxlora rl --config rl_gsm8k --config.lora.rank=1 --config.seed=1

The same command resumes a run that was stopped. Exit codes: 0 done, 2 a mistake in what was given, 75 stopped
by SIGTERM, 130 stopped by Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import argparse

from jaxlora.runtime.signals import Interrupted, Stop, stop_signals

SHOWN = 2  # prompts


def main() -> int:
    with stop_signals() as stop:
        return run(stop)


def run(stop: Stop) -> int:
    from jaxlora.cli import parse_config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="print prompts and plan, and stop; nothing is written"
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
            console.print(
                f"problem {problem.id}, answer {problem.answer}, as the model sees it:", markup=False
            )
            console.print(harmless(str(job.tokenizer.decode(prompt))), markup=False, highlight=False)
    console.print(describe(job))
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
    where = f"everything is in {config.run_dir}; curves: tensorboard --logdir {config.results_dir}"
    console.print(where, markup=False)
    return 0
