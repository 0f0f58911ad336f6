"""Segment attention on TPUs with the splash attention kernel (Pallas), over a mesh.

Queries stay on the chip that holds their tokens; keys and values, which grouped-query attention keeps small,
are gathered from the chips that share the row. Heads are split over `tensor`. For attention alone, a chip's
tokens are padded if that allows fewer and larger blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.runtime.errors import UserError
from jaxlora.sharding import auto_mesh, spec_for

BLOCK = 128  # the kernel's blocks are multiples of this many tokens
LARGEST_BLOCK = 512
STEP = 1.35e5  # scores that a v5e could compute in the overhead between two blocks (0.35 us)


def splash_attention(q, k, v, segment_ids, *, interpret: bool = False) -> jax.Array:
    """Causal attention within segments; shapes as in `jaxlora.models.attention.segment_attention`.

    Args:
      interpret: run the kernel in interpret mode on any platform, for tests.

    Raises:
      UserError: a chip's tokens are not a multiple of 128, or the mesh cannot split the heads.
    """
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not scale
    mesh = auto_mesh()
    if mesh is None:
        block, padded = _block(q.shape[1])
        kernel = _kernel(padded, block, q.shape[2], 1, 1, interpret)
        n = q.shape[1]
        q, k, v, ids = (_padded(x, padded) for x in (q, k, v, segment_ids))
        return _attend(kernel, q, k, v, ids, ids)[:, :n]

    tensor = mesh.shape["tensor"]
    if k.shape[2] % tensor:
        raise UserError(f"config.mesh.tensor: {tensor} does not divide {k.shape[2]} key-value heads")
    rows, tokens, heads, _ = spec_for(mesh, ("batch", "length", "kv_heads", None), k.shape)
    shards = 1
    for name in tokens or ():
        shards *= mesh.shape[name]
    n = q.shape[1] // shards
    block, padded = _block(n)
    kernel = _kernel(padded * shards, block, q.shape[2], shards, tensor, interpret)
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads, tokens)))

    def on_each_chip(kernel, q, k, v, segment_ids):
        def whole(x):
            return jax.lax.all_gather(x, tokens, axis=1, tiled=True) if tokens else x

        q, k, v, ids = (_padded(x, padded) for x in (q, k, v, segment_ids))
        return _attend(kernel, q, whole(k), whole(v), ids, whole(ids))[:, :n]

    split, split_ids = PartitionSpec(rows, tokens, heads, None), PartitionSpec(rows, tokens)
    in_specs = (kernel_spec, split, split, split, split_ids)
    mapped = jax.shard_map(on_each_chip, in_specs=in_specs, out_specs=split, check_vma=False)
    return mapped(kernel, q, k, v, segment_ids)


def _attend(kernel: Any, q, k, v, q_segments, kv_segments) -> jax.Array:
    """Apply the kernel to each row of the batch; it takes heads first."""

    def row(q, k, v, q_ids, kv_ids):
        out = kernel(*(x.swapaxes(0, 1) for x in (q, k, v)), segment_ids=splash.SegmentIds(q_ids, kv_ids))
        return out.swapaxes(0, 1)

    return jax.vmap(row)(q, k, v, q_segments, kv_segments)


def _padded(x: jax.Array, length: int) -> jax.Array:
    """x `[batch, tokens, ...]` zero-padded to this many tokens; only padding attends to padding."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _kernel(length: int, block: int, heads: int, q_shards: int, head_shards: int, interpret: bool):
    """The kernel with its causal block structure; its arrays become constants of the traced program."""
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask(
        [splash.CausalMask((length, length), shard_count=q_shards) for _ in range(heads)]
    )
    return splash.make_splash_mha(
        mask, block_sizes=blocks, head_shards=head_shards, q_seq_shards=q_shards, interpret=interpret
    )


def _block(length: int) -> tuple[int, int]:
    """The block size for a chip's tokens, a multiple of 128 up to 512, and the padded number of tokens: the
    pair that minimises the total time of scores and of the overhead between blocks."""
    if length % BLOCK:
        raise UserError(
            f"splash attention: {length} tokens on a chip are not a multiple of {BLOCK};"
            " set train.buffer_multiple to a multiple of 128 times the chips that share a buffer"
        )
    sizes = range(LARGEST_BLOCK, 0, -BLOCK)
    return min(
        ((size, -(-length // size) * size) for size in sizes),
        key=lambda choice: choice[1] ** 2 * (1 + STEP / choice[0] ** 2),
    )
