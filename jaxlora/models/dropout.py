"""Dropout on adapters' inputs: masks determined by (seed, step, row), position, layer and module alone.

    noise = Noise.of(words, positions, rate=0.1)         # both int32 [batch, length]; one word per row
    x = dropped(x, noise.of_layer(3), "layers.self_attn.q_proj")     # (alpha / r) B A x reads this x

As in PEFT, every module has its own mask, kept elements are divided by 1 - rate, and the base's product uses
the whole input. Each element is drawn by hashing its location, so a mask depends neither on how rows are
packed, split over buffers or laid out on a mesh, nor on earlier draws: a resumed run draws the same masks as
an uninterrupted one. The hash is implemented here, so it does not change with library versions.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

_OTHER = 0x9E3779B9  # 2^32 over the golden ratio: derives a second word from a first


class Noise(NamedTuple):
    """A random word per token, uint32 `[batch, length]`, and the dropout rate."""

    words: jax.Array
    rate: float

    @classmethod
    def of(cls, row_words: jax.Array, positions: jax.Array, rate: float) -> Noise:
        """Build from a word per row, repeated at each of its tokens, and the tokens' positions."""
        return cls(_mix(_mix(_words(row_words)) ^ _words(positions)), rate)

    def of_layer(self, layer: jax.Array | int) -> Noise:
        """The words for one layer."""
        return self._replace(words=_mix(self.words ^ _words(layer)))


def kept(noise: Noise, module: str, size: int) -> jax.Array:
    """Which of a module's inputs are kept, bool `[batch, length, size]`, each with probability 1 - rate."""
    first = _mix(noise.words ^ jnp.uint32(zlib.crc32(module.encode())))
    second = _mix(first ^ jnp.uint32(_OTHER))
    features = jax.lax.broadcasted_iota(jnp.uint32, (1, 1, size), 2)
    drawn = _mix(_mix(features ^ first[..., None]) ^ second[..., None])
    return drawn >= jnp.uint32(round(noise.rate * 2**32))


def dropped(x: jax.Array, noise: Noise, module: str) -> jax.Array:
    """x `[batch, length, size]` with dropped elements set to 0 and the others divided by 1 - rate."""
    return jnp.where(kept(noise, module, x.shape[-1]), x / jnp.asarray(1 - noise.rate, x.dtype), 0)


def _words(numbers: jax.Array | int) -> jax.Array:
    return jnp.asarray(numbers).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of 32-bit words whose output looks random."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
