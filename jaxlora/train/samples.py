"""Answers to the first validation prompts at each validation, in `samples.jsonl` and TensorBoard's texts.

    for record in sample_records(job, trained, frozen, step=100):
        print(record["prompt"], record["answer"])

They are decoded greedily by the programs of the evaluation, with the adapter unmerged, so a resumed run
writes the same answers. With scanned layers this temporarily takes a second copy of the base.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxlora.generate.decode import generate
from jaxlora.generate.weights import decode_weights
from jaxlora.models.attention import decode_backend
from jaxlora.models.decoder import Tree
from jaxlora.runtime.files import Record
from jaxlora.train.job import Job

MOST_TOKENS = 128  # per answer


def sample_records(job: Job, trained: Tree, frozen: Tree, step: int) -> list[Record]:
    """One record for each of the first `train.samples` validation rows. Every host calls this."""
    rows = job.validation_rows[: job.config.train.samples]
    starts = [max(1, int(np.flatnonzero(row.weights)[0])) for row in rows]
    prompts = [row.tokens[:start].tolist() for row, start in zip(rows, starts, strict=True)]
    room = job.spec.config.max_position_embeddings - max(map(len, prompts))
    spec, lora, weights, mesh = decode_weights(job.spec, trained, frozen, merge=job.spec.full)
    with jax.set_mesh(mesh):
        answers = generate(
            spec,
            lora,
            weights,
            prompts,
            stop_ids=job.base.stop_ids(job.tokenizer),
            max_new_tokens=min(MOST_TOKENS, room),
            slots=len(prompts),
            backend=decode_backend(spec.dtype),
        )

    def text(tokens: list[int]) -> str:
        return str(job.tokenizer.decode(tokens))

    return [
        {
            "step": step,
            "row_id": row.row_id,
            "prompt": text(prompt),
            "expected": text(row.tokens[start:].tolist()),
            "answer": text(answer.tokens),
            "stop_reason": answer.stop_reason,
        }
        for row, start, prompt, answer in zip(rows, starts, prompts, answers, strict=True)
    ]
