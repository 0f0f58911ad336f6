"""Batch sizes from 8 to 512 at ranks 16, 256 and full fine-tuning, on 10,000 questions of OpenThoughts 3.

    jaxlora study --config regret/batch

The number of examples is the same for all, so that small batches take more steps. The data set has up to 16
answers to a question: parts are split by question. Answers that were cut before their thoughts ended are
skipped and counted.
"""

from dataclasses import replace

from jaxlora.config import DataConfig, RegretConfig, RunConfig
from jaxlora.configs.regret import rank

ROWS = 11_024
HELD_OUT = 1024
ARMS = tuple(
    f"{arm}@{rows}" for rows in (8, 32, 128, 512) for arm in ("full", "all_layer:16", "all_layer:256")
)


def get_config() -> RunConfig:
    return replace(
        rank.get_config(),
        prefix="llama-1b-batches",
        data=DataConfig(
            train_path="open-thoughts/OpenThoughts3-1.2M",
            split="train",
            ignore_columns=("difficulty", "source", "domain"),
            train_rows=ROWS,
            validation_fraction=HELD_OUT / ROWS,
            enable_thinking=True,
            max_length=16_384,
            on_bad_row="skip",
        ),
        regret=RegretConfig(arms=ARMS, repeats=1),
    )
