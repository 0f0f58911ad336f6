"""Causal attention over rows that lie end to end, by cuDNN's kernels.

    y = packed_attention(q, k, v, *row_lengths(segment_ids, max_segments))

`jax.nn.dot_product_attention` reaches the same kernels, but has no argument for several rows in a line. The
function beneath it has one, but before JAX 0.11 it counts where rows begin among the keys in strides of the
queries, which is wrong where several query heads share a key. So its primitives are called here, with places
that are counted here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn


def row_lengths(segment_ids, max_segments: int) -> tuple[jax.Array, jax.Array]:
    """Lengths and starts of all rows of all lines, one after another.

    Padding at the end of a line counts as one more row, so that every position is written.

    Args:
      segment_ids: int32 `[lines, length]`: 1, 2, ... for the rows of a line, 0 for padding at its end.
      max_segments: most rows in one line, padding not counted.

    Returns:
      int32 `[lines * (max_segments + 1)]` and one number more: first what is there, in order, with starts in
      tokens from the first line's; then lengths of 0 that start at the end.
    """
    last = jnp.max(segment_ids, axis=1, keepdims=True)
    ids = jnp.where(segment_ids == 0, last + 1, segment_ids)
    counts = jnp.sum(ids[:, :, None] == jnp.arange(1, max_segments + 2), axis=1, dtype=jnp.int32)
    counts = counts.reshape(-1)
    there = counts > 0
    place = jnp.where(there, jnp.cumsum(there) - 1, counts.size)
    counts = jnp.zeros_like(counts).at[place].set(counts, mode="drop")
    # Lines are full, so that the rows of the next one begin where these end.
    return counts, jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))


@jax.custom_vjp
def packed_attention(q, k, v, lengths, starts):
    """Causal attention within rows, bfloat16 or float16, on a GPU.

    Args:
      q: `[lines, length, heads, head_dim]`.
      k, v: `[lines, length, kv_heads, head_dim]`.
      lengths, starts: of the rows, see `row_lengths`.

    Returns:
      `[lines, length, heads, head_dim]` in q's dtype.

    Raises:
      NotImplementedError: not on this GPU (JAX asks for Hopper's or later), or not for these shapes.
    """
    return _run(cudnn._dot_product_attention_fwd_p, q, k, v, lengths, starts, is_training=False)[0]


def _forward(q, k, v, lengths, starts):
    y, softmax = _run(cudnn._dot_product_attention_fwd_p, q, k, v, lengths, starts, is_training=True)
    return y, (q, k, v, lengths, starts, softmax, y)


def _backward(saved, g):
    return *_run(cudnn._dot_product_attention_bwd_p, *saved, g), None, None


packed_attention.defvjp(_forward, _backward)


def _run(primitive, q, k, v, lengths, starts, *saved, **more):
    """One of the two primitives. They take places in numbers, not in tokens, and as many for each line."""
    layout, mask = cudnn.AttentionLayout.BTNH, cudnn.MaskType.PADDING_CAUSAL
    training = bool(saved) or more["is_training"]
    version = cudnn.check_cudnn_version()
    cudnn.check_is_flash_attention(q, k, v, layout.value, version, False, training, is_packed=True)
    lines = q.shape[0]
    lengths = lengths.reshape(lines, -1)
    absent = jnp.full(lines - 1, starts[-1])

    def places(x):
        return (jnp.concatenate([starts, absent]) * np.prod(x.shape[2:], dtype=np.int32)).reshape(lines, -1)

    nothing = jnp.zeros(0, q.dtype)
    return primitive.bind(
        *(q, k, v, nothing, lengths, lengths, places(q), places(k), nothing, nothing, *saved),
        scale=q.shape[-1] ** -0.5,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),  # a bias, its gradient
        mask_type=mask,
        layout=layout.value,
        sliding_window_length=None,
        **more,
    )
