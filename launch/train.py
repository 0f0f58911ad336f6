"""Fine-tune one condition and one seed, as a Python configuration file says.

python launch/train.py --config configs/tiny.py
python launch/train.py --config configs/main.py --config.lora.condition=attention_only --config.seed=1
"""

from __future__ import annotations

import argparse
import signal

from jaxlora.errors import run_main

PREEMPTED = 75  # stopped by SIGTERM after saving: start the same command again
INTERRUPTED = 130  # stopped by Ctrl-C after saving


def main() -> int:
    from jaxlora.config import parse_config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    config, options = parse_config(parser)

    from jaxlora.devices import setup
    from jaxlora.progress import console

    setup(config)
    from jaxlora.train.job import describe, prepare

    job = prepare(config, with_weights=not options.dry_run)
    console.print(describe(job))
    if options.dry_run:
        return 0

    from jaxlora.train.loop import Interrupted, train

    try:
        result = train(job)
    except Interrupted as stopped:
        console.print(str(stopped))
        return PREEMPTED if stopped.signum == signal.SIGTERM else INTERRUPTED
    console.print(f"selected step {result.step}: validation mean NLL {result.mean_nll:.5f}")
    if config.eval.after_training:
        from jaxlora.evals.after_training import evaluate_base_and_adapter

        evaluate_base_and_adapter(job, result)
    console.print(f"everything is in {config.run_dir}; curves: tensorboard --logdir {config.results_dir}")
    return 0


if __name__ == "__main__":
    run_main(main)
