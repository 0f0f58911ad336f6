"""One optimizer step and one validation step, as pure functions under `jax.jit`.

    step = make_train_step(spec, optim, Compute())
    state, metrics = step(state, frozen, batch, learning_rate)

The loss is a sum over answer tokens, so how a step's rows are packed, padded or split over buffers never
changes its gradient. The adapter, its gradients and moments are float32; the base is an argument, never
donated, never closed over. A group of adapters takes the same steps with a leading member axis on its state,
rates and metrics (see `jaxlora.train.fused`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlora.config import OptimConfig, Remat
from jaxlora.models.attention import segment_attention
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.head import head_parts, summed_nll
from jaxlora.runtime.devices import step_options
from jaxlora.sharding import constrain, constrain_lora


class TrainState(NamedTuple):
    """What training changes: the adapter and Adam's moments."""

    lora: Tree
    adam: optax.ScaleByAdamState


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
    remat: Remat = False  # recompute activations in the backward pass, see `jaxlora.models.decoder.Qwen3`
    max_segments: int = 1  # most rows in one line of a buffer


def batch_nll(spec: ModelSpec, lora: Tree, frozen: Tree, buffer: Tree, compute: Compute) -> jax.Array:
    """Summed NLL of one buffer: a float32 scalar, of a group `[members]`.

    The buffer holds arrays `[lines, length]`, see `jaxlora.data.packing`; of a group, line i holds rows of
    member i % members.
    """
    model = spec.bind(lora, frozen)

    def attend(q, k, v, cache):
        segment_ids = buffer["segment_ids"]
        return segment_attention(q, k, v, segment_ids, compute.backend, compute.max_segments), cache

    hidden, _ = model(buffer["tokens"], buffer["positions"], attend, remat=compute.remat)
    nll = summed_nll(hidden, buffer["targets"], buffer["weights"], head_parts(model))
    return nll if spec.member_scales else nll[0]


def batch_weight(spec: ModelSpec, batch: Tree) -> jax.Array:
    """Number of answer tokens of a batch, counted as `batch_nll` sums their loss."""
    weights = batch["weights"]
    members = len(spec.member_scales) or 1
    counts = jnp.sum(weights.reshape(-1, members, weights.shape[-1]), axis=(0, 2))
    return counts if spec.member_scales else counts[0]


def make_train_step(spec: ModelSpec, optim: OptimConfig, compute: Compute):
    """The jitted step `(state, frozen, batch, learning_rate) -> (state, metrics)`; `state` is donated.

    `batch` holds arrays `[buffers, lines, length]`; gradients are summed over the buffers. `metrics` are
    float32 scalars: `nll` (sum), `weight` (its number of tokens), `grad_norm`, `update_norm`. In a group the
    metrics and `learning_rate` are `[members]`. Runs of one process that differ only in their learning rates
    or seeds share one compiled step.
    """
    same = replace(optim, peak_lr=1.0, schedule="constant", warmup_fraction=0.0, min_lr_fraction=0.0)
    return _train_step(spec, same, compute)  # the rate is an argument of the step


@lru_cache(maxsize=8)
def _train_step(spec: ModelSpec, optim: OptimConfig, compute: Compute):
    transform = adam(optim)

    def loss(lora, frozen, buffer):
        nll = batch_nll(spec, lora, frozen, buffer, compute)
        return jnp.sum(nll), nll  # the sum's gradient by a member's adapter is the member's own

    def gradients(lora, frozen, batch):
        gradient = jax.grad(loss, has_aux=True)
        if batch["tokens"].shape[0] == 1:
            return gradient(lora, frozen, jax.tree.map(lambda x: x[0], batch))

        def add(carry, buffer):
            return jax.tree.map(jnp.add, carry, gradient(lora, frozen, buffer)), None

        start = jax.tree.map(jnp.zeros_like, lora), jnp.zeros(len(spec.member_scales) or (), jnp.float32)
        return jax.lax.scan(add, start, batch)[0]

    def update(lora, moments, grads, rate):
        direction, moments = transform.update(grads, moments)
        updates = jax.tree.map(lambda d: -rate * d, direction)
        norms = {"grad_norm": optax.global_norm(grads), "update_norm": optax.global_norm(updates)}
        return optax.apply_updates(lora, updates), moments, norms

    if spec.member_scales:  # each member by itself; Adam's step count is the group's
        axes = optax.ScaleByAdamState(count=None, mu=0, nu=0)  # type: ignore[arg-type]
        update = jax.vmap(update, in_axes=(0, axes, 0, 0), out_axes=(0, axes, 0))

    def train_step(state: TrainState, frozen: Tree, batch: Tree, rate: jax.Array):
        grads, nll = gradients(state.lora, frozen, batch)
        lora, moments, norms = update(state.lora, state.adam, grads, rate)
        metrics = {"nll": nll, "weight": batch_weight(spec, batch)} | norms
        return constrain_lora(spec, TrainState(lora, moments)), _on_every_chip(metrics)

    return jax.jit(train_step, donate_argnums=0, compiler_options=step_options())


@lru_cache(maxsize=8)
def make_eval_step(spec: ModelSpec, compute: Compute):
    """The jitted `(lora, frozen, batch) -> (summed nll, weight)` of validation; forward only.

    Scalars, or `[members]` of a group.
    """

    def eval_step(lora: Tree, frozen: Tree, batch: Tree):
        def add(total, buffer):
            return total + batch_nll(spec, lora, frozen, buffer, compute), None

        start = jnp.zeros(len(spec.member_scales) or (), jnp.float32)
        return _on_every_chip((jax.lax.scan(add, start, batch)[0], batch_weight(spec, batch)))

    return jax.jit(eval_step, compiler_options=step_options())


def _on_every_chip(results: Any) -> Any:
    """Left to itself, XLA may split the members of a group over chips, and no host could read them all."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), results)
