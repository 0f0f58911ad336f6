"""The study in small, on a real model: SmolLM2-135M-Instruct, attention only against all layers, on GSM8K.

    jaxlora data check --train train.jsonl --validation val.jsonl --benchmark openai/gsm8k --report gates.json
    jaxlora study --config smollm2_gsm8k --config.data.train_path=train.jsonl \\
        --config.data.validation_path=val.jsonl --config.data.gate_report=gates.json

Rows are `messages` whose answers end in `\\boxed{}`. With GSM8K's 7,473 training rows, a tenth of them for
validation, these are six runs of 842 steps and seven evaluations of 1,319 problems: seven minutes of one H200
with three processes. Start the command several times: the processes share the runs, each on the GPU of its
CUDA_VISIBLE_DEVICES.
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
        # Scanned layers compile in seconds, and of a model so small they cost little.
        model=ModelSource(path="HuggingFaceTB/SmolLM2-135M-Instruct", layers="scan"),
        data=DataConfig(
            train_path="train.jsonl", validation_path="val.jsonl", gate_report="gates.json", max_length=1024
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
