"""The large products of `jaxlora.models.grouped` for Hopper GPUs, written in Pallas for Mosaic GPU.

    y = sum_of_products([(rows, weights), (low, b)], expert, transposed=False)    # [rows, out]

Every multiprocessor runs one program, which takes block after block. One of its warpgroups copies rows and
matrices into a ring of buffers in shared memory (TMA), two multiply them (wgmma), each for half of a tile's
rows. Terms are added in the accumulator, so that an adapter costs no pass over the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Term = tuple[jax.Array, jax.Array]
TILE = 128  # rows of a tile: 64 for each of two warpgroups
SMS = 132  # multiprocessors of an H100 or H200
COPIES_REGISTERS, PRODUCTS_REGISTERS = 40, 232  # of a thread; 128 x (40 + 2 x 232) are all there are


class Blocks(NamedTuple):
    """Columns of a block, numbers that one step contracts, buffers of the ring, columns stored at once."""

    width: int = 256
    depth: int = 64
    stages: int = 4
    stored: int = 32


BLOCKS = Blocks()


def supports(terms: Sequence[Term], expert: jax.Array, transposed: bool) -> bool:
    """Whether the kernel takes these shapes: whole tiles, and widths that are multiples of its blocks."""
    rows = terms[0][0]
    width = terms[0][1].shape[2 if transposed else 1]
    if rows.dtype != jnp.bfloat16 or rows.shape[0] != TILE * expert.shape[0] or width % 128:
        return False
    depths = [x.shape[1] for x, _ in terms if x.shape[1] % 64]  # those of adapters
    return len(depths) < 2 and set(depths) <= {16, 32}


def sum_of_products(
    terms: Sequence[Term],
    expert: jax.Array,
    transposed: bool,
    blocks: Blocks = BLOCKS,
    interpret: Any = None,
) -> jax.Array:
    """Sum over terms (x, W) of W x, or of W^T x, with the matrix of each tile's expert; else zeros.

    Args:
      terms: rows `[rows, in]` and matrices `[experts, out, in]`; transposed, rows `[rows, out]`. bfloat16.
      expert: int32 `[tiles]`; a number beyond the last expert: nobody's.
      interpret: parameters of Pallas' simulation of a GPU; None: a GPU.
    """
    rows, (n_experts, *sizes) = terms[0][0], terms[0][1].shape
    width = sizes[1 if transposed else 0]
    blocks = blocks._replace(width=blocks.width if width % blocks.width == 0 else 128)
    if any(x.shape[1] == 32 for x, _ in terms):  # an adapter's matrix takes as much shared memory as a stage
        blocks = blocks._replace(stages=min(blocks.stages, 3))
    work = partial(
        _kernel, blocks=blocks, n_experts=n_experts, transposed=transposed, n_terms=len(terms), width=width
    )
    if transposed:  # the matrices of adapters, which are small, as the forward pass has them
        terms = [(x, w.mT if _is_thin(x, blocks) else w) for x, w in terms]
    kernel = plgpu.kernel(
        work,
        out_type=jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype),
        grid=(SMS if interpret is None else 2,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(expert, *(array for term in terms for array in term))


def _is_thin(x: Any, blocks: Blocks) -> bool:
    """Whether these are rows of an adapter's few numbers."""
    return bool(x.shape[1] % blocks.depth)


def _swizzled(shape: tuple[int, ...], columns: int) -> Any:
    """A buffer in shared memory, laid out for wgmma and without bank conflicts."""
    swizzle = min(128, 2 * columns)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


class _Ring(NamedTuple):
    """Buffers for the operands of several steps, and who may use them."""

    x: Any  # [stages, tile, depth]
    w: Any  # [stages, width, depth]; transposed, [stages, depth, width]
    full: Any  # the copies into a buffer have arrived
    empty: Any  # both warpgroups have multiplied what is in it
    stages: int
    depth: int


def _ring(blocks: Blocks, stages: int, depth: int, transposed: bool) -> dict[str, Any]:
    shape = (stages, depth, blocks.width) if transposed else (stages, blocks.width, depth)
    return {
        "x": _swizzled((stages, TILE, depth), depth),
        "w": _swizzled(shape, min(64, shape[2])),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }


