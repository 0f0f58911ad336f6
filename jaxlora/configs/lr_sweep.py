"""Another grid: a learning-rate curve for each condition, over whole runs. 10 runs of one epoch, one seed.

    jaxlora study --config lr_sweep --dry-run

The study chose its rates by 64 steps at a constant rate; would whole runs choose the same?
"""

from jaxlora.config import DataConfig, EvalConfig, RunConfig, SweepConfig, TrainConfig

DATASET = "hf://sumitdotml/lora-and-friends-dataset/rendered"


def get_config() -> RunConfig:
    return RunConfig(
        prefix="qwen3-8b-rates",
        data=DataConfig(
            train_path=f"{DATASET}/train.jsonl",
            validation_path=f"{DATASET}/val.jsonl",
            shuffle=False,  # the study's order is the file's
        ),
        eval=EvalConfig(benchmark="openai/gsm8k"),
        train=TrainConfig(epochs=1),
        sweep=SweepConfig(seeds=(0,), learning_rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
    )
