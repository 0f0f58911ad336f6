"""Learning MATH from rewards at rank 1: Llama-3.1-8B, 32 prompts x 32 answers, one pass.

    jaxlora rl --config rl_math \\
        --config.rl.problems=math/train.jsonl --config.rl.eval_problems=math/math500.jsonl

The files have `problem` and `solution`. There are many answers per prompt because, when few are right, small
groups have constant rewards and teach nothing. The learning rate is a starting point, not a result: sweep it.
"""

from jaxlora.config import LoraConfig, ModelSource, OptimConfig, RLConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        prefix="rl-math",
        model=ModelSource(path="meta-llama/Llama-3.1-8B-Instruct"),
        lora=LoraConfig(rank=1),
        optim=OptimConfig(peak_lr=1e-4, schedule="constant"),
        train=TrainConfig(max_buffer_tokens=4096),
        rl=RLConfig(
            problems="math/train.jsonl",
            eval_problems="math/math500.jsonl",
            suffix=" Write your answer in \\boxed{} format.",
            reward="math",
            steps=312,  # 10,000 problems
            prompts=32,
            group=32,
            max_new_tokens=1024,
            slots=256,
            eval_every=26,
        ),
    )
