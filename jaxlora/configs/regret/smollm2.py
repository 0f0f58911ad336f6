"""SmolLM2-135M-Instruct: ranks 1 to 512 and full fine-tuning, batch sizes, placements; one GPU or several.

    jaxlora study --config regret/smollm2 --config.data.train_path=train.jsonl \\
        --config.data.validation_path=held-out.jsonl

With several GPUs start the command once for each, with its own CUDA_VISIBLE_DEVICES; they share the work. One
run over GSM8K's 7,473 training rows is 234 steps of 32 rows.
"""

from jaxlora.config import DataConfig, ModelSource, OptimConfig, RegretConfig, RunConfig, TrainConfig

RANKS = tuple(f"all_layer:{2**power}" for power in range(10))
BATCHES = tuple(
    f"{arm}@{rows}" for rows in (8, 128, 512) for arm in ("full", "all_layer:16", "all_layer:256")
)
PLACES = (
    "attention_only:256",
    "mlp_only:256",
    "mlp_only:128",
    "mlp_only:64",
    "attention_only~mlp_only:64",
    "attention_only~mlp_only:128",
    "attention_only+lm_head:256",
    "mlp_only+lm_head:128",
    "all_layer+lm_head:256",
)


def get_config() -> RunConfig:
    return RunConfig(
        prefix="smollm2-135m",
        model=ModelSource(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        data=DataConfig(
            train_path="train.jsonl", validation_path="held-out.jsonl", validation_rows=1024, max_length=1024
        ),
        optim=OptimConfig(schedule="constant"),
        train=TrainConfig(
            epochs=1,
            batch_rows=32,
            buffer_sizes=1,
            buffer_multiple=1024,
            max_buffer_tokens=32768,
            validation_batch_rows=64,
        ),
        regret=RegretConfig(arms=("full", *RANKS, *PLACES, *BATCHES), marks=(50, 100), repeats=2),
    )
