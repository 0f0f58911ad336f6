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


def head_parts(model) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[float, ...]]:
    """The output head of a bound model: W `[vocab, hidden]`, its adapter or (), and alpha / r of each member.

    The adapter is A `[members, r, hidden]` and B `[members, vocab, r]`; one alone is a group of one.
    """
    head = model.lm_head
    if head is None:
        return model.embed_tokens.weight[...], (), model.scales
    pair = () if head.lora_a is None else (head.lora_a[...], head.lora_b[...])
    return head.weight[...], tuple(x.reshape(-1, *x.shape[-2:]) for x in pair), model.scales


def summed_nll(hidden, targets, weights, head) -> jax.Array:
    """Sum over each member's positions of weight * -log p(target): float32 `[members]`.

    Args:
      hidden: `[lines, length, hidden]`, the states after the last norm; line i is of member i % members.
      targets: int32 `[lines, length]`.
      weights: float32 `[lines, length]`; positions of weight 0 cost nothing.
      head: from `head_parts`.
    """
    weight, adapter, scales = head
    weight = gathered(weight, ("vocab", "embed"))  # once, outside the loop over chunks
    members = max(1, len(scales))  # a base without an adapter is one, too
    owners = jnp.broadcast_to(jnp.arange(len(hidden), dtype=jnp.int32)[:, None] % members, targets.shape)
    parts = (split_tokens(x) for x in (hidden, targets, weights, owners))
    return _summed_nll(next(parts), adapter, weight, *parts, scales)


def token_nll(hidden, adapter, weight, targets, shares) -> jax.Array:
    """-log p(target) in float32 `[...]` of hidden states `[..., hidden]`; logits are summed in float32.

    Args:
      shares: `[..., members]`, with how much of each member's adapter: alpha / r of the position's own
        member, 0 of the others. Members are few and ranks small: nothing beside the product with W.
    """
    logits = head_product(hidden, weight)
    if adapter:
        a, b = (x.astype(hidden.dtype) for x in adapter)
        low = jnp.einsum("...i,mri->...mr", hidden, a) * shares.astype(hidden.dtype)[..., None]
        logits += jnp.einsum("...mr,mor->...o", low, b, preferred_element_type=jnp.float32)
    # A comparison, not a gather: the gradient of a gather is a scatter over all logits, this one's is fused.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


@jax.custom_vjp
def head_product(hidden, weight) -> jax.Array:
    """Logits `[..., vocab]`, summed in float32, of hidden states and the frozen head `[vocab, hidden]`.

    Its backward pass rounds the logits' gradient to the dtype of the hidden states, as every other product
    does. Left to itself, JAX would turn the whole head into float32 and multiply that, four times slower.
    """
    return jnp.einsum("...i,oi->...o", hidden, weight, preferred_element_type=jnp.float32)


def _head_forward(hidden, weight):
    return head_product(hidden, weight), weight


def _head_backward(weight, d_logits):
    # Hidden states have the dtype of the base.
    return jnp.einsum("...o,oi->...i", d_logits.astype(weight.dtype), weight), None


head_product.defvjp(_head_forward, _head_backward)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _summed_nll(hidden, adapter, weight, targets, weights, owners, scales):
    def add(totals, chunk):
        h, t, w, own = chunk
        return totals + _chunk_nll(h, adapter, weight, t, w, own, scales)[1]

    start = jnp.zeros(max(1, len(scales)), jnp.float32)
    return _over_chunks(add, start, (hidden, targets, weights, owners))


def _chunk_nll(hidden, adapter, weight, targets, weights, owners, scales):
    """The chunk's sum, and its sums by member."""
    of_member = owners[..., None] == jnp.arange(max(1, len(scales)))
    shares = of_member * jnp.asarray(scales or (0.0,), jnp.float32)
    nll = weights * token_nll(hidden, adapter, weight, targets, shares)
    # Picked, not multiplied: a member whose loss is NaN must not reach the sums of the others.
    return jnp.sum(nll), jnp.sum(jnp.where(of_member, nll[..., None], 0), axis=(0, 1))


def _forward(hidden, adapter, weight, targets, weights, owners, scales):
    def add(carry, chunk, index):
        totals, d_hidden, d_adapter = carry
        h, t, w, own = chunk
        _, pull, values = jax.vjp(
            lambda h, a: _chunk_nll(h, a, weight, t, w, own, scales), h, adapter, has_aux=True
        )
        d_h, d_a = pull(jnp.float32(1))
        return totals + values, _put(d_hidden, index, d_h), jax.tree.map(jnp.add, d_adapter, d_a)

    totals = jnp.zeros(max(1, len(scales)), jnp.float32)
    start = (totals, jnp.zeros_like(hidden), jax.tree.map(jnp.zeros_like, adapter))
    parts = (hidden, targets, weights, owners)
    totals, d_hidden, d_adapter = _over_chunks(add, start, parts, with_index=True)
    return totals, (d_hidden, d_adapter, owners)


def _backward(scales, residuals, g):
    # A position, like an adapter, belongs to one member: its gradient is that member's own.
    d_hidden, d_adapter, owners = residuals
    d_adapter = jax.tree.map(lambda x: g[:, None, None] * x, d_adapter)
    d_hidden = (g[owners][..., None] * d_hidden.astype(jnp.float32)).astype(d_hidden.dtype)
    return d_hidden, d_adapter, None, None, None, None


_summed_nll.defvjp(_forward, _backward)


def _over_chunks(add, carry, parts, with_index=False):
    """Fold `add` over chunks of the positions with a weight, as many chunks as they need."""
    hidden, targets, weights, owners = parts
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
        chunk = (_pick(hidden, inside), _pick(targets, inside), w, _pick(owners, inside))
        return add(carry, chunk, index) if with_index else add(carry, chunk)

    n_chunks = (jnp.max(counts) + size - 1) // size
    return jax.lax.fori_loop(0, n_chunks, body, carry)


# Mapped over the lines, so that the compiler sees that each chip needs only its own.
_pick = jax.vmap(lambda line, index: line[index])
_put = jax.vmap(lambda line, index, values: line.at[index].set(values, mode="drop"))
