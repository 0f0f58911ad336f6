"""The embedded default: a tiny Qwen3 shipped with the package. No download, no accelerator, minutes.

    jaxlora train --config tiny        # one run
    jaxlora study --config tiny        # the whole study in miniature

The base was pretrained on word problems and answers in a different format; fine-tuning teaches it the
study's: worked steps that end in `\\boxed{answer}`. The same code runs as for Qwen3-8B.
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
        prefix="tiny",
        model=ModelSource(path="embedded:base", dtype="float32"),
        data=DataConfig(
            train_path="embedded:data/train.jsonl",
            validation_path="embedded:data/val.jsonl",
            train_rows=480,
            validation_rows=80,
            max_length=256,
            shuffle=False,  # the study uses the file's order
        ),
        optim=OptimConfig(peak_lr=1e-3),
        # On a CPU, attention over one long buffer costs more than padding short rows.
        train=TrainConfig(
            layout="padded", buffer_sizes=1, buffer_multiple=32, validation_every=30, validation_merge=10
        ),
        eval=EvalConfig(
            benchmark="embedded:data/test.jsonl", max_new_tokens=96, batch_rows=64, after_training=True
        ),
        # The study's own grid; its largest rate wins here, so the study's runs equal those of train.py.
        selection=SelectionConfig(train_rows=64, validation_rows=32, validation_every=4),
    )
