"""Packing, padding and splitting over buffers are layouts: they never change a loss or a gradient."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import make_checkpoint, our_model
from helpers.rows import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.config import LoraConfig, OptimConfig, TrainConfig
from jaxlora.data.batches import Layout, choose_layout
from jaxlora.data.packing import (
    choose_sizes,
    cut_into_buffers,
    cut_into_lines,
    largest_buffer,
    pack,
    pad,
    rows_of,
    spread,
)
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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(10, 60))
def test_buffers_are_as_few_and_as_even_as_the_order_of_the_rows_allows(lengths, most):
    cuts = [
        np.split(np.arange(len(lengths)), places)
        for n in range(len(lengths))
        for places in itertools.combinations(range(1, len(lengths)), n)
    ]
    fullest = {tuple(map(len, cut)): max(sum(lengths[i] for i in part) for part in cut) for cut in cuts}
    most = max(most, *lengths, 1)
    fewest = min(len(cut) for cut, tokens in fullest.items() if tokens <= most)
    best = min(tokens for cut, tokens in fullest.items() if len(cut) == fewest)
    found = cut_into_buffers(lengths, most)
    assert [i for part in found for i in part] == list(range(len(lengths)))
    assert (len(found), fullest[tuple(map(len, found))]) == (fewest, best)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=24), st.integers(2, 5), st.integers(90, 200))
def test_lines_hold_every_row_once_and_are_about_as_full_as_each_other(lengths, lines, most):
    buffers = cut_into_lines(lengths, most, lines)
    dealt = [line for buffer in buffers for line in buffer]
    assert all(len(buffer) == lines for buffer in buffers)
    assert sorted(i for line in dealt for i in line) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in line) for line in dealt]
    assert max(totals) <= most
    # No move or exchange of rows between the fullest and the emptiest line would bring them closer.
    full, empty = (dealt[totals.index(of(totals))] for of in (max, min))
    gap = max(totals) - min(totals)
    for i in full:
        for other in (0, *(lengths[j] for j in empty)):
            assert abs(gap - 2 * (lengths[i] - other)) >= gap


def test_one_line_is_the_rows_in_order():
    assert cut_into_lines([5, 5, 5, 20, 1], 10) == [[[0, 1]], [[2]], [[3]], [[4]]]


def test_a_batch_in_lines_holds_the_rows_and_gives_them_back():
    rows = random_rows(9)
    lengths = [row.n_tokens for row in rows]
    longest = largest_buffer(lengths, 72, lines=2)
    batch = pack(rows, (longest,), 72, lines=2)
    assert batch["tokens"].shape[0] > 1
    assert batch["tokens"].shape[1:] == (2, longest)
    for name, part in (("tokens", 0), ("targets", 1), ("weights", 2)):
        for row, found in zip(rows, rows_of(batch[name], lengths, 72, lines=2), strict=True):
            assert (found == shifted(row)[part]).all()
    layout = Layout(True, (longest,), 9, 72, lines=2)
    order = [rows[i] for i in layout.order(rows)]
    flat = batch["tokens"][batch["segment_ids"] > 0]
    assert (flat == np.concatenate([shifted(row)[0] for row in order])).all()
    words = np.arange(9, dtype=np.int32) + 100
    spread_words = spread(batch, words[layout.order(rows)])
    for word, found in zip(words, rows_of(spread_words, lengths, 72, lines=2), strict=True):
        assert (found == word).all()


@pytest.mark.parametrize(("batch_rows", "most", "places"), [(200, 512, 32), (200, 4096, 128), (8, 512, 8)])
def test_a_line_has_places_for_the_rows_that_it_can_hold_not_for_all_of_a_batch(batch_rows, most, places):
    """A kernel's memory and launches grow with them."""
    rows = random_rows(200)
    steps = [range(start, start + batch_rows) for start in range(0, 200, batch_rows)]
    train = TrainConfig(layout="packed", batch_rows=batch_rows, max_buffer_tokens=most)
    layout = choose_layout(rows, steps, batch_rows, train, 1)
    held = max(layout.build([rows[i] for i in step])["segment_ids"].max() for step in steps)
    assert layout.rows_a_line == places
    assert held <= places < held + 32


def test_words_of_a_step_with_fewer_rows_than_its_batch_reach_their_rows():
    rows = random_rows(3)
    words = np.arange(3, dtype=np.int32) + 100
    for count, batch in ((3, pad(rows, (128,), 5)), (1, pack(rows[:1], (128,), 128, lines=2))):
        found = spread(batch, words[:count])
        for line, (word, segments) in enumerate(zip(found[0], batch["segment_ids"][0], strict=True)):
            assert (word == np.where(segments > 0, 100 + line, 0)).all()


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
        "two lines": [pack(rows, (256,), 256, lines=2)],
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
