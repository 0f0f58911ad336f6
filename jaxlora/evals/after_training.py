"""The evaluation at the end of a run: scores of the untouched base and of the trained weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

from jaxlora.checkpoints.base import weights_sha256
from jaxlora.evals.run import (
    Subject,
    check_lengths,
    evaluate,
    evaluation_inputs,
    load_prompts,
    show,
    why_redo,
)
from jaxlora.models.decoder import ModelSpec
from jaxlora.runtime import hosts
from jaxlora.runtime.files import read_json
from jaxlora.runtime.folders import claimed
from jaxlora.train.job import Job
from jaxlora.train.loop import TrainResult


def check_answers(job: Job) -> None:
    """Check before the first step that the answers can be decoded at the end (`UserError` if not)."""
    _, prompts = load_prompts(job.config, job.tokenizer)
    check_lengths(job.config, job.base, prompts)


def evaluate_base_and_selected(job: Job, result: TrainResult) -> None:
    """Evaluate both, reusing the weights in memory; the results of a base already evaluated are read."""
    config = job.config
    base_dir = config.run_dir.parent / f"{config.prefix}-base" / "evaluation"
    origin = job.base.fingerprint()
    selected = hosts.broadcast(weights_sha256(config.run_dir / "selected") if hosts.is_main() else None)
    step = f"step-{result.step}"
    tuned = Subject(config.run_id, config.condition, config.seed, step, selected, base_fingerprint=origin)
    plain = ModelSpec(job.spec.config, None, job.spec.dtype, job.spec.scan, scheme=job.spec.scheme)
    with jax.set_mesh(job.mesh):
        subject = Subject(f"{config.prefix}-base", base_fingerprint=origin)
        inputs = evaluation_inputs(config, subject, *load_prompts(config, job.tokenizer))
        # If another run of the same study is evaluating the base, wait for it and read its results.
        with _claimed(base_dir):
            done = why_redo(base_dir, inputs) is None
            if hosts.broadcast(done):  # not what each host sees of the folder
                base = hosts.broadcast(read_json(base_dir / "summary.json") if hosts.is_main() else None)
            else:
                frozen = job.base.load(plain, job.mesh) if job.spec.full else result.frozen
                base = evaluate(config, subject, plain, {}, frozen, job.base, base_dir, job.tokenizer)
        out = config.run_dir / "evaluation"
        weights = result.trained, result.frozen
        with _claimed(out):
            scores = evaluate(config, tuned, job.spec, *weights, job.base, out, job.tokenizer)
    show([base, scores])


def _claimed(out: Path) -> AbstractContextManager[None]:
    """With several hosts, the main one claims the folder for all."""
    return claimed(out, wait=True) if hosts.is_main() else nullcontext()
