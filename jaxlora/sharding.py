"""Which axis of which array lies on which axis of the device mesh: one table.

The mesh has three axes. `fsdp` splits the base's weights and the tokens of a step; `data` splits the tokens
only; `tensor` splits heads, hidden units of the MLP and the vocabulary. The residual stream's hidden axis is
never split: each layer's weights are gathered over `fsdp` just before they are used. A model with experts may
have a fourth one, `expert`, which splits experts and tokens; of all other weights each part has a copy.

    mesh = make_mesh(MeshConfig(fsdp=8))
    with jax.set_mesh(mesh):
        state = place_trained(mesh, spec, init_state(lora, optim))
        state, metrics = step(state, frozen, place_batch(mesh, batch), rate)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from jaxlora.config import MeshConfig
from jaxlora.runtime.errors import UserError

# logical axis -> mesh axes. An array's first axis that they divide takes them; later ones stay whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # rows, where there are enough: decoding, padded batches
    "length": (
        "data",
        "fsdp",
        "expert",
    ),  # a packed buffer is one row: its tokens are what is split over chips
    "batch_of_copy": ("data", "expert"),  # the same over copies of the base only
    "length_of_copy": ("data", "expert"),
    "expert": ("expert",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "adapter": ("fsdp",),  # the long axis of a LoRA matrix, from SHARD_LORA_FROM_RANK on
}
# Below this rank an adapter with its gradient and moments takes less than 6 GB at Qwen3-8B's size even when
# every projection has one, and gathering it in every layer would cost more time than the memory is worth.
SHARD_LORA_FROM_RANK = 256
LORA_AXES: dict[str, tuple[str | None, str | None]] = {
    "lora_a": (None, "adapter"),  # [r, in]
    "lora_b": ("adapter", None),  # [out, r]
}
EXPERTS = "layers.mlp.experts."  # the weights of experts, whose adapters lie where they do


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh `[data, fsdp, tensor]` over the devices (default: all); with `expert` before the last, if given.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    whole = whole_mesh(config, len(devices))
    sizes = {"data": whole.data, "fsdp": whole.fsdp, "expert": whole.expert, "tensor": whole.tensor}
    if whole.expert in (0, 1):
        del sizes["expert"]
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def whole_mesh(config: MeshConfig, n_devices: int) -> MeshConfig:
    """The mesh's sizes on so many devices, those that are -1 or not given worked out.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": config.data or 1, "fsdp": config.fsdp, "tensor": config.tensor or 1}
    if config.expert:
        sizes["expert"] = config.expert
    if config.fsdp == 0:
        sizes["fsdp"] = 1 if -1 in sizes.values() else -1
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(n_devices // known if size == -1 else size for size in sizes.values())
    if math.prod(shape) != n_devices:
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"config.mesh: {asked} does not fit {n_devices} devices; set one axis to -1")
    return MeshConfig(**dict(zip(sizes, shape, strict=True)))


