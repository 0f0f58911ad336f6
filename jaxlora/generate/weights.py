"""The weights in a form suited to decoding.

    spec, lora, weights, mesh = decode_weights(spec, lora, frozen)
    with jax.set_mesh(mesh):
        answers = generate(spec, lora, weights, prompts, ...)

Layers are unrolled, so that their KV caches are updated in place; the adapter is merged, so it costs nothing;
q, k, v and gate, up are fused into one product each. Every token reads all weights: on several chips they are
replicated or split by heads, and stay in place, whereas training gathers them over `fsdp` in every step.
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
from jaxlora.models.quantised import decoding_scheme, for_decoding, is_quantised
from jaxlora.models.spec import JOINED
from jaxlora.sharding import base_shardings, decode_mesh, exchanged, make_mesh, trained_shardings


def decode_weights(
    spec: ModelSpec, trained: Tree, frozen: Tree, *, merge: bool = True, shares: bool = False
) -> tuple[ModelSpec, Tree, Tree, Mesh]:
    """Model, adapter, weights and mesh for decoding; unchanged arrays are shared with the base.

    Works layer by layer, so besides the result it holds only one layer's copies.

    Args:
      trained: the adapter, all weights if the spec is `full`, or `{}`.
      frozen: the base, laid out over a mesh or on one device; `{}` if the spec is `full`.
      merge: replace W by W + (alpha / r) B A, summed in float32 and cast once. Otherwise, or if merging is
        impossible (`ModelSpec.mergeable`), the adapter is returned and applied at every step. The same holds
        for a quantised base: rounding the sum again would lose the update, which is smaller than the steps
        between 8-bit numbers.
      shares: decode on the base's own mesh if no weight would have to be gathered there, even if another mesh
        were faster: unchanged arrays are then never copied.
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
    return form, decode_adapter(form, lora, mesh) if keep else {}, {**outside, "layers": layers}, mesh


def decode_adapter(form: ModelSpec, lora: Tree, mesh: Mesh) -> Tree:
    """The adapter on the mesh of decoding, where `fsdp` splits nothing: else each token would gather it."""
    return jax.tree.map(_moved, lora, trained_shardings(mesh, form, lora))


def decode_form(spec: ModelSpec, mesh: Mesh, merge: bool) -> ModelSpec:
    """The form of a model for decoding on this mesh, see `decode_weights`."""
    scheme = None if spec.scheme is None else decoding_scheme(spec.scheme)
    keep = spec.lora is not None and not (merge and scheme is None and spec.mergeable)
    whole_groups = scheme is None or scheme.kind != "nf4"  # its groups of scales cross the ends of rows
    joined = not keep and mesh.shape["tensor"] == 1 and whole_groups
    lora, shapes = (spec.lora, spec.shapes) if keep else (None, ())
    return replace(spec, lora=lora, shapes=shapes, scan=False, joined=joined, full=False, scheme=scheme)


@cache
def _make_cut(spec: ModelSpec, form: ModelSpec, mesh: Mesh) -> Callable[[Tree, Tree, int], Tree]:
    """A single program that slices a layer out of the stacked ones, each chip its own part.

    Operation by operation, XLA would exchange parts between hosts many times; on CPUs this was seen to
    deadlock.
    """
    return jax.jit(
        lambda stacked, lora, i: _layer(spec, form, jax.tree.map(lambda x: x[i], stacked), lora, i),
        out_shardings=base_shardings(mesh, form)["layers"][0],
    )


def _changed(spec: ModelSpec, form: ModelSpec, layer: Tree, lora: Tree, i: int) -> Tree:
    """Like `_layer`, but with one program for all layers; unchanged arrays are those of the layer."""
    made = jax.tree.map(lambda x: x, layer)
    for path in _joined_paths(form):
        for part in JOINED[path]:
            _take(made, part)
    for path, array in _make_changed(spec, form)(layer, lora, i).items():
        set_path(made, path, array)
    return made


def _joined_paths(form: ModelSpec) -> list[str]:
    """Paths of the fused projections; those of experts are not fused."""
    return [path for path in JOINED if form.joined and not (form.config.experts and path.startswith("mlp."))]


@cache
def _make_changed(spec: ModelSpec, form: ModelSpec) -> Callable[[Tree, Tree, int], dict[str, jax.Array]]:
    """A single program that computes the changed weights of a layer, by dotted path."""
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
    """Remove a module from the tree and return it."""
    parent, _, name = path.rpartition(".")
    return get_path(tree, parent).pop(name)


def _moved(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """x with this sharding; x itself if it already has it, and its memory if only the mesh is another one.

    Programs with custom kernels take arrays of one mesh only.
    """
    alike = x.sharding.is_equivalent_to(sharding, x.ndim)
    if x.sharding == sharding or (alike and sharding.mesh.size == 1):
        return x
    if sharding.is_fully_replicated and not alike and x.sharding.device_set == sharding.device_set:
        return exchanged(x, sharding)
    return jax.device_put(x, sharding)
