"""A rank sweep: how much rank each condition needs. 24 runs of one epoch, one seed.

    jaxlora study --config rank_sweep --dry-run

The best learning rate may vary with rank, so every rank is tried at three rates; the report shows the lowest
validation loss over the rates at each step.
"""

from dataclasses import replace

from jaxlora.config import RunConfig, SweepConfig
from jaxlora.configs import main


def get_config() -> RunConfig:
    study = main.get_config()
    return replace(
        study,
        prefix="qwen3-8b-ranks",
        train=replace(study.train, epochs=1),
        sweep=SweepConfig(seeds=(0,), ranks=(1, 4, 16, 64), learning_rates=(1e-4, 3e-4, 1e-3)),
    )
