"""Large products of `jaxlora.models.grouped` for Hopper GPUs, written in Pallas for Mosaic GPU.

    y = sum_of_products([(rows, weights), (low, b)], expert, transposed=False)    # [rows, out]

Every multiprocessor runs one persistent program that processes block after block. One warpgroup copies rows
and matrices into a ring of buffers in shared memory (TMA); two others multiply them (wgmma), each half of a
tile's rows. Terms are summed in the accumulator, so an adapter costs no extra pass over the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Term = tuple[jax.Array, jax.Array]
TILE = 128  # rows of a tile: 64 for each of two warpgroups
SMS = 132  # multiprocessors of an H100 or H200
COPIES_REGISTERS, PRODUCTS_REGISTERS = 40, 232  # per thread; 128 x (40 + 2 x 232) is nearly all


class Blocks(NamedTuple):
    """Columns of a block, depth contracted per step, buffers of the ring, columns stored at once."""

    width: int = 256
    depth: int = 64
    stages: int = 3
    stored: int = 64


BLOCKS = Blocks()  # the fastest of those tried at Qwen3-30B-A3B's shapes


def supports(terms: Sequence[Term], expert: jax.Array, transposed: bool) -> bool:
    """Whether the kernel supports these shapes: whole tiles, and widths that are multiples of its blocks."""
    rows = terms[0][0]
    width = terms[0][1].shape[2 if transposed else 1]
    if rows.dtype != jnp.bfloat16 or rows.shape[0] != TILE * expert.shape[0] or width % 128:
        return False
    depths = [x.shape[1] for x, _ in terms if x.shape[1] % 64]  # of adapters
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
      expert: int32 `[tiles]`; a number beyond the last expert means none.
      interpret: parameters of Pallas' GPU simulation; None: run on a GPU.
    """
    rows, (n_experts, *sizes) = terms[0][0], terms[0][1].shape
    width = sizes[1 if transposed else 0]
    blocks = blocks._replace(width=blocks.width if width % blocks.width == 0 else 128)
    work = partial(
        _kernel, blocks=blocks, n_experts=n_experts, transposed=transposed, n_terms=len(terms), width=width
    )
    if transposed:  # adapter matrices are small: lay them out as in the forward pass
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
    """Whether these are an adapter's rows, of small width."""
    return bool(x.shape[1] % blocks.depth)


def _swizzled(shape: tuple[int, ...], columns: int) -> Any:
    """A buffer in shared memory, laid out for wgmma and without bank conflicts."""
    swizzle = min(128, 2 * columns)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


class _Ring(NamedTuple):
    """Buffers for the operands of several steps, and the barriers that guard them."""

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


class _Stream(NamedTuple):
    """Terms whose operands pass through one ring."""

    ring: _Ring
    terms: list[tuple[Any, Any]]
    transposed: bool

    @property
    def steps(self) -> int:
        """Number of steps per block."""
        return sum(x.shape[1] // self.ring.depth for x, _ in self.terms)


class _Items(NamedTuple):
    """The blocks that one program computes in sequence."""

    count: Any
    place: Callable[[Any], tuple[Any, Any, Any, Any]]  # tile, block, the tile's expert, whether it has one


def _items(expert_ref, n_experts: int, across: int) -> _Items:
    first, programs = jax.lax.axis_index("sm"), jax.lax.axis_size("sm")
    n_items = expert_ref.shape[0] * across

    def place(i):
        number = first + i * programs
        tile, block = jax.lax.div(number, across), jax.lax.rem(number, across)
        owner = expert_ref[tile]
        return tile, block, owner, owner < n_experts

    return _Items(jax.lax.div(n_items - first + programs - 1, programs), place)


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

    def work(ring, out, thin_ring=None):
        streams = [_Stream(_Ring(**ring, stages=blocks.stages, depth=blocks.depth), deep, transposed)]
        if thin_ring is not None:
            streams.append(_Stream(_Ring(**thin_ring, stages=1, depth=thin_depth), thin, False))
        items, wg = _items(expert_ref, n_experts, width // blocks.width), jax.lax.axis_index("wg")

        @pl.when(wg == 2)
        def copies():
            plgpu.set_max_registers(COPIES_REGISTERS, action="decrease")
            _copy_all(streams, items, blocks.width)

        @pl.when(wg != 2)
        def products():
            plgpu.set_max_registers(PRODUCTS_REGISTERS, action="increase")
            _multiply_all(streams, items, out, out_ref, wg, blocks)

    pl.run_scoped(work, **scratch, collective_axes="wg")


def _copy_all(streams: list[_Stream], items: _Items, width: int) -> None:
    """The work of the copying warpgroup."""

    def one(i, steps):
        tile, block, owner, held = items.place(i)
        done = []
        for (ring, terms, transposed), at in zip(streams, steps, strict=True):
            for x, w in terms:
                copy = partial(_copy, ring, x, w, (tile, block, owner, width), transposed)
                at = jax.lax.fori_loop(0, jnp.where(held, x.shape[1] // ring.depth, 0), copy, at)
            done.append(at)
        return tuple(done)

    steps = jax.lax.fori_loop(0, items.count, one, tuple(jnp.int32(0) for _ in streams))
    for stream, at in zip(streams, steps, strict=True):
        _drain(stream.ring, at)


def _multiply_all(streams: list[_Stream], items: _Items, out, out_ref, wg, blocks: Blocks) -> None:
    """The work of each of the two multiplying warpgroups."""

    def one(i, steps):
        tile, block, _, held = items.place(i)
        new = [jnp.where(held, stream.steps, 0) for stream in streams]

        @partial(pl.run_scoped, total=plgpu.ACC((TILE // 2, blocks.width), jnp.float32))
        def compute(total):
            for stream, n, at in zip(streams, new, steps, strict=True):
                _multiply(stream.ring, total, n, at, wg, stream.transposed)
            _store(total[...], out, out_ref, tile, block, wg, blocks)

        return tuple(at + n for at, n in zip(steps, new, strict=True))

    jax.lax.fori_loop(0, items.count, one, tuple(jnp.int32(0) for _ in streams))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy(ring: _Ring, x, w, place, transposed: bool, k, at):
    """Start copying the operands of one step once their buffer is free; return the next step's number."""
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
    """Wait until the last steps' buffers are free again: no barrier may be left pending."""

    @pl.loop(jnp.maximum(at - ring.stages, 0), at)
    def _(step):
        plgpu.barrier_wait(ring.empty.at[jax.lax.rem(step, ring.stages)])


def _multiply(ring: _Ring, total, n, at, wg, transposed: bool) -> None:
    """Add the products of the next n steps to the accumulator, and free their buffers."""

    @pl.loop(0, n)
    def step(k):
        slot = jax.lax.rem(at + k, ring.stages)
        plgpu.barrier_wait(ring.full.at[slot])
        w = ring.w.at[slot]
        x = ring.x.at[slot, pl.ds(wg * (TILE // 2), TILE // 2)]
        plgpu.wgmma(total, x, w if transposed else plgpu.transpose_ref(w, (1, 0)))
        late = 1 if ring.stages > 1 else 0  # after the wait, the product before this one is done
        plgpu.wgmma_wait(late)

        @pl.when(k >= late)
        def free_earlier():
            plgpu.barrier_arrive(ring.empty.at[jax.lax.rem(at + k - late, ring.stages)])

    if ring.stages > 1:
        plgpu.wgmma_wait(0)

        @pl.when(n > 0)
        def free_last():
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
