"""Learning DeepMath from rewards at rank 1: Qwen3-8B-Base, long answers.

    jaxlora rl --config rl_deepmath --config.rl.problems=deepmath.jsonl --config.rl.eval_problems=aime.jsonl

The files have `question` and `final_answer`. Answers of up to 8,192 tokens leave room for few at once (the KV
cache takes 1.2 GB each). The learning rate is a starting point, not a result: sweep it.
"""

from jaxlora.config import LoraConfig, ModelSource, OptimConfig, RLConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        prefix="rl-deepmath",
        model=ModelSource(path="Qwen/Qwen3-8B-Base", remat="elementwise"),
        lora=LoraConfig(rank=1),
        optim=OptimConfig(peak_lr=1e-4, schedule="constant"),
        train=TrainConfig(max_buffer_tokens=9216),
        rl=RLConfig(
            problems="deepmath.jsonl",
            eval_problems="aime.jsonl",
            suffix=" Write your answer in \\boxed{} format.",
            reward="deepmath",
            steps=300,
            prompts=32,
            group=32,
            max_new_tokens=8192,
            slots=40,
            eval_every=25,
        ),
    )