def _kernel(expert_ref, *refs, blocks: Blocks, n_experts: int, transposed: bool, n_terms: int, width: int):
    terms = list(zip(refs[: 2 * n_terms : 2], refs[1 : 2 * n_terms : 2], strict=True))
    out_ref = refs[2 * n_terms]
    deep = [term for term in terms if not _is_thin(term[0], blocks)]
    thin = [term for term in terms if _is_thin(term[0], blocks)]
    thin_depth = thin[0][0].shape[1] if thin else 0
    assert len(thin) <= 1, "adapters of one product lie side by side"
    scratch: dict[str, Any] = {
        "ring": _ring(blocks, blocks.stages, blocks.depth, transposed),
        "out": _swizzled((2, 2, TILE // 2, blocks.stored), blocks.stored),
    }
    if thin:
        scratch["thin_ring"] = _ring(blocks, 1, thin_depth, False)

    @partial(pl.run_scoped, **scratch, collective_axes="wg")
    def _(ring, out, thin_ring=None):
        wide = _Ring(**ring, stages=blocks.stages, depth=blocks.depth)
        small = None if thin_ring is None else _Ring(**thin_ring, stages=1, depth=thin_depth)
        wg, across = jax.lax.axis_index("wg"), width // blocks.width
        n_items = expert_ref.shape[0] * across
        first, step_size = jax.lax.axis_index("sm"), jax.lax.axis_size("sm")
        count = jax.lax.div(n_items - first + step_size - 1, step_size)

        def item(i):
            number = first + i * step_size
            tile, block = jax.lax.div(number, across), jax.lax.rem(number, across)
            owner = expert_ref[tile]
            return tile, block, owner, owner < n_experts

        steps = sum(x.shape[1] // blocks.depth for x, _ in deep)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(COPIES_REGISTERS, action="decrease")

            def one(i, at):
                tile, block, owner, held = item(i)
                place = (tile, block, owner, blocks.width)
                at_wide, at_small = at
                for x, w in deep:
                    n = jnp.where(held, x.shape[1] // blocks.depth, 0)
                    at_wide = jax.lax.fori_loop(0, n, partial(_copy, wide, x, w, place, transposed), at_wide)
                for x, w in thin:
                    copy = partial(_copy, small, x, w, place, False)
                    at_small = jax.lax.fori_loop(0, jnp.where(held, 1, 0), copy, at_small)
                return at_wide, at_small

            at_wide, at_small = jax.lax.fori_loop(0, count, one, (jnp.int32(0), jnp.int32(0)))
            _drain(wide, at_wide)
            if small is not None:
                _drain(small, at_small)

        @pl.when(wg != 2)
        def _():
            plgpu.set_max_registers(PRODUCTS_REGISTERS, action="increase")

            def one(i, at):
                tile, block, _, held = item(i)
                n_wide, n_small = jnp.where(held, steps, 0), jnp.where(held, len(thin), 0)

                @partial(pl.run_scoped, total=plgpu.ACC((TILE // 2, blocks.width), jnp.float32))
                def _(total):
                    _multiply(wide, total, n_wide, at[0], wg, transposed)
                    if small is not None:
                        _multiply(small, total, n_small, at[1], wg, False)
                    _store(total[...], out, out_ref, tile, block, wg, blocks)

                return at[0] + n_wide, at[1] + n_small

            jax.lax.fori_loop(0, count, one, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy(ring: _Ring, x, w, place, transposed: bool, k, at):
    """Start the copies of the operands of one step, once their buffer is free; the number of the next."""
    tile, block, owner, width = place
    slot = jax.lax.rem(at, ring.stages)

    @pl.when(at >= ring.stages)
    def _():
        plgpu.barrier_wait(ring.empty.at[slot])

    deep, wide = pl.ds(k * ring.depth, ring.depth), pl.ds(block * width, width)
    plgpu.copy_gmem_to_smem(x.at[pl.ds(tile * TILE, TILE), deep], ring.x.at[slot], ring.full.at[slot])
    own = w.at[owner, deep, wide] if transposed else w.at[owner, wide, deep]
    plgpu.copy_gmem_to_smem(own, ring.w.at[slot], ring.full.at[slot])
    return at + 1


def _drain(ring: _Ring, at) -> None:
    """Wait until the last steps' buffers are free again: no barrier may be left behind."""

    @pl.loop(jnp.maximum(at - ring.stages, 0), at)
    def _(step):
        plgpu.barrier_wait(ring.empty.at[jax.lax.rem(step, ring.stages)])


def _multiply(ring: _Ring, total, n, at, wg, transposed: bool) -> None:
    """Add the products of the next n steps to the accumulator, and free their buffers."""

    @pl.loop(0, n)
    def _(k):
        slot = jax.lax.rem(at + k, ring.stages)
        plgpu.barrier_wait(ring.full.at[slot])
        w = ring.w.at[slot]
        x = ring.x.at[slot, pl.ds(wg * (TILE // 2), TILE // 2)]
        plgpu.wgmma(total, x, w if transposed else plgpu.transpose_ref(w, (1, 0)))
        late = 1 if ring.stages > 1 else 0  # the product before this one is done, then
        plgpu.wgmma_wait(late)

        @pl.when(k >= late)
        def _():
            plgpu.barrier_arrive(ring.empty.at[jax.lax.rem(at + k - late, ring.stages)])

    if ring.stages > 1:
        plgpu.wgmma_wait(0)

        @pl.when(n > 0)
        def _():
            plgpu.barrier_arrive(ring.empty.at[jax.lax.rem(at + n - 1, ring.stages)])


def _store(total, out, out_ref, tile, block, wg, blocks: Blocks) -> None:
    """Write a warpgroup's half of a block, a few columns at a time."""
    total = total.astype(out_ref.dtype)
    for i in range(blocks.width // blocks.stored):
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        slot = i % 2
        out[wg, slot] = total[:, i * blocks.stored : (i + 1) * blocks.stored]
        plgpu.commit_smem()
        rows = pl.ds(tile * TILE + wg * (TILE // 2), TILE // 2)
        columns = pl.ds(block * blocks.width + i * blocks.stored, blocks.stored)
        plgpu.copy_smem_to_gmem(out.at[wg, slot], out_ref.at[rows, columns])
