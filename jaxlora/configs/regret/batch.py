"""Batch sizes from 8 to 512 at ranks 16 and 256 and for full fine-tuning, on 10,000 OpenThoughts 3 questions.

    jaxlora study --config regret/batch

All see the same number of examples, so small batches take more steps. The data set has up to 16 answers per
question, so it is split by question. Answers truncated before the end of their thoughts are skipped and
counted.
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
