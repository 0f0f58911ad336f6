"""Another grid: how much rank each condition needs. 24 runs of one epoch, one seed.

    jaxlora study --config rank_sweep --dry-run

The best learning rate may differ from rank to rank, so every rank is tried at three rates; the report shows
the lowest validation loss over the rates, step by step.
"""

from jaxlora.config import DataConfig, EvalConfig, RunConfig, SweepConfig, TrainConfig

DATASET = "hf://sumitdotml/lora-and-friends-dataset/rendered"


def get_config() -> RunConfig:
    return RunConfig(
        prefix="qwen3-8b-ranks",
        data=DataConfig(
            train_path=f"{DATASET}/train.jsonl",
            validation_path=f"{DATASET}/val.jsonl",
            shuffle=False,  # the study's order is the file's
        ),
        eval=EvalConfig(benchmark="openai/gsm8k"),
        train=TrainConfig(epochs=1),
        sweep=SweepConfig(seeds=(0,), ranks=(1, 4, 16, 64), learning_rates=(1e-4, 3e-4, 1e-3)),
    )
