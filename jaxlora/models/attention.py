"""Causal attention within segments, behind one function.

Rows lie end to end in a buffer; `segment_ids` say which row a position belongs to (0: padding). A position
attends to itself and to earlier positions of its own segment, and to nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.models.splash import splash_attention
from jaxlora.runtime.errors import UserError


def pick_backend(backend: str, platform: str, dtype: str = "bfloat16", n_devices: int = 1) -> str:
    """Resolve `auto` for a platform (`cpu`, `gpu`, `tpu`) and refuse what cannot run there.

    cuDNN computes in 16 bits and on whole rows only, so float32 and tokens split over GPUs take XLA.

    Raises:
      UserError: the backend does not exist on this platform, or not for this dtype or mesh.
    """
    whole_16_bit = dtype == "bfloat16" and n_devices == 1
    if backend == "auto":
        return {"tpu": "splash", "gpu": "cudnn" if whole_16_bit else "xla"}.get(platform, "xla")
    if backend == "cudnn" and not whole_16_bit:
        raise UserError("config.model.attention: cudnn needs bfloat16 and one GPU; give xla or auto")
    needs = {"splash": "tpu", "cudnn": "gpu"}
    if backend in needs and needs[backend] != platform:
        raise UserError(
            f"config.model.attention: {backend} needs a {needs[backend]}, not a {platform}; give xla or auto"
        )
    return backend


def pick_decode_backend(backend: str, platform: str, dtype: str, n_devices: int) -> str:
    """Attention of the decoder, whose kernels are cuDNN's (one GPU in bfloat16) or XLA's."""
    backend = pick_backend(backend, platform, dtype, n_devices)
    return backend if backend == "cudnn" else "xla"


def decode_backend(dtype: str, asked: str = "auto") -> str:
    """Attention of the decoder on this machine's devices."""
    return pick_decode_backend(asked, jax.default_backend(), dtype, jax.device_count())


def segment_attention(q, k, v, segment_ids, backend: str = "xla", max_segments: int = 1):
    """Causal attention within segments.

    Args:
      q: `[batch, length, heads, head_dim]`.
      k, v: `[batch, length, kv_heads, head_dim]`.
      segment_ids: int32 `[batch, length]`, 0 for padding; each row's positions are contiguous.
      backend: `xla`, `splash` or `cudnn`.
      max_segments: most segments in one line, padding not counted (cudnn needs to know).

    Returns:
      `[batch, length, heads, head_dim]` in q's dtype. Values at padding are finite and meaningless.
    """
    if backend == "xla":
        return _xla(q, k, v, segment_ids)
    if backend == "splash":
        return splash_attention(q, k, v, segment_ids)
    if backend == "cudnn":
        return _cudnn(q, k, v, segment_ids, max_segments)
    raise ValueError(f"unknown attention backend {backend!r}")


def _xla(q, k, v, segment_ids):
    length = q.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return jax.nn.dot_product_attention(q, k, v, mask=(same & causal)[:, None], implementation="xla")


def _cudnn(q, k, v, segment_ids, max_segments: int):
    # jax.nn.dot_product_attention reaches the same kernels, but has no argument for several rows in a line.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    lengths, offsets = segment_offsets(segment_ids, max_segments)
    scale, mask = q.shape[-1] ** -0.5, cudnn.MaskType.PADDING_CAUSAL
    return cudnn.dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets, scale=scale, mask_type=mask
    )


def segment_offsets(segment_ids, max_segments: int):
    """Lengths int32 `[batch, max_segments + 1]` and starts `[batch, max_segments + 2]` of the segments.

    Padding at the end of a line counts as one more segment, so that every position is written. What is
    absent is -1, in the last column always: cuDNN closes up the starts of all lines and adds the one end.
    """
    last = jnp.max(segment_ids, axis=1, keepdims=True)
    ids = jnp.where(segment_ids == 0, last + 1, segment_ids)
    counts = jnp.sum(ids[:, :, None] == jnp.arange(1, max_segments + 2), axis=1, dtype=jnp.int32)
    starts = jnp.where(counts > 0, jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts, -1)
    return jnp.where(counts > 0, counts, -1), jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)


def decode_attention(q, keys, values, lengths, backend: str = "xla"):
    """Attention of one new position a row over its cache.

    Args:
      q: `[rows, heads, head_dim]`.
      keys, values: `[rows, length, kv_heads, head_dim]`.
      lengths: int32 `[rows]`, at least 1: how much of the row's cache is filled, the new position included.
      backend: `cudnn` reads each row's own length only; anything else reads the whole length given.

    Returns:
      `[rows, heads, head_dim]` in q's dtype.
    """
    if backend == "cudnn":
        return jax.nn.dot_product_attention(
            q[:, None],
            keys,
            values,
            query_seq_lengths=jnp.ones_like(lengths),
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )[:, 0]
    visible = jnp.arange(keys.shape[1]) < lengths[:, None]
    return jax.nn.dot_product_attention(
        q[:, None], keys, values, mask=visible[:, None, None], implementation="xla"
    )[:, 0]
