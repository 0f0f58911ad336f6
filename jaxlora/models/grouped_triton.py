"""Products of `jaxlora.models.grouped` as kernels for NVIDIA GPUs, written in Pallas for Triton.

    y = sum_of_products([(rows, weights), (low, b)], expert, transposed=False)    # [rows, out]
    d_weights = outer_products(d_y, rows, tiles, tile)            # float32 [experts, out, in]

A program computes one block of one tile; it looks up the tile's expert and reads only that expert's matrix.
Terms are summed in the accumulator, so an adapter costs no extra pass over the result. The blocks of a tile
run concurrently, then those of the expert's next tile, so rows and matrices are re-read from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Term = tuple[jax.Array, jax.Array]
BLOCK, DEPTH = 128, 64  # most columns of a block; largest depth contracted in one step of its loop


def sum_of_products(
    terms: Sequence[Term], expert: jax.Array, transposed: bool, interpret: bool = False
) -> jax.Array:
    """Sum over terms (x, W) of W x, or of W^T x, with the matrix of each tile's expert; else zeros.

    Args:
      terms: rows `[rows, in]` and matrices `[experts, out, in]`; transposed, rows `[rows, out]`.
      expert: int32 `[tiles]`; a number beyond the last expert means none.
      interpret: run as plain operations on any device.
    """
    rows = terms[0][0]
    n_tiles, n_experts = expert.shape[0], terms[0][1].shape[0]
    tile = rows.shape[0] // n_tiles
    width = terms[0][1].shape[2 if transposed else 1]
    block = _block(width, BLOCK)
    specs = [pl.BlockSpec((n_tiles,), lambda j, i: (0,))]
    for x, w in terms:
        specs.append(pl.BlockSpec((tile, x.shape[1]), lambda j, i: (i, 0)))
        if transposed:
            specs.append(pl.BlockSpec((n_experts, w.shape[1], block), lambda j, i: (0, 0, j)))
        else:
            specs.append(pl.BlockSpec((n_experts, block, w.shape[2]), lambda j, i: (0, j, 0)))
    return pl.pallas_call(
        partial(_sum_kernel, n_experts=n_experts, transposed=transposed),
        grid=(width // block, n_tiles),  # the first axis varies fastest
        in_specs=specs,
        out_specs=pl.BlockSpec((tile, block), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype),
        compiler_params=_parameters(tile, block, interpret),
        interpret=interpret,
        name="grouped_product_transposed" if transposed else "grouped_product",
    )(expert, *(array for term in terms for array in term))


def _sum_kernel(expert_ref, *refs, n_experts: int, transposed: bool):
    *inputs, out_ref = refs
    expert = expert_ref[pl.program_id(1)]

    @pl.when(expert < n_experts)
    def _():
        total = jnp.zeros(out_ref.shape, jnp.float32)
        for x_ref, w_ref in zip(inputs[::2], inputs[1::2], strict=True):
            total = _accumulate(total, x_ref, w_ref, expert, transposed)
        out_ref[...] = total.astype(out_ref.dtype)

    @pl.when(expert >= n_experts)
    def _():
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)


def _accumulate(total, x_ref, w_ref, expert, transposed: bool):
    """Add one term to the sum so far, in steps along the contracted axis."""
    depth = _block(x_ref.shape[1], DEPTH)

    def step(i, total):
        own = pl.ds(i * depth, depth)
        x = x_ref[:, own]
        w = w_ref[expert, own, :] if transposed else w_ref[expert, :, own]
        return total + plgpu.dot(x, w, trans_b=not transposed)

    return jax.lax.fori_loop(0, x_ref.shape[1] // depth, step, total)


def outer_products(
    left: jax.Array, right: jax.Array, tiles: jax.Array, tile: int, interpret: bool = False
) -> jax.Array:
    """Sum of outer products over each expert's rows: float32 `[experts, left's width, right's width]`.

    Args:
      left, right: rows `[rows, width]`, with zeros in at least one of them where there is no token.
      tiles: int32 `[experts]`: number of tiles of each expert, which follow one another.
      tile: rows of a tile.
    """
    n_experts, n_rows = tiles.shape[0], left.shape[0]
    blocks = [_block(x.shape[1], BLOCK) for x in (left, right)]
    ends = jnp.cumsum(tiles)
    bounds = tile * jnp.stack([ends - tiles, ends])  # rows, int32 [2, experts]
    return pl.pallas_call(
        partial(_outer_kernel, depth=min(tile, DEPTH)),
        grid=(left.shape[1] // blocks[0], right.shape[1] // blocks[1], n_experts),
        in_specs=[
            pl.BlockSpec((2, n_experts), lambda i, j, e: (0, 0)),
            pl.BlockSpec((n_rows, blocks[0]), lambda i, j, e: (0, i)),
            pl.BlockSpec((n_rows, blocks[1]), lambda i, j, e: (0, j)),
        ],
        out_specs=pl.BlockSpec((1, *blocks), lambda i, j, e: (e, i, j)),
        out_shape=jax.ShapeDtypeStruct((n_experts, left.shape[1], right.shape[1]), jnp.float32),
        compiler_params=_parameters(blocks[0], blocks[1], interpret),
        interpret=interpret,
        name="grouped_outer_product",
    )(bounds, left, right)


def _outer_kernel(bounds_ref, left_ref, right_ref, out_ref, *, depth: int):
    expert = pl.program_id(2)
    start, end = bounds_ref[0, expert], bounds_ref[1, expert]

    def step(i, total):
        own = pl.ds(start + i * depth, depth)
        return total + plgpu.dot(left_ref[own, :], right_ref[own, :], trans_a=True)

    total = jnp.zeros(out_ref.shape[1:], jnp.float32)
    out_ref[0, :, :] = jax.lax.fori_loop(0, (end - start) // depth, step, total)


def _block(width: int, most: int) -> int:
    """The largest power of two that divides the width, at most `most`."""
    return min(most, width & -width)


def _parameters(tile: int, block: int, interpret: bool) -> Any:
    if interpret:
        return None
    return plgpu.CompilerParams(num_warps=8 if tile * block >= 128 * 128 else 4, num_stages=3)
