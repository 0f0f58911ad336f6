"""SmolLM2-135M-Instruct learns arithmetic from rewards: ranks 1, 4, 16, 64 and full fine-tuning, by rate.

    jaxlora study --config regret/rl_smollm2

With several GPUs start the command once for each, with its own CUDA_VISIBLE_DEVICES; they share the work.
"""

from jaxlora.config import ModelSource, OptimConfig, RegretConfig, RLConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        prefix="smollm2-135m-rl",
        model=ModelSource(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        optim=OptimConfig(schedule="constant"),
        # A single buffer length, and batches decoded all at once: each arm compiles few programs.
        train=TrainConfig(buffer_multiple=8192, max_buffer_tokens=8192),
        rl=RLConfig(
            problems="arithmetic:train?digits=2,1",
            eval_problems="arithmetic:test?digits=2,1",
            eval_rows=512,
            reward="last_number",
            steps=60,
            prompts=32,
            group=16,
            max_new_tokens=17,
            slots=512,
            eval_every=10,
            share_prompts=False,  # as in the runs of the committed report
        ),
        regret=RegretConfig(
            by="reward",
            arms=("full", "all_layer:1", "all_layer:4", "all_layer:16", "all_layer:64"),
            rates=5,
            factor=3.0,
            extend=2,
            repeats=4,
            lora_rate=3e-4,
            full_rate=3e-5,
        ),
    )
