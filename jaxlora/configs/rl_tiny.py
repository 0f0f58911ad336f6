"""Learning from rewards in miniature: the tiny base shipped with the package, on its own word problems.

    jaxlora rl --config rl_tiny

The rank-1 adapter starts from 20 supervised steps (`embedded:start`), where a quarter of its answers are
right. From then on it sees no solutions, only which of its own answers are right. Takes minutes on a CPU.
"""

from jaxlora.config import LoraConfig, ModelSource, OptimConfig, RLConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        prefix="rl-tiny",
        model=ModelSource(path="embedded:base", dtype="float32"),
        lora=LoraConfig(rank=1, start="embedded:start"),
        optim=OptimConfig(peak_lr=1e-3, schedule="constant"),
        # On a CPU, attention over one long buffer costs more than padding short rows.
        train=TrainConfig(layout="padded", buffer_multiple=32, max_buffer_tokens=4096),
        rl=RLConfig(
            problems="embedded:data/train.jsonl",
            eval_problems="embedded:data/val.jsonl",
            reward="gsm8k_strict",
            steps=30,
            prompts=16,
            group=16,
            max_new_tokens=96,
            slots=256,
        ),
    )
