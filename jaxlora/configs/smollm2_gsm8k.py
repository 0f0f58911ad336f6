"""A small study on a real model: SmolLM2-135M-Instruct, attention only versus all layers, on GSM8K.

    jaxlora data build --source train.jsonl --out gsm8k
    jaxlora study --config smollm2_gsm8k

`train.jsonl` is GSM8K's own file, or `hf://openai/gsm8k/main/train-00000-of-00001.parquet`. Without the Hub,
also name the model and the test problems: `--config.model.path=DIR --config.eval.benchmark=test.jsonl`.

With a tenth of the 7,473 rows for validation, this is six runs of 842 steps and seven evaluations of 1,319
problems: seven minutes on one H200 with three processes. Start the command several times: the processes share
the runs, each on the GPU in its CUDA_VISIBLE_DEVICES.
"""

from jaxlora.config import (
    DataConfig,
    EvalConfig,
    ModelSource,
    OptimConfig,
    RunConfig,
    SelectionConfig,
    TrainConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        prefix="smollm2-gsm8k",
        # Scanned layers compile in seconds, and cost little with such a small model.
        model=ModelSource(path="HuggingFaceTB/SmolLM2-135M-Instruct", layers="scan"),
        data=DataConfig(
            train_path="gsm8k/rendered/train.jsonl",
            validation_path="gsm8k/rendered/val.jsonl",
            max_length=1024,
        ),
        optim=OptimConfig(peak_lr=1e-3),
        train=TrainConfig(
            epochs=2,
            batch_rows=16,
            buffer_sizes=1,
            buffer_multiple=512,
            max_buffer_tokens=16384,
            validation_batch_rows=64,
            validation_every=210,
            validation_merge=20,
        ),
        eval=EvalConfig(batch_rows=512),
        selection=SelectionConfig(
            learning_rates=(3e-4, 1e-3, 3e-3), train_rows=2048, validation_rows=256, validation_every=64
        ),
    )
