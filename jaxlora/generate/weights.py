"""The weights in the form that decoding wants.

    spec, lora, weights, mesh = decode_weights(spec, lora, frozen)
    with jax.set_mesh(mesh):
        answers = generate(spec, lora, weights, prompts, ...)

One tree a layer, whose caches are then updated in place; the adapter merged, so that it costs nothing; q, k,
v and gate, up joined to one product each. Every token reads all weights: on several chips each has a copy, or
they are split by heads, and stay where they are, where training would gather them over `fsdp` in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxlora.config import MeshConfig
from jaxlora.lora import arrays_by_path, get_path, merge_lora, set_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.quantised import for_decoding, is_quantised
from jaxlora.models.spec import JOINED
from jaxlora.sharding import base_shardings, decode_mesh, make_mesh


def decode_weights(
    spec: ModelSpec, trained: Tree, frozen: Tree, *, merge: bool = True, shares: bool = False
) -> tuple[ModelSpec, Tree, Tree, Mesh]:
    """Model, adapter, weights and mesh for decoding; arrays that need no change are shared with the base.

    Works layer by layer: beside its result it holds one layer's copies.

    Args:
      trained: what is trained: the adapter, all weights of a spec that is `full`, or `{}`.
      frozen: the base, laid out over a mesh, or on one device; `{}` of a spec that is `full`.
      merge: W + (alpha / r) B A in place of W, the sum in float32, cast once; otherwise, or where that
        cannot be (`ModelSpec.mergeable`), the adapter is returned and applied at every step. So it is over a
        quantised base: rounding the sum again would lose the update, which is smaller than the steps between
        8-bit numbers.
      shares: decode on the base's own mesh wherever no weight would have to be gathered there, though
        another one were faster: arrays that need no change are then never copied.
    """
    lora, base = spec.computing(trained, frozen)
    if spec.scheme is not None:
        base = jax.tree.map(for_decoding, base, is_leaf=is_quantised)
    home = _mesh_of(base)
    experts = spec.config.experts.num_experts if spec.config.experts else 1
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    mesh = decode_mesh(home, spec.config.num_key_value_heads, experts, size, shares)
    form = decode_form(spec, mesh, merge)
    keep = form.lora is not None
    shardings = base_shardings(mesh, form)
    cut, changed = _make_cut(spec, form, home), partial(_changed, spec, form)
    layers = {}
    for i in range(spec.config.num_hidden_layers):
        layer = cut(base["layers"], lora, i) if spec.scan else changed(base["layers"][i], lora, i)
        layers[i] = jax.tree.map(_moved, layer, shardings["layers"][i])
    outside = {name: tree for name, tree in base.items() if name != "layers"}
    rest = {name: shardings[name] for name in outside}
    outside = jax.tree.map(_moved, outside if keep else merge_lora(spec, lora, outside), rest)
    return form, lora if keep else {}, {**outside, "layers": layers}, mesh


def decode_form(spec: ModelSpec, mesh: Mesh, merge: bool) -> ModelSpec:
    """The form of a model in decoding on this mesh, see `decode_weights`."""
    scheme = None if spec.scheme is None else replace(spec.scheme, turned=False)
    keep = spec.lora is not None and not (merge and scheme is None and spec.mergeable)
    whole_groups = scheme is None or scheme.kind != "nf4"  # its groups of scales go over the ends of rows
    joined = not keep and mesh.shape["tensor"] == 1 and whole_groups
    lora, shapes = (spec.lora, spec.shapes) if keep else (None, ())
    return replace(spec, lora=lora, shapes=shapes, scan=False, joined=joined, full=False, scheme=scheme)


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


def _changed(spec: ModelSpec, form: ModelSpec, layer: Tree, lora: Tree, i: int) -> Tree:
    """As `_layer`, by one program for all layers; arrays that need no change are the layer's own."""
    made = jax.tree.map(lambda x: x, layer)
    for path in _joined_paths(form):
        for part in JOINED[path]:
            _take(made, part)
    for path, array in _make_changed(spec, form)(layer, lora, i).items():
        set_path(made, path, array)
    return made


def _joined_paths(form: ModelSpec) -> list[str]:
    """The products that are computed as one; those of experts stay as they are."""
    return [path for path in JOINED if form.joined and not (form.config.experts and path.startswith("mlp."))]


@cache
def _make_changed(spec: ModelSpec, form: ModelSpec) -> Callable[[Tree, Tree, int], dict[str, jax.Array]]:
    """One program that makes what differs in a layer, by dotted path."""
    merged = {weight.place.removeprefix("layers.") for weight in spec.adapted if form.lora is None}

    def changed(layer: Tree, lora: Tree, i: int) -> dict[str, jax.Array]:
        before, after = arrays_by_path(layer), arrays_by_path(_layer(spec, form, layer, lora, i))
        return {path: array for path, array in after.items() if path in merged or path not in before}

    return jax.jit(changed)


def _layer(spec: ModelSpec, form: ModelSpec, layer: Tree, lora: Tree, i: int) -> Tree:
    """The weights of layer i in the form for decoding."""
    layer = merge_lora(spec, lora, layer, i) if form.lora is None else jax.tree.map(lambda x: x, layer)
    for path in _joined_paths(form):
        modules = [_take(layer, part) for part in JOINED[path]]  # each a weight and, in some families, a bias
        set_path(layer, path, jax.tree.map(lambda *parts: jnp.concatenate(parts), *modules))
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
