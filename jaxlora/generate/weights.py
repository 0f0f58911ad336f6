"""The weights in the form that decoding wants.

    spec, lora, weights, mesh = decode_weights(spec, lora, frozen)
    with jax.set_mesh(mesh):
        answers = generate(spec, lora, weights, prompts, ...)

One tree a layer, whose caches are then updated in place; the adapter merged, so that it costs nothing; q, k,
v and gate, up joined to one product each. Every token reads all weights: on several chips they are split by
heads and stay where they are, where training would gather them over `fsdp` in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxlora.config import MeshConfig
from jaxlora.lora import get_path, merge_lora, set_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.spec import JOINED
from jaxlora.sharding import base_shardings, decode_mesh, make_mesh


def decode_weights(
    spec: ModelSpec, trained: Tree, frozen: Tree, *, merge: bool = True
) -> tuple[ModelSpec, Tree, Tree, Mesh]:
    """Model, adapter, weights and mesh for decoding; arrays that need no change are shared with the base.

    Works layer by layer: beside its result it holds one layer's copies.

    Args:
      trained: what is trained: the adapter, all weights of a spec that is `full`, or `{}`.
      frozen: the base, laid out over a mesh, or on one device; `{}` of a spec that is `full`.
      merge: W + (alpha / r) B A in place of W, the sum in float32, cast once; otherwise, or where that
        cannot be (`ModelSpec.mergeable`), the adapter is returned and applied at every step.
    """
    lora, base = spec.computing(trained, frozen)
    home = _mesh_of(base)
    mesh = decode_mesh(home, spec.config.num_key_value_heads)
    keep = spec.lora is not None and not (merge and spec.mergeable)
    joined = not keep and mesh.shape["tensor"] == 1
    adapter = {"lora": spec.lora, "shapes": spec.shapes} if keep else {"lora": None, "shapes": ()}
    form = replace(spec, scan=False, joined=joined, full=False, **adapter)
    shardings = base_shardings(mesh, form)
    cut = _make_cut(spec, form, home)
    layers = {}
    for i in range(spec.config.num_hidden_layers):
        layer = cut(base["layers"], lora, i) if spec.scan else _layer(spec, form, base["layers"][i], lora, i)
        layers[i] = jax.tree.map(_moved, layer, shardings["layers"][i])
    outside = {name: tree for name, tree in base.items() if name != "layers"}
    rest = {name: shardings[name] for name in outside}
    outside = jax.tree.map(_moved, outside if keep else merge_lora(spec, lora, outside), rest)
    return form, lora if keep else {}, {**outside, "layers": layers}, mesh


@cache
def _make_cut(spec: ModelSpec, form: ModelSpec, mesh: Mesh) -> Callable[[Tree, Tree, int], Tree]:
    """One program that cuts a layer out of the stacked ones, every chip its own part.

    Operation by operation, XLA would exchange parts between hosts many times: on CPUs they were seen to wait
    for one another for ever.
    """
    return jax.jit(
        lambda stacked, lora, i: _layer(spec, form, jax.tree.map(lambda x: x[i], stacked), lora, i),
        out_shardings=base_shardings(mesh, form)["layers"][0],
    )


def _layer(spec: ModelSpec, form: ModelSpec, layer: Tree, lora: Tree, i: int) -> Tree:
    """The weights of layer i in the form for decoding."""
    layer = merge_lora(spec, lora, layer, i) if form.lora is None else jax.tree.map(lambda x: x, layer)
    if form.joined:
        for path, parts in JOINED.items():
            modules = [_take(layer, part) for part in parts]  # each a weight and, in some families, a bias
            arrays = {name: jnp.concatenate([module[name] for module in modules]) for name in modules[0]}
            set_path(layer, path, arrays)
    return layer


def _mesh_of(frozen: Tree) -> Mesh:
    sharding = jax.tree.leaves(frozen)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return make_mesh(MeshConfig(), list(sharding.device_set))


def _take(tree: Tree, path: str) -> Tree:
    """Take a module out of the tree."""
    parent, _, name = path.rpartition(".")
    return get_path(tree, parent).pop(name)


def _moved(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """x in this sharding; x itself where it has it already."""
    return x if x.sharding.is_equivalent_to(sharding, x.ndim) else jax.device_put(x, sharding)
