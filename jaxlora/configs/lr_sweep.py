"""A learning-rate sweep for each condition, over whole runs: 10 runs of one epoch, one seed.

    jaxlora study --config lr_sweep --dry-run

The study selected its rates by 64 steps at a constant rate; would whole runs select the same?
"""

from dataclasses import replace

from jaxlora.config import RunConfig, SweepConfig
from jaxlora.configs import main


def get_config() -> RunConfig:
    study = main.get_config()
    return replace(
        study,
        prefix="qwen3-8b-rates",
        train=replace(study.train, epochs=1),
        sweep=SweepConfig(seeds=(0,), learning_rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
    )
