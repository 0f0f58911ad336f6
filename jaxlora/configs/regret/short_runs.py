"""Does the ratio of an adapter's best learning rate to that of full fine-tuning fall as runs get longer?

    jaxlora study --config regret/short_runs

The rate is constant, so the first 50 steps of a run equal a run of 50 steps: each is read at 50, 100, 400 and
1,600 steps, and the grid is extended until the best rate lies inside it at all four.
"""

from dataclasses import replace

from jaxlora.config import RegretConfig, RunConfig
from jaxlora.configs.regret import rank

STEPS = (50, 100, 400, 1600)


def get_config() -> RunConfig:
    config = rank.get_config()
    rows = 32
    return replace(
        config,
        prefix="llama-1b-short",
        data=replace(
            config.data,
            train_rows=STEPS[-1] * rows + rank.HELD_OUT,
            validation_fraction=rank.HELD_OUT / (STEPS[-1] * rows + rank.HELD_OUT),
        ),
        train=replace(config.train, batch_rows=rows),
        regret=RegretConfig(
            arms=("full", "all_layer:4", "all_layer:32", "all_layer:256"), marks=STEPS, rates=7, repeats=2
        ),
    )
