"""SmolLM2-135M-Instruct: ranks 1 to 512 and full fine-tuning, batch sizes, placements; one GPU or several.

    jaxlora study --config regret/smollm2 --config.data.train_path=train.jsonl \\
        --config.data.validation_path=held-out.jsonl

With several GPUs start the command once for each, with its own CUDA_VISIBLE_DEVICES; they share the work. One
run over GSM8K's 7,473 training rows is 234 steps of 32 rows.
"""

from jaxlora.config import DataConfig, ModelSource, OptimConfig, RegretConfig, RunConfig, TrainConfig

# In order of priority: a sweep that is stopped has answered the first questions.
RANKS = tuple(f"all_layer:{rank}" for rank in (16, 256, 1, 4, 64))
PLACES = ("mlp_only:64", "attention_only:64", "attention_only~mlp_only:64", "all_layer~mlp_only:64")
BATCHED = ("full", "all_layer:16", "all_layer:256")
BATCHES = tuple(f"{arm}@{rows}" for rows in (8, 512) for arm in BATCHED)
MORE_RANKS = tuple(f"all_layer:{rank}" for rank in (512, 2, 8, 32, 128))
MORE_PLACES = (
    "mlp_only:256",
    "attention_only:256",
    "mlp_only:128",
    "attention_only+lm_head:256",
    "mlp_only+lm_head:128",
    "all_layer+lm_head:256",
)
ARMS = (
    *("full", *RANKS, *(f"{arm}@128" for arm in BATCHED)),
    *(*PLACES, *BATCHES, *MORE_RANKS, *MORE_PLACES),
)


def get_config() -> RunConfig:
    return RunConfig(
        prefix="smollm2-135m",
        model=ModelSource(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        data=DataConfig(
            train_path="train.jsonl", validation_path="held-out.jsonl", validation_rows=512, max_length=1024
        ),
        optim=OptimConfig(schedule="constant"),
        train=TrainConfig(
            epochs=1,
            batch_rows=32,
            buffer_sizes=1,
            buffer_multiple=1024,
            max_buffer_tokens=8192,
            validation_batch_rows=64,
        ),
        regret=RegretConfig(
            arms=ARMS,
            marks=(50, 100),
            rates=3,
            repeats=2,
            looks=1,
        ),
    )
