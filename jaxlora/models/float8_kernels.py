"""What surrounds the 8-bit products of decoding, as kernels for NVIDIA GPUs, in Pallas for Triton.

    values, low = round_and_lower(x, most, a)       # e4m3 [rows, in], and A x of all adapters of this input
    ys = [product(values, w) for w in weights]      # by cuBLAS, bfloat16 [rows, out] each
    ys = scale_and_add(ys, most, columns, low, all_b, scale)          # W x + (alpha / r) B A x

With the few rows of a decoding step each of these operations takes a GPU as long to start as to finish; one
by one they cost as much as the products themselves. With the many rows of prompts they are passes over memory
that are saved. A's product is split along `in`, so that few rows keep the whole GPU busy, and its parts are
added in a fixed order where they are read: a row's numbers depend on nothing but the row. They are rounded
wherever the plain operations round them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MOST = 448.0  # the largest number of e4m3
LEAST = 1e-30  # of a row's largest number: one of zeros
ROWS, WARPS = 16, 4  # of a block: as few rows as a tensor core takes
MANY, MANY_ROWS, MANY_WARPS = 1024, 64, 8  # from so many rows on, those of prompts, blocks are larger
BLOCK = 256  # most columns of a block
DEPTH, PART, PARTS = 256, 1024, 8  # most numbers of a step along `in`; least of a part of it; most parts


def round_and_lower(
    x: jax.Array, most: jax.Array, a: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Rows as 8-bit floats, each scaled to its largest number, and the rows' products with A.

    Args:
      x: bfloat16 `[rows, in]`, `in` a multiple of 128.
      most: float32 `[rows, 1]`: the largest magnitude of each row.
      a: bfloat16 `[r, in]`: every A that reads this input, one below the other.
      interpret: run as plain operations, on any device.

    Returns:
      float8_e4m3fn `[rows, in]`; float32 `[rows, parts times padded(r)]`, side by side the parts that A x is
      the sum of.
    """
    n_rows, size = x.shape
    rank, wide = a.shape[0], padded(a.shape[0])
    part = size // _parts(size)
    tile, warps = (MANY_ROWS, MANY_WARPS) if n_rows > MANY else (ROWS, WARPS)
    return pl.pallas_call(
        partial(_lower_kernel, n_rows=n_rows, rank=rank, depth=_block(part, DEPTH)),
        grid=(size // part, pl.cdiv(n_rows, tile)),
        in_specs=[
            pl.BlockSpec((tile, part), lambda k, i: (i, k)),
            pl.BlockSpec((tile, 1), lambda k, i: (i, 0)),
            pl.BlockSpec((wide, part), lambda k, i: (0, k)),
        ],
        out_specs=[
            pl.BlockSpec((tile, part), lambda k, i: (i, k)),
            pl.BlockSpec((tile, wide), lambda k, i: (i, k)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((n_rows, size), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((n_rows, size // part * wide), jnp.float32),
        ],
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="round_and_lower",
    )(x, most, a)


def _lower_kernel(x_ref, most_ref, a_ref, values_ref, low_ref, *, n_rows: int, rank: int, depth: int):
    real = _real_rows(pl.program_id(1), x_ref.shape[0], n_rows)
    factor = MOST / jnp.maximum(plgpu.load(most_ref, mask=real, other=1.0), LEAST)
    adapter = jax.lax.broadcasted_iota(jnp.int32, (a_ref.shape[0], 1), 0) < rank

    def step(i, total):
        own = pl.ds(i * depth, depth)
        x = plgpu.load(x_ref.at[:, own], mask=real, other=0.0)
        values = (x.astype(jnp.float32) * factor).astype(values_ref.dtype)
        plgpu.store(values_ref.at[:, own], values, mask=real)
        a = plgpu.load(a_ref.at[:, own], mask=adapter, other=0.0)
        return total + plgpu.dot(x, a, trans_b=True)

    total = jnp.zeros(low_ref.shape, jnp.float32)
    total = jax.lax.fori_loop(0, x_ref.shape[1] // depth, step, total)
    plgpu.store(low_ref, total, mask=real)


def scale_and_add(
    ys: Sequence[jax.Array],
    most: jax.Array,
    columns: Sequence[jax.Array],
    low: jax.Array,
    all_b: Sequence[jax.Array],
    scale: float,
    gated: bool = False,
    interpret: bool = False,
) -> list[jax.Array]:
    """Products of rounded rows with their scales, plus those of their adapters, for all of one input.

    Args:
      ys: bfloat16 (or float32) `[rows, out]` each: rounded rows times rounded weights, of any `out` that are
        multiples of 128.
      most: float32 `[rows, 1]`, as `round_and_lower` had it.
      columns: float32 `[1, out]` each: the scales of the weights.
      low: what `round_and_lower` gave.
      all_b: bfloat16 `[out, r]` each, in the order of their A.
      scale: alpha / r.
      gated: there are two, and the only result is silu(first) * second.

    Returns:
      `[rows, out]` each, in the dtype of B.
    """
    n_rows, widths = ys[0].shape[0], [y.shape[1] for y in ys]
    block = min(_block(width, BLOCK) for width in widths)
    # Where the blocks of each projection stand in the grid; a gate's are those of what it gates.
    firsts = [0 if gated else sum(widths[:n]) // block for n in range(len(ys))]
    ends = [first + width // block for first, width in zip(firsts, widths, strict=True)]
    ranks = [sum(b.shape[1] for b in all_b[:n]) for n in range(len(ys) + 1)]
    # A gate has two products in registers, too many for large blocks.
    tile, warps = (MANY_ROWS, MANY_WARPS) if n_rows > MANY and not gated else (ROWS, WARPS)
    specs, outs = [], []
    for first, end, b in zip(firsts, ends, all_b, strict=True):
        # The blocks of other projections stand at this one's nearest, and leave it alone.
        at = partial(lambda j, first, end: jnp.clip(j - first, 0, end - first - 1), first=first, end=end)
        outs.append(pl.BlockSpec((tile, block), lambda j, i, at=at: (i, at(j))))
        specs += [outs[-1], pl.BlockSpec((1, block), lambda j, i, at=at: (0, at(j)))]
        specs.append(pl.BlockSpec((block, b.shape[1]), lambda j, i, at=at: (at(j), 0)))
    rows = [
        pl.BlockSpec((tile, 1), lambda j, i: (i, 0)),
        pl.BlockSpec((tile, low.shape[1]), lambda j, i: (i, 0)),
    ]
    kernel = _gate_kernel if gated else partial(_add_kernel, firsts=firsts, ends=ends)
    shapes = [jax.ShapeDtypeStruct(y.shape, b.dtype) for y, b in zip(ys, all_b, strict=True)]
    return pl.pallas_call(
        partial(kernel, n_rows=n_rows, ranks=ranks, scale=scale),
        grid=(ends[-1], pl.cdiv(n_rows, tile)),
        in_specs=rows + specs,
        out_specs=outs[:1] if gated else outs,
        out_shape=shapes[:1] if gated else shapes,
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name="scale_and_gate" if gated else "scale_and_add",
    )(most, low, *(array for each in zip(ys, columns, all_b, strict=True) for array in each))


def _add_kernel(most_ref, low_ref, *refs, n_rows: int, firsts, ends, ranks, scale: float):
    j, count = pl.program_id(0), len(ends)
    real = _real_rows(pl.program_id(1), most_ref.shape[0], n_rows)
    for n, out_ref in enumerate(refs[3 * count :]):

        @pl.when((j >= firsts[n]) & (j < ends[n]))
        def _(n=n, out_ref=out_ref):
            own = refs[3 * n : 3 * n + 3]
            y = _added(most_ref, low_ref, own, real, padded(ranks[-1]), ranks[n], scale)
            plgpu.store(out_ref, y, mask=real)


def _gate_kernel(most_ref, low_ref, *refs, n_rows: int, ranks, scale: float):
    real = _real_rows(pl.program_id(1), most_ref.shape[0], n_rows)
    gate, up = (
        _added(most_ref, low_ref, own, real, padded(ranks[-1]), first, scale).astype(jnp.float32)
        for own, first in zip((refs[:3], refs[3:6]), ranks, strict=False)
    )
    plgpu.store(refs[6], (gate * jax.nn.sigmoid(gate) * up).astype(refs[6].dtype), mask=real)


def _added(most_ref, low_ref, own, real, wide: int, first: int, scale: float):
    """A block of one projection, whose A begins at row `first` of all."""
    y_ref, columns_ref, b_ref = own
    # All is asked for before any of it is used: else each load would wait for the one before it.
    dtype, column = b_ref.dtype, jax.lax.broadcasted_iota(jnp.int32, (b_ref.shape[0], wide), 1) - first
    out = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0)
    y = plgpu.load(y_ref, mask=real, other=0.0)
    parts = plgpu.load(low_ref, mask=real, other=0.0)
    b = plgpu.load(b_ref.at[out, column], mask=(column >= 0) & (column < b_ref.shape[1]), other=0.0)
    most, columns = plgpu.load(most_ref, mask=real, other=1.0), columns_ref[...]

    low = jnp.sum(parts.reshape(parts.shape[0], -1, wide), axis=1).astype(dtype) * jnp.asarray(scale, dtype)
    delta = plgpu.dot(low, b, trans_b=True)  # b has zeros for the others' rows of A
    scales = jnp.maximum(most, LEAST) * jnp.float32(1 / MOST)
    y = (y.astype(jnp.float32) * scales * columns).astype(dtype)
    return (y.astype(jnp.float32) + delta).astype(dtype)


def padded(rank: int) -> int:
    """The width that the kernels compute this rank in: a power of two, and what a tensor core takes."""
    return max(16, 1 << (rank - 1).bit_length())


def _parts(size: int) -> int:
    """Into how many parts `in` is split: as many as are long enough, a power of two that divides it."""
    return _block(size // 128, min(PARTS, max(1, size // PART)))


def _block(width: int, most: int) -> int:
    """The largest power of two that divides the width, at most this."""
    return min(1 << (most.bit_length() - 1), width & -width)


def _real_rows(block: Any, tile: int, n_rows: int) -> jax.Array:
    """Which rows of this block of `tile` are there, bool `[tile, 1]`."""
    return block * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0) < n_rows
