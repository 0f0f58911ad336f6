"""Pretrain the embedded base: a tiny Qwen3 on generated word problems, all weights trained.

    python tools/pretrain_tiny.py --out base                # about four minutes on one H100
    python tools/pretrain_tiny.py --out base --steps 50     # a quick look, on any machine

Reads the shipped tokenizer, draws the corpus of `jaxlora.embedded.corpus` from seeds, and writes a Hugging
Face directory in bfloat16, whose files belong in `jaxlora/embedded/base`. The same command on the same kind
of device gives the same files. Prints how many held-out problems the base solves in its own format.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import re
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.base import random_base, save_model
from jaxlora.config import MeshConfig, OptimConfig, TrainConfig
from jaxlora.data.packing import Batch
from jaxlora.data.render import load_tokenizer
from jaxlora.embedded.corpus import pretraining_texts
from jaxlora.embedded.word_problems import conversation, distinct_problems
from jaxlora.generate.decode import generate
from jaxlora.generate.weights import decode_weights
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import count_parameters
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.errors import UserError, add_number, run_main
from jaxlora.runtime.progress import console, progress_bar
from jaxlora.runtime.remote import embedded_path
from jaxlora.sharding import make_mesh
from jaxlora.train.schedule import learning_rate, plan_run
from jaxlora.train.step import Compute, init_state, make_train_step

LENGTH = 256  # tokens per line; documents are packed into it end to end


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    add_number(parser, "--steps", default=5000)
    add_number(parser, "--lines", default=160, help="lines of 256 tokens per step")
    add_number(parser, "--texts", default=1_000_000, help="documents to draw; reused once exhausted")
    add_number(parser, "--rate", float, default=2e-3, help="peak learning rate")
    add_number(parser, "--hidden", most=8192, default=192)
    add_number(parser, "--layers", most=1024, default=6)
    add_number(parser, "--seed", zero=True, default=0)
    options = parser.parse_args()
    if options.hidden % 64:
        raise UserError(f"--hidden: {options.hidden} is not a multiple of 64, two heads of 32; give one")
    if options.out.exists():
        raise UserError(f"{options.out}: exists already; give a new folder")
    tokenizer = load_tokenizer(embedded_path("base"))
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=10_000.0,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_ids=(tokenizer.eos_token_id,),
    )
    console.print(f"{count_parameters(config):,} parameters on {jax.devices()[0].device_kind}")
    tokens, segments = corpus_lines(options.texts, options.seed)
    if not len(tokens):
        raise UserError(f"--texts: {options.texts} fill no line of {LENGTH} tokens; give at least 1000")
    console.print(f"{len(tokens):,} lines of {LENGTH} tokens, {(segments > 0).mean():.1%} of them real")

    spec = ModelSpec(config, None, "float32", scan=True)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights = random_base(spec, options.seed, mesh)
        computing = ModelSpec(config, None, "bfloat16", scan=True, full=True)
        weights = train(computing, weights, tokens, segments, options)
        weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), weights)
        solved = solve_held_out(spec, weights, tokenizer)
    console.print(f"held-out problems solved in the base's own format: {solved:.1%}")
    write(options.out, spec, weights, tokenizer)
    console.print(f"written to {options.out}")
    return 0


def corpus_lines(n_texts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids `[lines, 256]` of the corpus, drawn by several processes with a seed each."""
    parts = 64
    work = [(seed * parts + part, n_texts // parts) for part in range(parts)]
    with (
        multiprocessing.get_context("spawn").Pool() as pool,
        progress_bar("corpus", parts, "parts") as advance,
    ):
        lines = []
        for part in pool.imap(_draw_lines, work):
            lines.append(part)
            advance(1)
    return np.concatenate([t for t, _ in lines]), np.concatenate([s for _, s in lines])


def _draw_lines(work: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    seed, count = work
    tokenizer = load_tokenizer(embedded_path("base"))
    texts = list(pretraining_texts(seed, count, tokenizer))
    tokens, segments = [], []
    line, marks = [], []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        if len(line) + len(ids) > LENGTH:
            padding = [0] * (LENGTH - len(line))
            tokens.append(line + padding)
            segments.append(marks + padding)
            line, marks = [], []
        marks = marks + [(marks[-1] if marks else 0) + 1] * len(ids)
        line = line + ids
    return np.array(tokens, np.int16).reshape(-1, LENGTH), np.array(segments, np.int16).reshape(-1, LENGTH)


def train(spec: ModelSpec, weights, tokens: np.ndarray, segments: np.ndarray, options):
    """AdamW on the mean NLL of every token after a document's first, using the optimizer step of a run."""
    optim = OptimConfig(
        peak_lr=options.rate, b2=0.95, eps=1e-8, weight_decay=0.02, clip_norm=1.0,
        warmup_fraction=min(400 / options.steps, 0.1), min_lr_fraction=0.05,
    )  # fmt: skip
    train_config = TrainConfig(batch_rows=options.lines, epochs=1)
    plan = plan_run(optim, train_config, options.steps * options.lines)
    step_fn = make_train_step(spec, optim, Compute())
    state = init_state(weights, optim)
    order = np.random.default_rng(options.seed)
    rounds = math.ceil(options.steps * options.lines / len(tokens))
    picks = np.concatenate([order.permutation(len(tokens)) for _ in range(rounds)])
    with progress_bar("pretraining", options.steps, "steps") as advance:
        for step in range(1, options.steps + 1):
            chosen = picks[(step - 1) * options.lines : step * options.lines]
            rate = jnp.float32(learning_rate(step, optim, plan))
            state, metrics = step_fn(state, {}, batch_of(tokens[chosen], segments[chosen]), rate)
            if step % 500 == 0 or step == options.steps:
                console.print(f"step {step}: mean NLL {float(metrics['nll']):.4f}")
            advance(1)
    return state.trained


def batch_of(tokens: np.ndarray, segments: np.ndarray) -> Batch:
    """One buffer of these lines; its weights sum to one, so the step's sum is a mean."""
    tokens, segments = tokens.astype(np.int32), segments.astype(np.int32)
    starts = np.where(segments[:, 1:] != segments[:, :-1], np.arange(1, LENGTH), 0)
    starts = np.maximum.accumulate(np.pad(starts, ((0, 0), (1, 0))), axis=1)
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights = np.pad(follows, ((0, 0), (0, 1))).astype(np.float32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": (np.arange(LENGTH) - starts).astype(np.int32),
        "segment_ids": segments,
        "weights": weights / weights.sum(),
    }
    return {name: x[None] for name, x in batch.items()}


def solve_held_out(spec: ModelSpec, weights, tokenizer, count: int = 400) -> float:
    """Share of held-out problems whose last number is right, in the base's explained chat style."""
    problems = distinct_problems(random.Random(99), "val", count)
    prompts = []
    for item in problems:
        messages = conversation(item, "explained")[:-1]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    spec, lora, weights, _ = decode_weights(spec, {}, weights)
    answers = generate(
        spec, lora, weights, prompts, stop_ids=(tokenizer.eos_token_id,), max_new_tokens=96, slots=200
    )
    texts = [tokenizer.decode(answer.tokens) for answer in answers]
    found = [re.findall(r"\d+", text) for text in texts]
    return sum(bool(n) and n[-1] == str(item.answer) for n, item in zip(found, problems, strict=True)) / count


def write(out: Path, spec: ModelSpec, weights, tokenizer) -> None:
    """Write a Hugging Face directory in bfloat16: config.json, weights, tokenizer."""
    config = spec.config
    values = {name: getattr(config, name) for name in config.__pydantic_fields__ if name != "eos_token_ids"}
    values |= {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    save_model(out, spec, jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights), embedded_path("base"))
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
