"""Causal attention within segments, behind one function.

Rows lie end to end in a buffer; `segment_ids` say which row a position belongs to (0: padding). A position
attends to itself and to earlier positions of its own segment, and to nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlora.models.splash import splash_attention
from jaxlora.runtime.devices import compute_capability
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import auto_mesh, spec_for

AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities


def pick_backend(
    backend: str, platform: str, dtype: str = "bfloat16", capability: tuple[int, ...] = HOPPER
) -> str:
    """Resolve `auto` for a platform (`cpu`, `gpu`, `tpu`) and refuse what cannot run there.

    cuDNN computes in 16 bits only, on Ampere GPUs and later ones. It takes packed rows from Hopper on; before
    that, the rows of a line are laid apart (`cudnn_rows`).

    Args:
      capability: the GPU's compute capability, see `jaxlora.runtime.devices.compute_capability`.

    Raises:
      UserError: the backend does not exist on this platform, or not for this dtype.
    """
    if backend == "auto":
        gpu = "cudnn" if dtype == "bfloat16" and capability >= AMPERE else "xla"
        backend = {"tpu": "splash", "gpu": gpu}.get(platform, "xla")
    if backend == "cudnn" and dtype != "bfloat16":
        raise UserError("config.model.attention: cudnn needs bfloat16; give xla or auto")
    needs = {"splash": "tpu", "cudnn": "gpu"}
    if backend in needs and needs[backend] != platform:
        raise UserError(
            f"config.model.attention: {backend} needs a {needs[backend]}, not a {platform}; give xla or auto"
        )
    if backend == "cudnn" and capability < AMPERE:
        raise UserError("config.model.attention: cudnn needs an Ampere GPU or a later one; give xla or auto")
    return "cudnn_rows" if backend == "cudnn" and capability < HOPPER else backend


def pick_decode_backend(backend: str, platform: str, dtype: str, capability: tuple[int, ...] = HOPPER) -> str:
    """Attention of the decoder, whose kernels are cuDNN's (where training's are) or XLA's."""
    backend = pick_backend(backend, platform, dtype, capability)
    return backend if backend.startswith("cudnn") else "xla"


def decode_backend(dtype: str, asked: str = "auto") -> str:
    """Attention of the decoder on this machine's devices."""
    return pick_decode_backend(asked, jax.default_backend(), dtype, compute_capability(jax.devices()[0]))


def segment_attention(
    q, k, v, segment_ids, backend: str = "xla", max_segments: int = 1, longest_row: int = 0
):
    """Causal attention within segments.

    Args:
      q: `[batch, length, heads, head_dim]`.
      k, v: `[batch, length, kv_heads, head_dim]`.
      segment_ids: int32 `[batch, length]`, 0 for padding; each row's positions are contiguous.
      backend: `xla`, `splash`, `cudnn` or `cudnn_rows`.
      max_segments: most segments in one line, padding not counted (cuDNN needs to know).
      longest_row: tokens that no segment exceeds (cuDNN needs to know); 0, or beyond a line: its length.

    Returns:
      `[batch, length, heads, head_dim]` in q's dtype. Values at padding are finite and meaningless.
    """
    if backend == "xla":
        return _xla(q, k, v, segment_ids)
    if backend == "splash":
        return splash_attention(q, k, v, segment_ids)
    if kernel := {"cudnn": _cudnn, "cudnn_rows": _rows_apart}.get(backend):
        longest = min(longest_row or q.shape[1], q.shape[1])  # of a run: some of its buffers are shorter
        kernel = partial(kernel, max_segments=max_segments, longest=longest)
        return on_each_device(kernel, q, k, v, segment_ids)
    raise ValueError(f"unknown attention backend {backend!r}")


def _xla(q, k, v, segment_ids):
    length = q.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return jax.nn.dot_product_attention(q, k, v, mask=(same & causal)[:, None], implementation="xla")


def _cudnn(q, k, v, segment_ids, max_segments: int, longest: int):
    from jaxlora.models import cudnn  # it takes modules of JAX's own: only where it is needed

    width = cudnn.row_width(segment_ids.size, longest)
    return cudnn.packed_attention(width, q, k, v, *cudnn.row_lengths(segment_ids, max_segments, width))


def _rows_apart(q, k, v, segment_ids, max_segments: int, longest: int, implementation="cudnn"):
    """Attention over the rows of all lines, each in a line of its own that is as long as the longest row."""
    ids = segment_ids[:, None] == jnp.arange(1, max_segments + 1)[:, None]  # [lines, rows, length]
    lengths = jnp.sum(ids, axis=2, dtype=jnp.int32).reshape(-1)
    first = jnp.argmax(ids, axis=2) + segment_ids.shape[1] * jnp.arange(len(segment_ids))[:, None]
    place = jnp.arange(longest)
    places = jnp.where(place < lengths[:, None], first.reshape(-1, 1) + place, segment_ids.size)

    def apart(x):
        return x.reshape(-1, *x.shape[2:]).at[places].get(mode="fill", fill_value=0, unique_indices=True)

    y = jax.nn.dot_product_attention(
        apart(q),
        apart(k),
        apart(v),
        is_causal=True,
        query_seq_lengths=jnp.maximum(lengths, 1),  # a row that is not there has one position of zeros
        key_value_seq_lengths=jnp.maximum(lengths, 1),
        implementation=implementation,
    )
    flat = jnp.zeros((segment_ids.size, *y.shape[2:]), y.dtype)
    return flat.at[places].set(y, mode="drop", unique_indices=True).reshape(q.shape)


def _cudnn_decode(q, keys, values, lengths):
    return jax.nn.dot_product_attention(
        q,
        keys,
        values,
        query_seq_lengths=jnp.ones_like(lengths),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def on_each_device(kernel: Callable, q, k, v, rows):
    """`kernel(q, k, v, rows)` of whole rows, each device with its rows and heads of a mesh.

    Args:
      q, k, v: `[batch, length, heads, head_dim]`.
      rows: what the kernel knows about each row, `[batch, ...]`.
    """
    mesh = auto_mesh()
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, rows)
    batch, _, heads, _ = spec_for(mesh, ("batch", None, "kv_heads", None), k.shape)
    whole, own = PartitionSpec(batch, None, heads, None), PartitionSpec(batch)
    specs = (whole, whole, whole, own)
    return jax.shard_map(kernel, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, rows)


def decode_attention(q, keys, values, lengths, backend: str = "xla"):
    """Attention of one new position a row over its cache.

    Args:
      q: `[rows, heads, head_dim]`.
      keys, values: `[rows, length, kv_heads, head_dim]`.
      lengths: int32 `[rows]`, at least 1: how much of the row's cache is filled, the new position included.
      backend: cuDNN's read each row's own length only; anything else reads the whole length given.

    Returns:
      `[rows, heads, head_dim]` in q's dtype.
    """
    if backend.startswith("cudnn"):
        return on_each_device(_cudnn_decode, q[:, None], keys, values, lengths)[:, 0]
    visible = jnp.arange(keys.shape[1]) < lengths[:, None]
    return jax.nn.dot_product_attention(
        q[:, None], keys, values, mask=visible[:, None, None], implementation="xla"
    )[:, 0]
