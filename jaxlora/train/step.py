"""One optimizer step, its gradient alone, and one validation step, as pure functions under `jax.jit`.

    step = make_train_step(spec, optim, Compute())
    state, metrics = step(state, frozen, batch, learning_rate)

What is trained is a tree of its own, float32, with its optimizer state: an adapter over a frozen base, or all
weights (`ModelSpec.full`). The base is an argument, never donated, never closed over. The loss is a sum, so
gradient accumulation over the buffers of a batch (its micro-batches) is a sum, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlora.config import MeshConfig, ModelSource, OptimConfig, Remat
from jaxlora.models.attention import pick_backend, segment_attention
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.dropout import Noise
from jaxlora.models.head import chunked_loss, head_of
from jaxlora.models.shared import Places, attend_shared
from jaxlora.runtime.devices import compute_capability, scan_layers, step_options
from jaxlora.sharding import (
    by_line,
    constrain,
    constrain_trained,
    gathers_by_line,
    make_mesh,
    runs_by_line,
    summed_over_lines,
    token_lines,
    total,
)
from jaxlora.train.objective import Loss, objective_of, temperature_of


class TrainState(NamedTuple):
    """What training changes: the trained tree, and optax's state for it."""

    trained: Tree
    opt_state: optax.OptState


@dataclass(frozen=True)
class Compute:
    """How a step is computed; none of it changes a result."""

    backend: str = "xla"  # of attention
    remat: Remat = False  # recompute activations in the backward pass, see `jaxlora.models.decoder.Decoder`
    max_segments: int = 1  # most rows in one line of a buffer
    longest_row: int = 0  # tokens that no row of a buffer exceeds; 0: the length of a line
    by_line: bool = False  # a program a device, each with its own lines, where a mesh allows it


@dataclass(frozen=True)
class Machine:
    """How programs lie on devices: the mesh, attention's kernel, the form of the layers."""

    mesh: Mesh
    backend: str
    scan: bool
    remat: Remat

    def compute(self, max_segments: int = 1, longest_row: int = 0) -> Compute:
        """How steps are computed: at most so many rows in a line of a buffer, of at most so many tokens."""
        asks = self.backend.startswith("cudnn")  # others need no program for each length
        return Compute(self.backend, self.remat, max_segments, longest_row if asks else 0, self.lines > 1)

    @property
    def lines(self) -> int:
        """Lines of a packed buffer."""
        return token_lines(self.mesh)


def wire(model: ModelSource, mesh: MeshConfig | Mesh, devices: list[jax.Device] | None = None) -> Machine:
    """What a configuration asks for, on a mesh or on these devices (default: all).

    Raises:
      UserError: the mesh does not fit the devices, or the kernel does not run on them.
    """
    whole = mesh if isinstance(mesh, Mesh) else make_mesh(mesh, devices)
    device = whole.devices.flat[0]
    platform = device.platform
    backend = pick_backend(model.attention, platform, model.dtype, compute_capability(device))
    return Machine(whole, backend, scan_layers(model.layers, platform), model.remat)


def optimizer(optim: OptimConfig) -> optax.GradientTransformation:
    """The direction of a step: -rate times it is added to what is trained.

    Adam: m̂ / (sqrt(v̂) + eps), eps outside the root and after bias correction (as PyTorch's). With weight
    decay, decoupled (AdamW, Loshchilov and Hutter 2019): plus decay times the value. With clipping, the
    gradients of the whole step are first scaled down to the global norm.

    Only Adam keeps anything, so the state has the same form whatever the settings.
    """
    adam = optax.chain(optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps))

    def update(grads, state, trained=None):
        if optim.clip_norm is not None:
            grads, _ = optax.clip_by_global_norm(optim.clip_norm).update(grads, optax.EmptyState())
        direction, state = adam.update(grads, state)
        if optim.weight_decay:
            decay = optax.add_decayed_weights(optim.weight_decay)
            direction, _ = decay.update(direction, optax.EmptyState(), trained)
        return direction, state

    return optax.GradientTransformation(adam.init, update)


def init_state(trained: Tree, optim: OptimConfig) -> TrainState:
    """The state before the first step."""
    return TrainState(trained, optimizer(optim).init(trained))


Wanted = bool | Literal["weighted"]  # whose log-probabilities: of all targets, or only those with a weight


