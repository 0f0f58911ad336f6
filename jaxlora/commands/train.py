"""Fine-tune with one adapter placement (or all weights) and one seed, as configured by a Python file.

    jaxlora train --config tiny
    jaxlora train --config main --config.lora.targets=attention_only --config.seed=1

The same command resumes a stopped run. Exit codes: 0 done, 2 a mistake in the input, 75 stopped by SIGTERM,
130 stopped by Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import argparse

from jaxlora.runtime.signals import Interrupted, Stop, stop_signals


def main() -> int:
    with stop_signals() as stop:
        return run(stop)


def run(stop: Stop) -> int:
    from jaxlora.cli import parse_config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    config, options = parse_config(parser)

    from jaxlora.runtime.devices import setup
    from jaxlora.runtime.progress import console

    setup(config.results_dir, config.model.dtype)
    from jaxlora.train.job import describe, prepare

    job = prepare(config, with_weights=not options.dry_run)
    console.print(describe(job))
    if options.dry_run:
        return 0

    from jaxlora.train.loop import not_yet_evaluated, train

    if config.eval.after_training:
        from jaxlora.evals.after_training import check_answers

        check_answers(job)
    try:
        result = not_yet_evaluated(job) or train(job, stop=stop)
    except Interrupted as stopped:
        console.print(str(stopped))
        return stopped.exit_code
    console.print(f"selected step {result.step}: validation mean NLL {result.mean_nll:.5f}")
    if config.eval.after_training:
        from jaxlora.evals.after_training import evaluate_base_and_selected

        evaluate_base_and_selected(job, result)
    where = f"everything is in {config.run_dir}; curves: tensorboard --logdir {config.results_dir}"
    console.print(where, markup=False)
    return 0
