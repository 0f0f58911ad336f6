"""Summed negative log-likelihood, with logits only where there is loss.

Only answer positions need logits, and `[positions, vocab]` in float32 would fill the memory. So the answer
positions of a buffer are gathered, and the output head runs over them in chunks; the number of chunks is
decided at run time, so one compiled program serves any share of answer tokens. Gradients are made in the
same pass (the base is frozen, so only the hidden states and the head's adapter need them): logits are
computed once, where a recomputing backward pass would compute them twice.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxlora.sharding import gathered, split_tokens

CHUNK = 1024  # answer positions a chunk: float32 logits of 0.6 GB at Qwen3's vocabulary


def head_parts(model) -> tuple[jax.Array, tuple[jax.Array, ...], float]:
    """The output head of a bound model: W `[vocab, hidden]`, its adapter (A, B) or (), and alpha / r."""
    head = model.lm_head
    if head is None:
        return model.embed_tokens.weight[...], (), 0.0
    adapter = () if head.lora_a is None else (head.lora_a[...], head.lora_b[...])
    return head.weight[...], adapter, head.scale


def summed_nll(hidden, targets, weights, head) -> jax.Array:
    """Sum over positions of weight * -log p(target), float32.

    Args:
      hidden: `[batch, length, hidden]`, the states after the last norm.
      targets: int32 `[batch, length]`.
      weights: float32 `[batch, length]`; positions of weight 0 cost nothing.
      head: from `head_parts`.
    """
    weight, adapter, scale = head
    weight = gathered(weight, ("vocab", "embed"))  # once, outside the loop over chunks
    hidden, targets, weights = split_tokens(hidden), split_tokens(targets), split_tokens(weights)
    return _summed_nll(hidden, adapter, weight, targets, weights, scale)


def token_nll(hidden, adapter, weight, targets, scale) -> jax.Array:
    """-log p(target) in float32 `[...]` of hidden states `[..., hidden]`; logits are summed in float32."""
    logits = jnp.einsum("...i,oi->...o", hidden, weight, preferred_element_type=jnp.float32)
    if adapter:
        a, b = (x.astype(hidden.dtype) for x in adapter)
        low = jnp.einsum("...i,ri->...r", hidden, a) * scale
        logits += jnp.einsum("...r,or->...o", low, b, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _summed_nll(hidden, adapter, weight, targets, weights, scale):
    def add(total, chunk):
        h, t, w = chunk
        return total + jnp.sum(w * token_nll(h, adapter, weight, t, scale))

    return _over_chunks(add, jnp.float32(0), hidden, targets, weights)


def _forward(hidden, adapter, weight, targets, weights, scale):
    def add(carry, chunk, index):
        total, d_hidden, d_adapter = carry
        h, t, w = chunk
        value, pull = jax.vjp(lambda h, a: jnp.sum(w * token_nll(h, a, weight, t, scale)), h, adapter)
        d_h, d_a = pull(jnp.float32(1))
        d_hidden = _put(d_hidden, index, d_h)
        return total + value, d_hidden, jax.tree.map(jnp.add, d_adapter, d_a)

    start = (jnp.float32(0), jnp.zeros_like(hidden), jax.tree.map(jnp.zeros_like, adapter))
    total, d_hidden, d_adapter = _over_chunks(add, start, hidden, targets, weights, with_index=True)
    return total, (d_hidden, d_adapter)


def _backward(scale, residuals, g):
    d_hidden, d_adapter = residuals
    d_adapter = jax.tree.map(lambda x: g * x, d_adapter)
    return (g * d_hidden.astype(jnp.float32)).astype(d_hidden.dtype), d_adapter, None, None, None


_summed_nll.defvjp(_forward, _backward)


def _over_chunks(add, carry, hidden, targets, weights, with_index=False):
    """Fold `add` over chunks of the positions with a weight, as many chunks as they need."""
    length = weights.shape[1]
    size = min(CHUNK, length)
    # Positions with a weight first, in order; the filler lies outside and is read as weight 0.
    order = jnp.argsort(weights == 0, axis=1, stable=True).astype(jnp.int32)
    counts = jnp.sum(weights != 0, axis=1)
    order = jnp.where(jnp.arange(length)[None] < counts[:, None], order, length)
    order = jnp.pad(order, ((0, 0), (0, -length % size)), constant_values=length)

    def body(i, carry):
        index = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
        inside = jnp.minimum(index, length - 1)
        w = jnp.where(index < length, _pick(weights, inside), 0)
        chunk = (_pick(hidden, inside), _pick(targets, inside), w)
        return add(carry, chunk, index) if with_index else add(carry, chunk)

    n_chunks = (jnp.max(counts) + size - 1) // size
    return jax.lax.fori_loop(0, n_chunks, body, carry)


# Mapped over the lines, so that the compiler sees that each chip needs only its own.
_pick = jax.vmap(lambda line, index: line[index])
_put = jax.vmap(lambda line, index, values: line.at[index].set(values, mode="drop"))
