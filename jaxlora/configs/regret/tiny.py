"""The experiments in miniature: ranks, placements and batch sizes of the tiny model, on a laptop.

    for i in 1 2; do jaxlora study --config regret/tiny & done; wait      # one process per core

A run takes about ten seconds on two cores.
"""

from dataclasses import replace

from jaxlora.config import OptimConfig, RegretConfig, RunConfig
from jaxlora.configs import tiny

RANKS = [f"all_layer:{rank}" for rank in (1, 4, 16)]
PLACES = ["mlp_only:16", "attention_only~mlp_only:16"]
SMALL = [f"{arm}@4" for arm in ("full", "all_layer:16")]


def get_config() -> RunConfig:
    study = tiny.get_config()
    return replace(
        study,
        prefix="regret-tiny",
        data=replace(study.data, train_rows=320, validation_rows=48, shuffle=True),
        optim=OptimConfig(schedule="constant"),
        train=replace(study.train, epochs=1, batch_rows=32, validation_batch_rows=24),
        eval=replace(study.eval, benchmark=None, after_training=False),
        # The published rule is for models a hundred times wider and runs longer than 20 steps.
        regret=RegretConfig(
            arms=("full", *RANKS, *PLACES, *SMALL),
            rates=4,
            extend=2,
            repeats=1,
            looks=1,
            lora_rate=4e-3,
            full_rate=1e-3,
        ),
    )
