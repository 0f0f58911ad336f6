"""The scores at the end of a run: the untouched base beside the selected adapter."""

from __future__ import annotations

import jax

from jaxlora.checkpoints.peft import WEIGHTS
from jaxlora.evals.run import Subject, evaluate, evaluation_inputs, load_prompts, show, why_redo
from jaxlora.models.decoder import ModelSpec
from jaxlora.runtime import hosts
from jaxlora.runtime.files import read_json, sha256_of
from jaxlora.train.job import Job, base_fingerprint
from jaxlora.train.loop import TrainResult


def evaluate_base_and_adapter(job: Job, result: TrainResult) -> None:
    """Evaluate both with the weights that training used; a base already evaluated is read, not run again."""
    config = job.config
    base_dir = config.run_dir.parent / f"{config.prefix}-base" / "evaluation"
    origin = base_fingerprint(config, job.model_dir, job.spec.config)
    adapter_file = config.run_dir / "selected" / WEIGHTS
    adapter = Subject(
        config.run_id,
        config.lora.condition,
        config.seed,
        f"step-{result.step}",
        adapter_sha256=hosts.broadcast(sha256_of(adapter_file) if hosts.is_main() else None),
        base_fingerprint=origin,
    )
    plain = ModelSpec(job.spec.config, None, job.spec.dtype, job.spec.scan)
    with jax.set_mesh(job.mesh):
        subject = Subject(f"{config.prefix}-base", base_fingerprint=origin)
        inputs = evaluation_inputs(config, subject, *load_prompts(config, job.tokenizer))
        done = why_redo(base_dir, inputs) is None
        if hosts.broadcast(done):  # hosts may see a shared folder change at different times
            base = read_json(base_dir / "summary.json")
        else:
            base = evaluate(config, subject, plain, {}, result.frozen, job.tokenizer, base_dir)
        out = config.run_dir / "evaluation"
        tuned = evaluate(config, adapter, job.spec, result.lora, result.frozen, job.tokenizer, out)
    show([base, tuned])
