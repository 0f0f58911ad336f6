"""Causal attention within segments, behind one function.

Rows lie end to end in a buffer; `segment_ids` say which row a position belongs to (0: padding). A position
attends to itself and to earlier positions of its own segment, and to nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.errors import UserError
from jaxlora.models.splash import splash_attention


def pick_backend(backend: str, platform: str) -> str:
    """Resolve `auto` for a platform (`cpu`, `gpu`, `tpu`) and refuse what cannot run there.

    Raises:
      UserError: the backend does not exist on this platform.
    """
    if backend == "auto":
        return {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
    needs = {"splash": "tpu", "cudnn": "gpu"}
    if backend in needs and needs[backend] != platform:
        raise UserError(
            f"config.model.attention: {backend} needs a {needs[backend]}, this is a {platform}; give xla or auto"
        )
    return backend


def segment_attention(q, k, v, segment_ids, backend: str = "xla"):
    """Causal attention within segments.

    Args:
      q: `[batch, length, heads, head_dim]`.
      k, v: `[batch, length, kv_heads, head_dim]`.
      segment_ids: int32 `[batch, length]`, 0 for padding; each row's positions are contiguous.
      backend: `xla`, `splash` or `cudnn`.

    Returns:
      `[batch, length, heads, head_dim]` in q's dtype. Values at padding are finite and meaningless.
    """
    if backend == "xla":
        return _xla(q, k, v, segment_ids)
    if backend == "splash":
        return splash_attention(q, k, v, segment_ids)
    raise NotImplementedError(backend)


def _xla(q, k, v, segment_ids):
    length = q.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return jax.nn.dot_product_attention(q, k, v, mask=(same & causal)[:, None], implementation="xla")
