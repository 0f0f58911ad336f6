"""The scores at the end of a run: the untouched base beside the selected adapter."""

from __future__ import annotations

import jax

from jaxlora.evals.run import Subject, evaluate, show
from jaxlora.models.qwen3 import ModelSpec
from jaxlora.records import read_json
from jaxlora.train.job import Job
from jaxlora.train.loop import TrainResult


def evaluate_base_and_adapter(job: Job, result: TrainResult) -> None:
    """Evaluate both with the weights that training used; a base already evaluated is read, not run again."""
    config = job.config
    base_dir = config.run_dir.parent / f"{config.prefix}-base" / "evaluation"
    adapter = Subject(config.run_id, config.lora.condition, config.seed, f"step-{result.step}")
    plain = ModelSpec(job.spec.config, None, job.spec.dtype, job.spec.scan)
    with jax.set_mesh(job.mesh):
        if (base_dir / "summary.json").is_file():
            base = read_json(base_dir / "summary.json")
        else:
            subject = Subject(f"{config.prefix}-base")
            base = evaluate(config, subject, plain, {}, result.frozen, job.tokenizer, base_dir)
        out = config.run_dir / "evaluation"
        tuned = evaluate(config, adapter, job.spec, result.lora, result.frozen, job.tokenizer, out)
    show([base, tuned])
