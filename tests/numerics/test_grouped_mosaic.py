"""The kernel for Hopper GPUs computes the dense formula, in Pallas' simulation of a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from jaxlora.models.grouped_mosaic import TILE, Blocks, sum_of_products, supports

simulated = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "InterpretGPUParams"), reason="this JAX cannot simulate Mosaic GPU kernels"
)
EXPERT = jnp.array([0, 0, 2, 3], jnp.int32)  # three experts, so that the last tile is nobody's
WIDTH, DEPTH, RANK, BLOCKS = 128, 256, 16, Blocks(width=128, stages=3)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def dense(terms, transposed):
    total = 0
    for x, w in terms:
        tiles = np.asarray(x, np.float32).reshape(len(EXPERT), TILE, -1)
        own = np.concatenate([np.asarray(w, np.float32), np.zeros((1, *w.shape[1:]))])[np.asarray(EXPERT)]
        total += np.einsum("tmo,toi->tmi" if transposed else "tmi,toi->tmo", tiles, own)
    return total.reshape(TILE * len(EXPERT), -1)


def terms_of(transposed):
    rows = TILE * len(EXPERT)
    low, deep = normal(1, rows, RANK), [normal(seed, rows, DEPTH) for seed in (2, 3)]
    if not transposed:
        return [(deep[0], normal(4, 3, WIDTH, DEPTH)), (low, normal(5, 3, WIDTH, RANK))]
    return [(x, normal(seed, 3, DEPTH, WIDTH)) for seed, x in enumerate(deep, 6)] + [
        (low, normal(8, 3, RANK, WIDTH))
    ]


@simulated
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_with_an_adapter_are_those_of_the_dense_formula(transposed):
    terms = terms_of(transposed)
    assert supports(terms, EXPERT, transposed)
    found = sum_of_products(terms, EXPERT, transposed, BLOCKS, mosaic_gpu.InterpretGPUParams())
    expected = dense(terms, transposed)
    assert np.linalg.norm(np.asarray(found, np.float32) - expected) < 3e-3 * np.linalg.norm(expected)
    assert not np.any(found[-TILE:])


def test_shapes_that_the_kernel_does_not_take_are_left_to_the_other_one():
    rows, w = normal(1, TILE * len(EXPERT), DEPTH), normal(2, 3, WIDTH, DEPTH)
    assert supports([(rows, w)], EXPERT, False)
    assert not supports([(rows.astype(jnp.float32), w)], EXPERT, False)
    assert not supports([(rows[: len(rows) // 2], w)], EXPERT, False)  # smaller tiles
    assert not supports([(rows, w[:, :100])], EXPERT, False)
    assert not supports([(rows, w), (rows[:, :48], w[:, :, :48])], EXPERT, False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [128, 256])
def test_it_is_lowered_for_a_gpu(transposed, width):
    deep, wide = (DEPTH, width)
    rows = TILE * len(EXPERT)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    w = shape(3, deep, wide) if transposed else shape(3, wide, deep)
    for rank in (16, 32):
        b = shape(3, rank, wide) if transposed else shape(3, wide, rank)
        terms = [(shape(rows, deep), w), (shape(rows, deep), w), (shape(rows, rank), b)]
        traced = jax.jit(lambda terms, expert: sum_of_products(terms, expert, transposed)).trace(
            terms, EXPERT
        )
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
