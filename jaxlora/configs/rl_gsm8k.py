"""Learning GSM8K from rewards at rank 1: Qwen3-8B, 64 prompts x 16 answers per step, one H100.

    jaxlora rl --config rl_gsm8k \\
        --config.rl.problems=gsm8k/train.jsonl --config.rl.eval_problems=gsm8k/test.jsonl

The files have `question` and `answer`, such as those of openai/gsm8k. The learning rate is a starting point,
not a result: sweep it.
"""

from jaxlora.config import LoraConfig, ModelSource, OptimConfig, RLConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        prefix="rl-gsm8k",
        model=ModelSource(path="Qwen/Qwen3-8B"),
        lora=LoraConfig(rank=1),
        optim=OptimConfig(peak_lr=1e-4, schedule="constant"),
        train=TrainConfig(max_buffer_tokens=4096),
        rl=RLConfig(
            problems="gsm8k/train.jsonl",
            eval_problems="gsm8k/test.jsonl",
            system=(
                "You are a careful math solver. Solve the problem step by step."
                " Put the final answer in \\boxed{}."
            ),
            reward="gsm8k_strict",
            steps=117,  # one pass
            prompts=64,
            group=16,
            max_new_tokens=512,
            slots=384,
        ),
    )
