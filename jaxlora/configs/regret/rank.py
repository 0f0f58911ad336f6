"""Ranks 1 to 512 and full fine-tuning of Llama 3.2 1B on Tulu 3, each at its own best rate.

    jaxlora study --config regret/rank
    jaxlora study --config regret/rank --config.data.split=none --config.data.train_path=rows.jsonl

The data set has no held-out part: 1,024 rows are held out by a hash of their prompts, so that no prompt is in
both parts. Rows whose last turn is not an answer are skipped and counted. The post uses this model and Llama
3.1 8B (`--config.model.path`), bases without a chat template; the instruct model has one.
"""

from jaxlora.config import DataConfig, ModelSource, OptimConfig, RegretConfig, RunConfig, TrainConfig

RANKS = tuple(f"all_layer:{2**power}" for power in range(10))
HELD_OUT = 1024
TULU_ROWS = 939_343


def get_config() -> RunConfig:
    return RunConfig(
        prefix="llama-1b-tulu",
        model=ModelSource(path="meta-llama/Llama-3.2-1B-Instruct"),
        data=DataConfig(
            train_path="allenai/tulu-3-sft-mixture",
            split="train",
            ignore_columns=("id", "source"),
            validation_fraction=HELD_OUT / TULU_ROWS,
            validation_rows=HELD_OUT,
            on_bad_row="skip",
        ),
        optim=OptimConfig(schedule="constant"),
        train=TrainConfig(
            epochs=1,
            batch_rows=128,
            buffer_sizes=1,
            buffer_multiple=4096,
            max_buffer_tokens=32768,
            validation_batch_rows=64,
        ),
        regret=RegretConfig(arms=("full", *RANKS), repeats=1),
    )
