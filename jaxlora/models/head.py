"""The output head: chunked log-probabilities of targets, a loss over them, and its gradient in one pass.

Logits `[positions, vocab]` in float32 would fill the memory, and often only some positions matter (the
answers). So these positions of a buffer are gathered and the head runs over them in chunks. The number of
chunks is dynamic, so one compiled program serves any share of them. Gradients are computed in the same pass,
so logits are computed once; a recomputing backward pass would compute them twice.

    loss, logprobs = chunked_loss(hidden, head_of(model), targets, weights, objective)

Everything that is differentiated gets its exact gradient: hidden states, the head's adapter, and the head's
own matrix (also a tied embedding). Frozen arrays cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.sharding import auto_mesh, gathered, gathered_adapter, split_tokens

CHUNK = 1024  # positions per chunk: 0.6 GB of float32 logits with Qwen3's vocabulary
# objective(logprobs, weights, extras) -> loss per position; float32 [...], extras a tree of such arrays
Objective = Callable[[jax.Array, jax.Array, Any], jax.Array]


class Head(NamedTuple):
    """The output head of a bound model: W `[vocab, hidden]`, and its adapter, already scaled, or None."""

    weight: jax.Array
    lora_a: jax.Array | None = None  # alpha / r times A, float32 [r, hidden]
    lora_b: jax.Array | None = None  # float32 [vocab, r]


def head_of(model) -> Head:
    """The head of a bound `Decoder`; if tied, its embedding, with the head's own adapter if there is one."""
    head = model.lm_head
    if head is None:
        return Head(model.embed_tokens.weight[...])
    weight = model.embed_tokens.weight if head.weight is None else head.weight
    if head.lora_a is None:
        return Head(weight[...])
    return Head(weight[...], head.scale * head.lora_a[...], head.lora_b[...])


def target_logprobs(hidden, head: Head, targets, temperature: float = 1.0) -> jax.Array:
    """log p(target), float32 `[...]`, from hidden states `[..., hidden]`; logits are accumulated in float32.

    The logits are divided by the temperature.
    """
    logits = _product(hidden, head.weight)
    if head.lora_a is not None and head.lora_b is not None:
        a, b = head.lora_a.astype(hidden.dtype), head.lora_b.astype(hidden.dtype)
        low = jnp.einsum("...i,ri->...r", hidden, a)
        logits += jnp.einsum("...r,or->...o", low, b, preferred_element_type=jnp.float32)
    if temperature != 1:
        logits = logits / temperature
    # A comparison rather than a gather: a gather's gradient is a scatter over all logits; this one is fused.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1)


@jax.custom_vjp
def _product(hidden, weight) -> jax.Array:
    """Logits `[..., vocab]`, accumulated in float32, from hidden states and the head `[vocab, hidden]`.

    The backward pass rounds the logits' gradient to the dtype of the hidden states, as every other product
    does. By default JAX would cast the whole head to float32 and multiply with that, four times slower.
    """
    return jnp.einsum("...i,oi->...o", hidden, weight, preferred_element_type=jnp.float32)


def _product_forward(hidden, weight):
    return _product(hidden, weight), (hidden, weight)


def _product_backward(saved, d_logits):
    hidden, weight = saved
    d_logits = d_logits.astype(weight.dtype)  # the dtype of the hidden states
    # The compiler drops the second product if the head is frozen.
    return jnp.einsum("...o,oi->...i", d_logits, weight), jnp.einsum("...o,...i->oi", d_logits, hidden)


_product.defvjp(_product_forward, _product_backward)


def chunked_loss(
    hidden,
    head: Head,
    targets,
    weights,
    objective: Objective,
    extras: Any = (),
    wanted=None,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array | None]:
    """The objective summed over positions, and log p of the targets where requested.

    Args:
      hidden: `[batch, length, hidden]`, the hidden states after the last norm.
      targets: int32 `[batch, length]`.
      weights: float32 `[batch, length]`; positions of weight 0 have no loss and cost nothing.
      objective: see `jaxlora.train.objective`; static.
      extras: a tree of float32 arrays `[batch, length]` that the objective uses.
      wanted: bool `[batch, length]`: where to return log-probabilities besides the loss (in addition to all
        positions with a weight). None: nowhere.
      temperature: logits are divided by this; static.

    Returns:
      the sum, a float32 scalar, and log p(target), float32 `[batch, length]`, 0 where not requested (None
      without `wanted`), which carries no gradient.
    """
    head = _gathered(head, hidden.shape[-1])  # once, outside the loop over chunks
    returns = wanted is not None
    chosen = weights != 0 if wanted is None else wanted | (weights != 0)
    parts = jax.tree.map(split_tokens, (hidden, targets, weights, extras, chosen))
    total, logprobs = _chunked(objective, returns, temperature, head, *parts)
    if not returns:
        return total, None
    return total, jax.lax.stop_gradient(join_like(targets, logprobs))


