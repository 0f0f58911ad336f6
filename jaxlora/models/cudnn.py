"""Causal attention over rows that lie end to end, by cuDNN's kernels.

    width = row_width(segment_ids.size, longest_row)
    y = packed_attention(width, q, k, v, *row_lengths(segment_ids, max_segments, width))

`jax.nn.dot_product_attention` reaches the same kernels, but has no argument for several rows in a line. The
function beneath it has one, but before JAX 0.11 it counts where rows begin among the keys in strides of the
queries, which is wrong where several query heads share a key; and it makes each row as wide as a line, while
the kernels launch blocks for every row's whole width. So its primitives are called here, with places that are
counted here, and with a buffer as lines of the width of a row: rows are found by their places alone.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn


def row_width(tokens: int, longest: int) -> int:
    """The least width of a row that holds the longest one and divides all tokens of a buffer, by eights."""
    widths = (n for n in range(longest, tokens + 1) if tokens % n == 0 and (n % 8 == 0 or n == tokens))
    if (width := next(widths, None)) is None:
        raise ValueError(f"a row of {longest} tokens does not fit a buffer of {tokens}")
    return width


def row_lengths(segment_ids, max_segments: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Lengths and starts of all rows of all lines, one after another.

    Padding at the end of a line counts as more rows, so that every position is written.

    Args:
      segment_ids: int32 `[lines, length]`: 1, 2, ... for the rows of a line, 0 for padding at its end.
      max_segments: most rows in one line, padding not counted.
      width: no row is longer, in tokens.

    Returns:
      int32 `[n]` and `[n + 1]`: first what is there, in order, with starts in tokens from the first line's;
      then lengths of 0 that start at the end.
    """
    counts = jnp.sum(segment_ids[:, :, None] == jnp.arange(max_segments + 1), axis=1, dtype=jnp.int32)
    padding = jnp.clip(counts[:, :1] - jnp.arange(0, segment_ids.shape[1], width), 0, width)
    counts = jnp.concatenate([counts[:, 1:], padding], axis=1).reshape(-1)
    there = counts > 0
    place = jnp.where(there, jnp.cumsum(there) - 1, counts.size)
    counts = jnp.zeros_like(counts).at[place].set(counts, mode="drop")
    # Lines are full, so that the rows of the next one begin where these end.
    return counts, jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def packed_attention(width: int, q, k, v, lengths, starts):
    """Causal attention within rows, bfloat16 or float16, on a GPU.

    Args:
      width: of a row, see `row_width`.
      q: `[lines, length, heads, head_dim]`.
      k, v: `[lines, length, kv_heads, head_dim]`.
      lengths, starts: of the rows, see `row_lengths`.

    Returns:
      `[lines, length, heads, head_dim]` in q's dtype.

    Raises:
      NotImplementedError: not on this GPU (JAX asks for Hopper's or later), or not for these shapes.
    """
    (y,) = _run("fwd", width, (q, k, v), lengths, starts, is_training=False)
    return y.reshape(q.shape)


def _forward(width, q, k, v, lengths, starts):
    y, softmax = _run("fwd", width, (q, k, v), lengths, starts, is_training=True)
    return y.reshape(q.shape), (q, k, v, lengths, starts, softmax, y)


def _backward(width, saved, g):
    *qkv, lengths, starts, softmax, y = saved
    found = _run("bwd", width, qkv, lengths, starts, softmax, y, g.reshape(y.shape))
    return *(dx.reshape(x.shape) for dx, x in zip(found, qkv, strict=True)), None, None


packed_attention.defvjp(_forward, _backward)


def _run(way: str, width: int, qkv, lengths, starts, *saved, **more):
    """One of the two primitives, over lines of this width, each of which has as many rows as the others.

    They take places in numbers, not in tokens.
    """
    layout, mask = cudnn.AttentionLayout.BTNH, cudnn.MaskType.PADDING_CAUSAL
    q, k, v = (x.reshape(-1, width, *x.shape[2:]) for x in qkv)
    training = bool(saved) or more["is_training"]
    version = cudnn.check_cudnn_version()
    cudnn.check_is_flash_attention(q, k, v, layout.value, version, False, training, is_packed=True)
    lines = q.shape[0]
    rows = -(-lengths.size // lines)

    def for_lines(x, n: int, absent):
        return jnp.pad(x, (0, lines * n - x.size), constant_values=absent).reshape(lines, n)

    def places(x):
        size = np.prod(x.shape[2:], dtype=np.int32)
        return for_lines(starts * size, rows + 1, lines * width * size)

    nothing, lengths = jnp.zeros(0, q.dtype), for_lines(lengths, rows, 0)
    return getattr(cudnn, f"_dot_product_attention_{way}_p").bind(
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
