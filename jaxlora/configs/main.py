"""The study: Qwen3-8B, attention only versus all layers, on curated OpenMathInstruct-2.

    jaxlora study --config main        # everything: trials, six runs, evaluation, report
    jaxlora train --config main --config.lora.targets=attention_only --config.seed=1

The rows are the study's published dataset; to train on your own files, set
`--config.data.train_path` and `--config.data.validation_path`. Every other value is the study's.
"""

from jaxlora.config import DataConfig, EvalConfig, RunConfig

DATASET = "hf://sumitdotml/lora-and-friends-dataset/rendered"


def get_config() -> RunConfig:
    return RunConfig(
        data=DataConfig(
            train_path=f"{DATASET}/train.jsonl",
            validation_path=f"{DATASET}/val.jsonl",
            shuffle=False,  # the study uses the file's order
        ),
        eval=EvalConfig(benchmark="openai/gsm8k"),
    )