def _gathered(head: Head, size: int) -> Head:
    """The head of hidden states of this size, gathered over `fsdp`."""
    rows = "vocab" if head.weight.shape[1] < size else "logits"  # the first: a device has part of the columns
    head = head._replace(weight=gathered(head.weight, (rows, "embed")))
    if head.lora_a is None or head.lora_b is None or auto_mesh() is not None:
        return head
    a, b = gathered_adapter(head.lora_a, (None, "embed")), gathered_adapter(head.lora_b, ("vocab", None))
    return head._replace(lora_a=a, lora_b=b)


def join_like(like: jax.Array, split: jax.Array) -> jax.Array:
    """The inverse of `split_tokens`: `[shards, tokens]` in the order of `[batch, length]`."""
    places = split_tokens(jnp.arange(like.size, dtype=jnp.int32).reshape(like.shape))
    return jnp.zeros(like.size, split.dtype).at[places].set(split).reshape(like.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(objective, returns, temperature, head, hidden, targets, weights, extras, chosen):
    def add(carry, chunk, index):
        total, logprobs = carry
        h, t, w, e = chunk
        loss, values = _chunk_loss(objective, temperature, h, head, t, w, e)
        return total + loss, _put(logprobs, index, values) if returns else logprobs

    start = jnp.float32(0), jnp.zeros(targets.shape if returns else (), jnp.float32)
    return _over_chunks(add, start, (hidden, targets, weights, extras), chosen)


def _chunk_loss(objective, temperature, hidden, head, targets, weights, extras):
    """The chunk's summed loss, and log p of its targets."""
    logprobs = target_logprobs(hidden, head, targets, temperature)
    return jnp.sum(objective(logprobs, weights, extras)), logprobs


def _forward(objective, returns, temperature, head, hidden, targets, weights, extras, chosen):
    for given in jax.tree.leaves((weights, extras), is_leaf=_is_primal):
        if given.perturbed:
            raise NotImplementedError("a loss is not differentiated by its weights or extras")
    trained = jax.tree.map(lambda x: x.perturbed, head, is_leaf=_is_primal)
    head, hidden, targets, weights, extras, chosen = jax.tree.map(
        lambda x: x.value, (head, hidden, targets, weights, extras, chosen), is_leaf=_is_primal
    )
    own = [x for x, differs in zip(jax.tree.leaves(head), jax.tree.leaves(trained), strict=True) if differs]

    def with_own(values) -> Head:
        values = iter(values)
        return jax.tree.map(lambda x, differs: next(values) if differs else x, head, trained)

    def add(carry, chunk, index):
        total, logprobs, d_hidden, d_own = carry
        h, t, w, e = chunk
        loss, pull, values = jax.vjp(
            lambda h, own: _chunk_loss(objective, temperature, h, with_own(own), t, w, e),
            h,
            own,
            has_aux=True,
        )
        d_h, d_o = pull(jnp.float32(1))
        d_own = [total + x.astype(jnp.float32) for total, x in zip(d_own, d_o, strict=True)]
        logprobs = _put(logprobs, index, values) if returns else logprobs
        return total + loss, logprobs, _put(d_hidden, index, d_h), d_own

    start = (
        jnp.float32(0),
        jnp.zeros(targets.shape if returns else (), jnp.float32),
        jnp.zeros_like(hidden),
        [jnp.zeros(x.shape, jnp.float32) for x in own],
    )
    parts = (hidden, targets, weights, extras)
    total, logprobs, d_hidden, d_own = _over_chunks(add, start, parts, chosen)
    d_own = [d.astype(x.dtype) for d, x in zip(d_own, own, strict=True)]
    gradients = iter(d_own)
    d_head = jax.tree.map(lambda differs: next(gradients) if differs else None, trained)
    return (total, logprobs), (d_head, d_hidden)


def _backward(objective, returns, temperature, residuals, cotangents):
    g, _ = cotangents  # the log-probabilities carry no gradient
    d_head, d_hidden = jax.tree.map(lambda x: (g * x.astype(jnp.float32)).astype(x.dtype), residuals)
    return d_head, d_hidden, None, None, None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _over_chunks(add, carry, parts, chosen):
    """Fold `add` over as many chunks as the chosen positions need."""
    length = chosen.shape[1]
    size = min(CHUNK, length)
    # Chosen positions first, in order; filler indices are out of range and get weight 0.
    order = jnp.argsort(~chosen, axis=1, stable=True).astype(jnp.int32)
    counts = jnp.sum(chosen, axis=1)
    order = jnp.where(jnp.arange(length)[None] < counts[:, None], order, length)
    order = jnp.pad(order, ((0, 0), (0, -length % size)), constant_values=length)

    def body(i, carry):
        index = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
        inside = jnp.minimum(index, length - 1)
        hidden, targets, weights, extras = jax.tree.map(lambda x: _pick(x, inside), parts)
        return add(carry, (hidden, targets, jnp.where(index < length, weights, 0), extras), index)

    n_chunks = (jnp.max(counts) + size - 1) // size
    return jax.lax.fori_loop(0, n_chunks, body, carry)


# Mapped over lines, so that the compiler sees that each chip needs only its own.
_pick = jax.vmap(lambda line, index: line[index])
_put = jax.vmap(lambda line, index, values: line.at[index].set(values, mode="drop"))
