"""Packing, padding and splitting over buffers are layouts: they never change a loss or a gradient."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import make_checkpoint, our_model
from helpers.rows import random_rows

from jaxlora.config import LoraConfig, OptimConfig
from jaxlora.data.packing import choose_sizes, cut_into_buffers, pack, pad
from jaxlora.data.render import shifted
from jaxlora.lora import init_lora
from jaxlora.train.step import Compute, buffer_loss, init_state, make_train_step


def test_every_token_is_in_its_place():
    rows = random_rows(5)
    batch = pack(rows, (512,), 512)
    start = 0
    for segment, row in enumerate(rows, start=1):
        place = slice(start, start + row.n_tokens)
        tokens, targets, weights = shifted(row)
        assert (batch["tokens"][0, 0, place] == tokens).all()
        assert (batch["targets"][0, 0, place] == targets).all()
        assert (batch["weights"][0, 0, place] == weights).all()
        assert (batch["positions"][0, 0, place] == np.arange(row.n_tokens)).all()
        assert (batch["segment_ids"][0, 0, place] == segment).all()
        start += row.n_tokens
    assert not batch["segment_ids"][0, 0, start:].any()
    assert not batch["weights"][0, 0, start:].any()


def test_sizes_waste_least():
    totals = [100, 130, 250, 260, 500, 40, 120]
    levels = sorted({-(-t // 64) * 64 for t in totals})

    def cost(sizes):
        return sum(min((s for s in sizes if s >= t), default=np.inf) for t in totals)

    for n in (1, 2, 3, 10):
        chosen = choose_sizes(totals, n, 64)
        best = min(cost(c) for k in range(1, n + 1) for c in itertools.combinations(levels, k))
        assert len(chosen) <= n
        assert all(size % 64 == 0 for size in chosen)
        assert cost(chosen) == best


def test_rows_are_split_in_order_and_never_cut():
    assert cut_into_buffers([5, 5, 5, 20, 1], 10) == [[0, 1], [2], [3], [4]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    spec, frozen = our_model(folder, lora=LoraConfig(rank=4))
    keys = iter(jax.random.split(jax.random.key(5), 100))
    lora = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), init_lora(spec, 0))
    return spec, frozen, lora


def loss_and_gradients(model, batches):
    spec, frozen, lora = model

    def loss(lora, buffer):
        return buffer_loss(spec, lora, frozen, buffer, Compute(), "cross_entropy", False)[0]

    of_buffer = jax.jit(jax.value_and_grad(loss))
    buffers = [jax.tree.map(lambda x, i=i: x[i], b) for b in batches for i in range(len(b["tokens"]))]
    return jax.tree.map(lambda *parts: sum(parts), *[of_buffer(lora, buffer) for buffer in buffers])


def test_packed_equals_padded_equals_one_row_at_a_time(model):
    rows = random_rows(6)
    value, gradients = loss_and_gradients(model, [pack([row], (64,), 64) for row in rows])
    layouts = {
        "packed": [pack(rows, (384,), 384)],
        "three buffers": [pack(rows, (128,), 128)],
        "padded": [pad(rows, (96,), 6)],
        "padded with spare lines": [pad(rows, (64,), 8)],
    }
    for name, batches in layouts.items():
        other, other_gradients = loss_and_gradients(model, batches)
        assert float(other) == pytest.approx(float(value), rel=1e-5), name
        for ours, theirs in zip(jax.tree.leaves(other_gradients), jax.tree.leaves(gradients), strict=True):
            assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs), name


@pytest.mark.parametrize("remat", [False, True])
def test_a_step_over_several_buffers_equals_a_step_over_one(model, remat):
    spec, frozen, lora = model
    rows = random_rows(6)
    step = make_train_step(spec, OptimConfig(), Compute(remat=remat))
    results = []
    for batch in (pack(rows, (384,), 384), pack(rows, (128,), 128)):
        state = init_state(jax.tree.map(jnp.copy, lora), OptimConfig())
        results.append(step(state, frozen, batch, jnp.float32(1e-3))[1])
    assert float(results[0]["nll"]) == pytest.approx(float(results[1]["nll"]), rel=1e-5)
    assert float(results[0]["grad_norm"]) == pytest.approx(float(results[1]["grad_norm"]), rel=1e-5)