def decode_mesh(mesh: Mesh, kv_heads: int, experts: int = 1) -> Mesh:
    """The same devices for decoding: split by key-value heads as far as they allow, else by slots.

    Experts are split over the same chips as slots, as far as they allow.
    """
    tensor = math.gcd(mesh.size, kv_heads)
    rest = mesh.size // tensor
    if (expert := math.gcd(rest, experts)) > 1:
        split = mesh.devices.reshape(rest // expert, 1, expert, tensor)
        return Mesh(split, ("data", "fsdp", "expert", "tensor"), axis_types=(AxisType.Auto,) * 4)
    devices = mesh.devices.reshape(rest, 1, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def spec_for(mesh: Any, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The PartitionSpec of an array of this shape with these logical axes (None: not split).

    An axis stays whole where its mesh axes do not divide it or are taken by an earlier axis.
    """
    spec: list[tuple[str, ...] | None] = []
    taken: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        names = _axes_of(mesh, axis) if axis else ()
        split = names and not taken & set(names) and size % _ways(mesh, names) == 0
        spec.append(names if split else None)
        taken |= set(names) if split else set()
    return PartitionSpec(*spec)


def _axes_of(mesh: Any, axis: str) -> tuple[str, ...]:
    """The axes of this mesh that a logical axis is split over."""
    return tuple(name for name in RULES[axis] if name in mesh.shape)


def named(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array of this shape with these logical axes."""
    return NamedSharding(mesh, spec_for(mesh, axes, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def token_shards(mesh: Any) -> int:
    """Over how many chips the tokens of a step are split."""
    return _ways(mesh, _axes_of(mesh, "length"))


def token_multiple(mesh: Mesh) -> int:
    """Buffer lengths must be multiples of this: whole blocks of the attention kernel on every chip."""
    platform = mesh.devices.flat[0].platform
    return token_shards(mesh) * (128 if platform == "tpu" else 1)


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays `[buffers, batch, length]` onto the mesh: rows split over chips, or else tokens.

    Every process gives the same whole arrays; each device receives only its part.
    """
    return {name: _place(x, named(mesh, (None, "batch", "length"), x.shape)) for name, x in batch.items()}


def base_shardings(mesh: Mesh, spec: Any) -> Any:
    """The sharding of each weight of the base, in the form of `spec.abstract_base` (a `ModelSpec`)."""
    axes = _weight_axes(spec)
    return jax.tree.map_with_path(
        lambda path, x: _lying(mesh, path, axes[dotted(path)], x), spec.abstract_base
    )


def weight_shardings(mesh: Mesh, axes: tuple[str | None, ...], weight: Any) -> Any:
    """The sharding of each array of one weight with these axes, which may be quantised or stacked."""
    return jax.tree.map_with_path(lambda path, x: _lying(mesh, path, axes, x), weight)


def _lying(mesh: Mesh, path: Any, axes: tuple[str | None, ...], x: Any) -> NamedSharding:
    own = array_axes(path, axes)
    return named(mesh, (None,) * (len(x.shape) - len(own)) + own, x.shape)


def array_axes(path: Any, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes of one array of a weight that has these axes: the arrays of a quantised one lie as it does."""
    turned = bool(path) and isinstance(path[-1], GetAttrKey) and path[-1].name == "turned"
    return axes[::-1] if turned else axes


def place_trained(mesh: Mesh, spec: Any, tree: Any) -> Any:
    """What is trained, or its optimizer state, onto the mesh by `trained_shardings`."""
    return jax.tree.map(_place, tree, trained_shardings(mesh, spec, tree))


def trained_shardings(mesh: Mesh, spec: Any, tree: Any) -> Any:
    """The sharding of each leaf of what a `ModelSpec` trains, of its gradients, or of any optimizer's state.

    A leaf lies as the array whose path it ends in. An adapter is whole on every device below rank
    `SHARD_LORA_FROM_RANK`, split over `fsdp` along the long axis from there on; a trained weight lies as the
    base's does. Leaves that belong to no array, such as Adam's step counter, are replicated.
    """
    axes = _trained_axes(spec)
    return jax.tree.map_with_path(lambda path, x: named(mesh, axes(path, x), np.shape(x)), tree)


def decode_shardings(mesh: Mesh, state: Any) -> Any:
    """Slots are split over chips; the caches `[slots, length, kv_heads, head_dim]` by heads as well."""
    return jax.tree.map(lambda leaf: named(mesh, _decode_axes(leaf), leaf.shape), state)


def constrain_decode(state: Any) -> Any:
    """`decode_shardings` as constraints inside a jitted function; outside a mesh, the state itself."""
    return jax.tree.map(lambda leaf: constrain(leaf, *_decode_axes(leaf)), state)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask the compiler to lay x out by its logical axes; outside a mesh, x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(mesh, axes, x.shape))


def constrain_trained(spec: Any, tree: Any) -> Any:
    """`trained_shardings` as constraints inside a jitted function; outside a mesh, the tree itself."""
    axes = _trained_axes(spec)
    return jax.tree.map_with_path(lambda path, x: constrain(x, *axes(path, x)), tree)


def gathered(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The weight whole over `fsdp` (its `tensor` axis stays split): an all-gather where it is used."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return weight  # not even a constraint: a scan would keep its result, a second copy of the base
    return constrain(weight, *(None if axis in ("embed", "adapter") else axis for axis in axes))


def gather_again(function: Callable, *, in_loop: bool) -> Callable:
    """Make the backward pass of `function(x, *weights)` gather its weights again.

    Without this the gathered weights would be kept from the forward pass: the whole base on every chip.
    Nothing else is computed twice, because the backward pass of a product needs only its inputs.

    Args:
      in_loop: the caller is the body of a scan, where forward and backward pass are loops of their own and
        the compiler cannot merge their gathers.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return function
    return jax.checkpoint(function, prevent_cse=not in_loop)


def split_tokens(x: jax.Array) -> jax.Array:
    """`[batch, length, ...]` as `[shards, tokens of a shard, ...]`, without moving anything between chips.

    Work that treats shards as rows of a batch then stays on each chip. One device is one shard.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else token_shards(mesh)
    batch, length, *rest = x.shape
    if shards == 1:
        return x.reshape(1, batch * length, *rest)
    if batch % shards == 0:  # rows are split
        y = x.reshape(shards, -1, *rest)
    else:  # each row's tokens are split
        y = x.reshape(batch, shards, length // shards, *rest).swapaxes(0, 1).reshape(shards, -1, *rest)
    return constrain(y, "batch", *(None,) * (y.ndim - 1))


def _ways(mesh: Any, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _weight_axes(spec: Any) -> dict[str, tuple[str | None, ...]]:
    return {weight.place: weight.axes for weight in spec.table}


def dotted(path: Any) -> str:
    """The dotted path of an array, without the numbers of layers and what is outside the tree."""
    return ".".join(key.key for key in path if isinstance(key, DictKey) and isinstance(key.key, str))


def _trained_axes(spec: Any) -> Callable[[Any, Any], tuple[str | None, ...]]:
    """Logical axes of a leaf of what is trained, from its path."""
    weights = _weight_axes(spec) if spec.full else {}
    split_lora = spec.lora is not None and spec.lora.rank >= SHARD_LORA_FROM_RANK

    def axes(path: Any, leaf: Any) -> tuple[str | None, ...]:
        own: tuple[str | None, ...] = ()
        if path and (part := getattr(path[-1], "key", None)) in LORA_AXES:
            own = LORA_AXES[part] if split_lora else (None, None)
            own = ("expert", *own) if EXPERTS in dotted(path) else own
        elif spec.full:
            own = weights.get(dotted(path), ())
        return (None,) * (np.ndim(leaf) - len(own)) + own

    return axes


def _decode_axes(leaf: Any) -> tuple[str | None, ...]:
    return ("batch", None, "kv_heads", None) if leaf.ndim == 4 else ("batch", *(None,) * (leaf.ndim - 1))


def _place(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # several processes: each gives its devices their part of the same array
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
