"""SmolLM2-135M-Instruct on your own rows: a real model that trains on a CPU.

    jaxlora train --config smollm2 --config.data.train_path=rows.jsonl
    jaxlora train --config smollm2 --config.data.train_path=rows.jsonl \\
        --config.model.path=path/to/SmolLM2-135M-Instruct

The model is fetched from the Hugging Face Hub unless `--config.model.path` names a directory. A tenth of the
rows is held out for validation. For `HuggingFaceTB/SmolLM2-360M-Instruct` and `-1.7B-Instruct` only the path
changes.
"""

from jaxlora.config import DataConfig, ModelSource, OptimConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        prefix="smollm2-135m",
        # CPUs are faster in float32 than in bfloat16, which most of them only emulate.
        model=ModelSource(path="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32"),
        data=DataConfig(train_path="rows.jsonl", validation_fraction=0.1, max_length=512),
        optim=OptimConfig(peak_lr=1e-3),
        # On a CPU, attention over one long buffer costs more than padding short rows.
        train=TrainConfig(
            epochs=1,
            layout="padded",
            buffer_sizes=2,
            buffer_multiple=64,
            max_buffer_tokens=2048,
            validation_every=50,
            validation_merge=10,
        ),
    )