def buffer_loss(
    spec: ModelSpec,
    trained: Tree,
    frozen: Tree,
    buffer: Tree,
    compute: Compute,
    loss: str | Loss,
    logprobs: Wanted,
) -> tuple[jax.Array, jax.Array | None]:
    """The loss of one buffer summed over its positions, and log p of its targets where asked for.

    The buffer holds arrays `[lines, length]`, see `jaxlora.data.packing`, and in some cases the places of
    prompts that rows share, see `jaxlora.models.shared`; what else is in it beside tokens, targets,
    positions, segment ids and weights are the objective's extras. Adapters drop inputs only where it holds
    `dropout`, as training batches do.
    """
    model = spec.bind(trained, frozen)
    segment_ids = buffer["segment_ids"]

    places = Places.of(buffer)

    def attention(q, k, v):
        ids = segment_ids if places is None else places.wide_segment_ids
        rows = compute.max_segments, compute.longest_row
        return segment_attention(q, k, v, ids, compute.backend, *rows)

    def attend(q, k, v, cache):
        return attention(q, k, v) if places is None else attend_shared(q, k, v, places, attention), cache

    noise = None
    if spec.lora is not None and spec.lora.dropout and "dropout" in buffer:
        noise = Noise.of(buffer["dropout"], buffer["positions"], spec.lora.dropout)
    filled, weights = segment_ids > 0, buffer["weights"]
    real = filled if spec.config.experts else None
    hidden, _ = model(
        buffer["tokens"], buffer["positions"], attend, remat=compute.remat, noise=noise, real=real
    )
    wanted = weights != 0 if logprobs == "weighted" else filled if logprobs else None
    extras = {name: x for name, x in buffer.items() if name not in _BUFFER}
    return chunked_loss(
        hidden,
        head_of(model),
        buffer["targets"],
        weights,
        objective_of(loss),
        extras,
        wanted,
        temperature_of(loss),
    )


_BUFFER = {"tokens", "targets", "positions", "segment_ids", "weights", "dropout", *Places._fields}


def gradients(
    spec: ModelSpec,
    trained: Tree,
    frozen: Tree,
    batch: Tree,
    compute: Compute,
    loss: str | Loss,
    logprobs: Wanted,
) -> tuple[Tree, jax.Array, jax.Array | None]:
    """Gradient and loss of a batch `[buffers, lines, length]`, summed over buffers; log p of its targets."""
    if compute.by_line and runs_by_line(spec, batch["tokens"].shape[1]):
        alone = replace(compute, by_line=False)

        def of_own_lines(trained, frozen, batch):
            grads, value, found = gradients(spec, trained, frozen, batch, alone, loss, logprobs)
            return summed_over_lines(spec, grads), total(value), found

        return by_line(of_own_lines, spec, trained, frozen, batch, ("trained", "whole", "lines"))

    def of_buffer(trained, buffer):
        return buffer_loss(spec, trained, frozen, buffer, compute, loss, logprobs)

    def gradient(buffer):
        (value, found), grads = jax.value_and_grad(of_buffer, has_aux=True)(trained, buffer)
        # Else XLA for GPUs puts the gradients of all layers, the norm and Adam into single kernels that take
        # seconds to compile, one after another.
        return jax.lax.optimization_barrier(grads), value, found

    if batch["tokens"].shape[0] == 1:
        grads, value, found = gradient(jax.tree.map(lambda x: x[0], batch))
        return grads, value, None if found is None else found[None]

    def add(carry, buffer):
        grads, value, found = gradient(buffer)
        return jax.tree.map(jnp.add, carry, (grads, value)), found

    start = jax.tree.map(jnp.zeros_like, trained), jnp.float32(0)
    (grads, value), found = jax.lax.scan(add, start, batch)
    return grads, value, found


def update(optim: OptimConfig, state: TrainState, grads: Tree, rate: jax.Array) -> tuple[TrainState, dict]:
    """One step of the optimizer; global norms of the gradient (before clipping) and of the update."""
    direction, opt_state = optimizer(optim).update(grads, state.opt_state, state.trained)
    updates = jax.tree.map(lambda d: -rate * d, direction)
    norms = {"grad_norm": optax.global_norm(grads), "update_norm": optax.global_norm(updates)}
    return TrainState(optax.apply_updates(state.trained, updates), opt_state), norms


def _options(spec: ModelSpec, compute: Compute) -> dict[str, Any] | None:
    return step_options(compute.by_line and gathers_by_line(spec))


def make_train_step(spec: ModelSpec, optim: OptimConfig, compute: Compute, loss: str = "cross_entropy"):
    """The jitted step `(state, frozen, batch, learning_rate) -> (state, metrics)`; `state` is donated.

    `batch` holds arrays `[buffers, lines, length]`; gradients are summed over the buffers. `metrics` are
    float32 scalars: `nll` (the loss, a sum), `weight` (its number of tokens), `grad_norm`, `update_norm`.
    Runs of one process that differ only in their learning rates or seeds share one compiled step.
    """
    return _train_step(spec, _without_rates(optim), compute, loss)


@lru_cache(maxsize=8)
def _train_step(spec: ModelSpec, optim: OptimConfig, compute: Compute, loss: str):
    def train_step(state: TrainState, frozen: Tree, batch: Tree, rate: jax.Array):
        grads, value, _ = gradients(spec, state.trained, frozen, batch, compute, loss, False)
        state, norms = update(optim, state, grads, rate)
        metrics = {"nll": value, "weight": jnp.sum(batch["weights"])} | norms
        return constrain_trained(spec, state), on_every_chip(metrics)

    return jax.jit(train_step, donate_argnums=0, compiler_options=_options(spec, compute))


