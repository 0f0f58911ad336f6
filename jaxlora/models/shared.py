"""Shared prompts: rows whose prompt is stored once in the buffer, and computed once except for attention.

    y = attend_shared(q, k, v, places, attention)        # attention(q, k, v) over whole rows

A buffer holds a prompt, followed by the continuation of each of its rows. Only attention must see whole rows:
queries, keys and values are copied into a wider buffer, in which every row includes the prompt, and the
outputs are copied back. This is exact for any attention. The gradient at a prompt position is the sum over
its copies, in a fixed order, so the same rows give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Index arrays, int32 `[lines, n]` each; an index beyond the end means none."""

    wide: jax.Array  # for each position of the wider buffer, its position in the buffer
    back: jax.Array  # for each position of the buffer, its (first) position in the wider one
    shared: jax.Array  # positions of the buffer that have several copies
    copies: jax.Array  # their positions in the wider buffer, the same number for each, concatenated
    wide_segment_ids: jax.Array  # of the wider buffer

    @classmethod
    def of(cls, buffer: Any) -> Places | None:
        """The places stored in a buffer; None if its rows share no prompt."""
        return cls(*(buffer[name] for name in cls._fields)) if "wide" in buffer else None


def attend_shared(q, k, v, places: Places, attention: Callable[..., jax.Array]) -> jax.Array:
    """`attention` over the wider buffer, for q, k and v `[lines, length, heads, head_dim]` of the buffer."""
    return _contract(attention(*(_expand(x, places) for x in (q, k, v))), places)


@jax.vmap
def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """The rows of x at these positions; 0 beyond the end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _expand(x: jax.Array, places: Places) -> jax.Array:
    return _rows(x, places.wide)


def _expand_backward(places: Places, dy: jax.Array):
    dx = _rows(dy, places.back)
    lines, n = places.shared.shape
    many = _rows(dy, places.copies).reshape(lines, n, -1, *dy.shape[2:])
    sums = jnp.sum(many, axis=2, dtype=jnp.float32).astype(dy.dtype)
    put = jax.vmap(lambda dx, index, sums: dx.at[index].set(sums, mode="drop", unique_indices=True))
    return put(dx, places.shared, sums), None


_expand.defvjp(lambda x, places: (_expand(x, places), places), _expand_backward)


@jax.custom_vjp
def _contract(y: jax.Array, places: Places) -> jax.Array:
    return _rows(y, places.back)


def _contract_backward(places: Places, dy: jax.Array):
    length = places.wide.shape[1]
    first = jax.vmap(partial(jnp.take, mode="fill", fill_value=-1))(places.back, places.wide)
    is_first = first == jnp.arange(length)
    return jnp.where(is_first[:, :, None, None], _rows(dy, places.wide), 0), None


_contract.defvjp(lambda y, places: (_contract(y, places), places), _contract_backward)
