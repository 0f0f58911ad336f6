"""Learning from rewards in miniature: the tiny base that ships with the package, its own word problems.

    jaxlora rl --config rl_tiny

The adapter, of rank 1, begins where a few supervised steps left it: a third of the answers are right. From
there on it sees no solution, only whether its own answers are right.
"""

from jaxlora.config import LoraConfig, ModelSource, OptimConfig, RLConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        prefix="rl-tiny",
        model=ModelSource(path="embedded:base", dtype="float32"),
        lora=LoraConfig(rank=1),
        optim=OptimConfig(peak_lr=1e-2, schedule="constant"),
        train=TrainConfig(layout="padded", buffer_multiple=32, max_buffer_tokens=4096),
        rl=RLConfig(
            problems="embedded:data/train.jsonl",
            eval_problems="embedded:data/val.jsonl",
            reward="gsm8k_strict",
            steps=40,
            prompts=16,
            group=16,
            max_new_tokens=96,
            slots=256,
            eval_every=10,
        ),
    )