@lru_cache(maxsize=8)
def make_gradient_step(
    spec: ModelSpec, compute: Compute, loss: str | Loss = "cross_entropy", logprobs: Wanted = True
):
    """The jitted `(trained, grads, frozen, batch) -> (grads, loss, logprobs)`: gradients add up in `grads`,
    which is donated. `logprobs` are float32 `[buffers, lines, length]`, 0 where they are not wanted.
    """

    def gradient_step(trained: Tree, grads: Tree, frozen: Tree, batch: Tree):
        new, value, found = gradients(spec, trained, frozen, batch, compute, loss, logprobs)
        grads = constrain_trained(spec, jax.tree.map(jnp.add, grads, new))
        return grads, *on_every_chip((value, found))

    return jax.jit(gradient_step, donate_argnums=1, compiler_options=_options(spec, compute))


def make_update_step(spec: ModelSpec, optim: OptimConfig):
    """The jitted `(state, grads, learning_rate) -> (state, norms)`; `state` is donated."""
    return _update_step(spec, _without_rates(optim))


@lru_cache(maxsize=8)
def _update_step(spec: ModelSpec, optim: OptimConfig):
    def update_step(state: TrainState, grads: Tree, rate: jax.Array):
        state, norms = update(optim, state, grads, rate)
        return constrain_trained(spec, state), on_every_chip(norms)

    return jax.jit(update_step, donate_argnums=0)


@lru_cache(maxsize=8)
def make_eval_step(spec: ModelSpec, compute: Compute):
    """The jitted `(trained, frozen, batch) -> (summed nll, weight)` of validation; forward only."""

    def summed(trained: Tree, frozen: Tree, batch: Tree) -> jax.Array:
        def add(so_far, buffer):
            value, _ = buffer_loss(spec, trained, frozen, buffer, compute, "cross_entropy", False)
            return so_far + value, None

        return jax.lax.scan(add, jnp.float32(0), batch)[0]

    def eval_step(trained: Tree, frozen: Tree, batch: Tree):
        if compute.by_line and runs_by_line(spec, batch["tokens"].shape[1]):
            (value,) = by_line(lambda *own: (total(summed(*own)),), spec, trained, frozen, batch, ("whole",))
        else:
            value = summed(trained, frozen, batch)
        return on_every_chip((value, jnp.sum(batch["weights"])))

    return jax.jit(eval_step, compiler_options=_options(spec, compute))


@lru_cache(maxsize=8)
def make_logprob_step(
    spec: ModelSpec, compute: Compute, loss: str | Loss = "cross_entropy", logprobs: Wanted = True
):
    """The jitted `(trained, frozen, batch) -> log p of every target`, float32 `[buffers, lines, length]`.

    Of `loss` only the temperature counts.
    """
    likelihood = Loss("cross_entropy", temperature=temperature_of(loss))

    def of_lines(trained: Tree, frozen: Tree, batch: Tree) -> tuple[jax.Array]:
        def of_buffer(_, buffer):
            return None, buffer_loss(spec, trained, frozen, buffer, compute, likelihood, logprobs)[1]

        return (jax.lax.scan(of_buffer, None, batch)[1],)

    def logprob_step(trained: Tree, frozen: Tree, batch: Tree):
        arguments = trained, frozen, batch
        if compute.by_line and runs_by_line(spec, batch["tokens"].shape[1]):
            return on_every_chip(by_line(of_lines, spec, *arguments, ("lines",))[0])
        return on_every_chip(of_lines(*arguments)[0])

    return jax.jit(logprob_step, compiler_options=_options(spec, compute))


@lru_cache(maxsize=8)
def make_row_step(spec: ModelSpec, compute: Compute):
    """The jitted `(trained, frozen, batch) -> summed nll of each row`, as `make_eval_step` row by row:
    float32 `[buffers, lines, segments]`, a row's place is its segment id; that of padding, 0, holds 0.
    """

    def row_step(trained: Tree, frozen: Tree, batch: Tree):
        def of_buffer(_, buffer):
            _, found = buffer_loss(spec, trained, frozen, buffer, compute, "cross_entropy", "weighted")
            losses = -buffer["weights"] * found
            add = partial(jax.ops.segment_sum, num_segments=compute.max_segments + 1)
            return None, jax.vmap(add)(losses, buffer["segment_ids"])

        return on_every_chip(jax.lax.scan(of_buffer, None, batch)[1])

    return jax.jit(row_step, compiler_options=step_options())


def _without_rates(optim: OptimConfig) -> OptimConfig:
    """The learning rate is an argument of a step: what it follows from must not tell two programs apart."""
    return replace(optim, peak_lr=1.0, schedule="constant", warmup_fraction=0.0, min_lr_fraction=0.0)


def on_every_chip(results: Any) -> Any:
    """Left to itself, XLA may split results over chips, and no host could read them all."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), results)
