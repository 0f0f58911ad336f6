"""Your own rows, with nothing to set but their path: a tenth is held out for validation, none is scored.

    jaxlora train --config own --config.data.train_path=rows.jsonl
    jaxlora train --config own --config.data.train_path=rows.jsonl --config.model.path=Qwen/Qwen3-0.6B
    jaxlora chat --run results/own-all_layer-seed-0

The default model is the tiny one shipped with the package, so the first command needs no download; choose
another with `--config.model.path`, and `--config.model.dtype=bfloat16` on a TPU or GPU.
"""

from jaxlora.config import DataConfig, ModelSource, OptimConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        prefix="own",
        model=ModelSource(path="embedded:base", dtype="float32"),
        data=DataConfig(train_path="rows.jsonl", validation_fraction=0.1, max_length=1024),
        optim=OptimConfig(peak_lr=1e-3),
        # On a CPU, attention over one long buffer costs more than padding short rows.
        train=TrainConfig(
            epochs=3, layout="padded", buffer_sizes=2, buffer_multiple=32, max_buffer_tokens=2048
        ),
    )
