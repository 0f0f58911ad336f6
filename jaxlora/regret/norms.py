"""The size of each matrix's update: spectral norms of A, B and (alpha / r) B A, stable rank, relative to W.

    adapter_norms(spec, trained, weight_norms(spec, base))    # {"layers.self_attn.q_proj": {"a": [...], ...}}
    change_norms(spec, masters, start, of_weights)            # full fine-tuning: W - W0 instead of B A

Spectral norms come from power iteration in float32, which underestimates the true norm by about a hundredth
or less; the matrices of all layers form one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.lora import get_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.spec import Weight
from jaxlora.runtime.devices import decoder_options

ITERATIONS = 40
Norms = dict[str, dict[str, list[float]]]  # by weight and kind of norm; one number per layer
_HIGHEST = jax.lax.Precision.HIGHEST


def spectral_norm(apply: Callable, transposed: Callable, size: int, stack: tuple[int, ...]) -> jax.Array:
    """The largest singular value of each operator of a stack, float32 `stack`.

    Args:
      apply, transposed: the operator and its transpose on vectors `[*stack, n]`.
      size: n of `apply`'s input.
    """
    start = jax.random.normal(jax.random.key(0), (*stack, size), jnp.float32)

    def once(_, v):
        w = transposed(apply(v))
        return w / jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-30)

    return jnp.linalg.norm(apply(jax.lax.fori_loop(0, ITERATIONS, once, once(0, start))), axis=-1)


def _times(matrix: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("...oi,...i->...o", matrix, v, precision=_HIGHEST)


def _matrix_norm(matrix: jax.Array) -> jax.Array:
    turned = jnp.swapaxes(matrix, -1, -2)
    return spectral_norm(
        lambda v: _times(matrix, v), lambda v: _times(turned, v), matrix.shape[-1], matrix.shape[:-2]
    )


def _pair_norms(a: jax.Array, b: jax.Array, scale: float) -> dict[str, jax.Array]:
    a_t, b_t = jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2)
    product = spectral_norm(
        lambda v: scale * _times(b, _times(a, v)),
        lambda v: scale * _times(a_t, _times(b_t, v)),
        a.shape[-1],
        a.shape[:-2],
    )
    outer_a = jnp.einsum("...ri,...si->...rs", a, a, precision=_HIGHEST)
    outer_b = jnp.einsum("...or,...os->...rs", b, b, precision=_HIGHEST)
    squares = scale**2 * jnp.sum(outer_a * outer_b, axis=(-2, -1))  # Frobenius norm of the product, squared
    stable = squares / jnp.maximum(jnp.square(product), 1e-30)
    return {"a": _matrix_norm(a), "b": _matrix_norm(b), "update": product, "stable_rank": stable}


def _change_norms(weight: jax.Array, start: jax.Array) -> dict[str, jax.Array]:
    change = weight.astype(jnp.float32) - start.astype(jnp.float32)
    norm = _matrix_norm(change)
    stable = jnp.sum(jnp.square(change), axis=(-2, -1)) / jnp.maximum(jnp.square(norm), 1e-30)
    return {"update": norm, "stable_rank": stable}


def matrices(spec: ModelSpec) -> list[Weight]:
    """The weights that an adapter can target, without the output head of a tied model."""
    return [weight for weight in spec.table if weight.lora_group]


def weight_of(tree: Tree, weight: Weight, layers: int) -> jax.Array:
    """The weight's array, stacked over layers whether the tree stores layers stacked or one by one."""
    if not weight.stacked or 0 not in tree["layers"]:
        return get_path(tree, weight.path)["weight"]
    path = weight.path.removeprefix("layers.")
    return jnp.stack([get_path(tree["layers"][i], path)["weight"] for i in range(layers)])


def weight_norms(spec: ModelSpec, base: Tree) -> dict[str, list[float]]:
    """Spectral norm of each matrix of the base, by path: one number per layer."""
    return {path: _plain(norms) for path, norms in _weight_program(spec)(base).items()}


def adapter_norms(spec: ModelSpec, trained: Tree, of_weights: dict[str, list[float]]) -> Norms:
    """Norms of A, B and the update of each adapted weight, and the update's stable rank and share of W."""
    found = _adapter_program(spec)(trained)
    return {path: _with_share(values, of_weights.get(path)) for path, values in found.items()}


def change_norms(spec: ModelSpec, trained: Tree, start: Tree, of_weights: dict[str, list[float]]) -> Norms:
    """The same for the change that full fine-tuning made to each matrix."""
    found = _change_program(spec)(trained, start)
    return {path: _with_share(values, of_weights.get(path)) for path, values in found.items()}


# One program for all matrices: compiling one per shape would take longer than a run.


@lru_cache(maxsize=4)
def _weight_program(spec: ModelSpec) -> Callable[[Tree], dict[str, jax.Array]]:
    def norms(base: Tree) -> dict[str, jax.Array]:
        layers = spec.config.num_hidden_layers
        return {w.path: _matrix_norm(weight_of(base, w, layers).astype(jnp.float32)) for w in matrices(spec)}

    return jax.jit(norms, compiler_options=decoder_options())


@lru_cache(maxsize=4)
def _adapter_program(spec: ModelSpec) -> Callable[[Tree], dict[str, dict[str, jax.Array]]]:
    def norms(trained: Tree) -> dict[str, dict[str, jax.Array]]:
        pairs = {weight.path: get_path(trained, weight.path) for weight in spec.adapted}
        return {path: _pair_norms(pair["lora_a"], pair["lora_b"], spec.scale) for path, pair in pairs.items()}

    return jax.jit(norms, compiler_options=decoder_options())


@lru_cache(maxsize=4)
def _change_program(spec: ModelSpec) -> Callable[[Tree, Tree], dict[str, dict[str, jax.Array]]]:
    def norms(trained: Tree, start: Tree) -> dict[str, dict[str, jax.Array]]:
        layers = spec.config.num_hidden_layers
        return {
            w.path: _change_norms(weight_of(trained, w, layers), weight_of(start, w, layers))
            for w in matrices(spec)
        }

    return jax.jit(norms, compiler_options=decoder_options())


def _with_share(values: dict[str, jax.Array], of_weight: list[float] | None) -> dict[str, list[float]]:
    plain = {name: _plain(value) for name, value in values.items()}
    if of_weight is not None:
        plain["share"] = [_short(u / w) for u, w in zip(plain["update"], of_weight, strict=True)]
    return plain


def _plain(values: Any) -> list[float]:
    return [_short(float(x)) for x in np.atleast_1d(np.asarray(values))]


def _short(value: float) -> float:
    """Four digits, to keep result files small."""
    return float(f"{value:.4g}")
