"""One optimizer step and one validation step, as pure functions under `jax.jit`.

    step = make_train_step(spec, optim, Compute())
    state, metrics = step(state, frozen, batch, learning_rate)

The loss is a sum over answer tokens, so how a step's rows are packed, padded or split over buffers never
changes its gradient. The adapter, its gradients and moments are float32; the base is an argument, never
donated, never closed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlora.config import OptimConfig
from jaxlora.models.attention import segment_attention
from jaxlora.models.qwen3 import ModelSpec, Tree
from jaxlora.sharding import constrain_lora
from jaxlora.train.loss import head_parts, summed_nll


class TrainState(NamedTuple):
    """What training changes: the adapter and Adam's moments."""

    lora: Tree
    adam: optax.OptState


def adam(optim: OptimConfig) -> optax.GradientTransformation:
    """Adam's direction m̂ / (sqrt(v̂) + eps), eps outside the root and after bias correction (as PyTorch's)."""
    return optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)


def init_state(lora: Tree, optim: OptimConfig) -> TrainState:
    """The state before the first step."""
    return TrainState(lora, adam(optim).init(lora))


@dataclass(frozen=True)
class Compute:
    """How a step is computed; none of it changes a result."""

    backend: str = "xla"  # of attention
    remat: bool = False  # recompute activations in the backward pass
    max_segments: int = 1  # most rows in one line of a buffer


def batch_nll(spec: ModelSpec, lora: Tree, frozen: Tree, buffer: Tree, compute: Compute) -> jax.Array:
    """Summed NLL (float32 scalar) of one buffer: arrays `[batch, length]`, see `jaxlora.data.packing`."""
    model = spec.bind(lora, frozen)

    def attend(q, k, v, cache):
        segment_ids = buffer["segment_ids"]
        return segment_attention(q, k, v, segment_ids, compute.backend, compute.max_segments), cache

    hidden, _ = model(buffer["tokens"], buffer["positions"], attend, remat=compute.remat)
    return summed_nll(hidden, buffer["targets"], buffer["weights"], head_parts(model))


def make_train_step(spec: ModelSpec, optim: OptimConfig, compute: Compute):
    """The jitted step `(state, frozen, batch, learning_rate) -> (state, metrics)`; `state` is donated.

    `batch` holds arrays `[buffers, batch, length]`; gradients are summed over the buffers. `metrics` are
    float32 scalars: `nll` (sum), `weight` (its number of tokens), `grad_norm`, `update_norm`.
    """
    transform = adam(optim)

    def loss(lora, frozen, buffer):
        return batch_nll(spec, lora, frozen, buffer, compute)

    def gradients(lora, frozen, batch):
        if batch["tokens"].shape[0] == 1:
            return jax.value_and_grad(loss)(lora, frozen, jax.tree.map(lambda x: x[0], batch))

        def add(carry, buffer):
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(lora, frozen, buffer)), None

        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, lora))
        return jax.lax.scan(add, start, batch)[0]

    def train_step(state: TrainState, frozen: Tree, batch: Tree, rate: jax.Array):
        nll, grads = gradients(state.lora, frozen, batch)
        direction, moments = transform.update(grads, state.adam)
        updates = jax.tree.map(lambda d: -rate * d, direction)
        metrics = {
            "nll": nll,
            "weight": jnp.sum(batch["weights"]),
            "grad_norm": optax.global_norm(grads),
            "update_norm": optax.global_norm(updates),
        }
        return constrain_lora(spec, TrainState(optax.apply_updates(state.lora, updates), moments)), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(spec: ModelSpec, compute: Compute):
    """The jitted `(lora, frozen, batch) -> (summed nll, weight)` of validation; forward only."""

    def eval_step(lora: Tree, frozen: Tree, batch: Tree):
        def add(total, buffer):
            return total + batch_nll(spec, lora, frozen, buffer, compute), None

        return jax.lax.scan(add, jnp.float32(0), batch)[0], jnp.sum(batch["weights"])

    return jax.jit(eval_step)
