"""Which axis of which array lies on which axis of the device mesh: one table.

The mesh has three axes. `fsdp` splits the base's weights and the tokens of a step; `data` splits the tokens
only; `tensor` splits heads, hidden units of the MLP and the vocabulary. The residual stream's hidden axis is
never split: each layer's weights are gathered over `fsdp` just before they are used. A model with experts may
have a fourth one, `expert`, which splits experts and tokens; of all other weights each part has a copy.

On GPUs a buffer has a line of whole rows for each device that tokens are split over. Without `tensor` a
device then needs nothing of the others' lines, and a step is one program a device (`by_line`): its
collectives are those written here, and none that a compiler finds.

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
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from jaxlora.config import MeshConfig
from jaxlora.runtime.devices import devices_here, memory_of
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
COPY_SHARE = 0.25  # of a GPU's memory that the decoder's copy of the weights may take
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
    devices = devices_here() if devices is None else devices
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


def decode_mesh(mesh: Mesh, kv_heads: int, experts: int = 1, weights: int = 0, shares: bool = False) -> Mesh:
    """The same devices for decoding.

    On GPUs every device decodes with a copy of the weights (so many bytes) where that leaves memory for the
    base and the caches; else, and on TPUs, they are split by key-value heads as far as these allow. Experts
    are split over the same chips as slots, as far as they allow.

    Args:
      shares: decode on the mesh itself where `fsdp` splits nothing: the weights then stay the same arrays.
    """
    if shares and mesh.shape["fsdp"] == 1:
        return mesh
    tensor, device = math.gcd(mesh.size, kv_heads), mesh.devices.flat[0]
    memory = memory_of(device) if device.platform == "gpu" else None
    if memory is not None:
        fits = [n for n in range(1, tensor) if tensor % n == 0 and weights <= COPY_SHARE * memory * n]
        tensor = min(fits, default=tensor)
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


def token_lines(mesh: Mesh) -> int:
    """Lines of a packed buffer: on GPUs one for each device that tokens are split over; elsewhere one in all.

    GPUs' kernels need whole rows; that of TPUs attends over one line whose tokens lie on many chips.
    """
    return token_shards(mesh) if mesh.devices.flat[0].platform == "gpu" else 1


def token_multiple(mesh: Mesh) -> int:
    """Lengths of lines must be multiples of this: whole blocks of the attention kernel on every chip."""
    platform = mesh.devices.flat[0].platform
    return token_shards(mesh) // token_lines(mesh) * (128 if platform == "tpu" else 1)


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
    return named(mesh, _stacked(array_axes(path, axes), x), x.shape)


def _stacked(axes: tuple[str | None, ...], x: Any) -> tuple[str | None, ...]:
    """The axes of x, which may have more in front, such as that of layers; those are not split."""
    return (None,) * (np.ndim(x) - len(axes)) + axes


def array_axes(path: Any, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes of one array of a weight that has these axes: the arrays of a quantised one lie as it does."""
    turned = bool(path) and isinstance(path[-1], GetAttrKey) and path[-1].name == "turned"
    return axes[::-1] if turned else axes


def abstract(tree: Any, shardings: Any) -> Any:
    """What these arrays are and where they lie, without any array."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def device_bytes(tree: Any) -> int:
    """Bytes of `abstract` arrays on one device."""

    def own(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(own, jax.tree.leaves(tree)))


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
    mesh = auto_mesh()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(mesh, axes, x.shape))


def constrain_trained(spec: Any, tree: Any) -> Any:
    """`trained_shardings` as constraints inside a jitted function; outside a mesh, the tree itself."""
    axes = _trained_axes(spec)
    return jax.tree.map_with_path(lambda path, x: constrain(x, *axes(path, x)), tree)


def gathered(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The weight whole over `fsdp` (its `tensor` axis stays split): an all-gather where it is used."""
    if fsdp_ways() == 1:
        return weight  # not even a constraint: a scan would keep its result, a second copy of the base
    if auto_mesh() is None:
        return _whole_over_fsdp(weight, axes.index("embed")) if "embed" in axes else weight
    return constrain(weight, *(None if axis in ("embed", "adapter") else axis for axis in axes))


def gathered_adapter(matrix: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`gathered` for A `[r, in]` or B `[out, r]` with the axes of what it adapts; None for the axis of r."""
    if fsdp_ways() == 1 or auto_mesh() is not None:
        return gathered(matrix, axes)
    long = next(i for i, axis in enumerate(axes) if axis is not None)
    return _whole_over_fsdp(matrix, long) if matrix.shape[1 - long] >= SHARD_LORA_FROM_RANK else matrix


def _whole_over_fsdp(x: jax.Array, axis: int) -> jax.Array:
    """Inside `by_line`: all parts of x, whose gradient is summed and split again."""
    return jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)


def gather_again(function: Callable, *, in_loop: bool) -> Callable:
    """Make the backward pass of `function(x, *weights)` gather its weights again.

    Without this the gathered weights would be kept from the forward pass: the whole base on every chip.
    Nothing else is computed twice, because the backward pass of a product needs only its inputs.

    Args:
      in_loop: the caller is the body of a scan, where forward and backward pass are loops of their own and
        the compiler cannot merge their gathers.
    """
    if fsdp_ways() == 1:
        return function
    return jax.checkpoint(function, prevent_cse=not in_loop)


def split_tokens(x: jax.Array) -> jax.Array:
    """`[batch, length, ...]` as `[shards, tokens of a shard, ...]`, without moving anything between chips.

    Work that treats shards as rows of a batch then stays on each chip. One device is one shard.
    """
    mesh = auto_mesh()
    shards = 1 if mesh is None else token_shards(mesh)
    batch, length, *rest = x.shape
    if shards == 1:
        return x.reshape(1, batch * length, *rest)
    if batch % shards == 0:  # rows are split
        y = x.reshape(shards, -1, *rest)
    else:  # each row's tokens are split
        y = x.reshape(batch, shards, length // shards, *rest).swapaxes(0, 1).reshape(shards, -1, *rest)
    return constrain(y, "batch", *(None,) * (y.ndim - 1))


# --- One program a device -----------------------------------------------------------------------------------


def auto_mesh() -> Any:
    """The mesh over which the compiler splits what is traced now; None outside one and inside `by_line`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def fsdp_ways() -> int:
    """Over how many devices the base is split, inside `by_line` too; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["fsdp"]


def runs_by_line(spec: Any, lines: int) -> bool:
    """Whether a step over buffers of so many lines may run by `by_line`, on the mesh of this context.

    `fsdp` must divide all that it splits, because a device's part does not say what it is a part of.
    """
    mesh = auto_mesh()
    if mesh is None or mesh.shape["tensor"] > 1 or lines % token_shards(mesh):
        return False
    if spec.config.experts is not None:  # their products are programs a device of their own
        return False
    if spec.scheme is not None and mesh.shape["fsdp"] > 1:  # scales are split or whole, as their sizes allow
        return False
    sizes = [spec.config.hidden_size]
    if spec.lora is not None and spec.lora.rank >= SHARD_LORA_FROM_RANK:
        sizes += [size for weight in spec.adapted for size in weight.shape]
    return token_shards(mesh) > 1 and not any(size % mesh.shape["fsdp"] for size in sizes)


def by_line(
    function: Callable, spec: Any, trained: Any, frozen: Any, batch: Any, out: tuple[str, ...]
) -> Any:
    """`function(trained, frozen, batch)` on every device with its part of each and its own lines.

    Args:
      batch: arrays `[buffers, lines, length]`.
      out: how each result lies: as what is `trained`, `whole` on every device, or split by `lines`.
    """
    mesh = auto_mesh()

    def specs(axes, tree):
        return jax.tree.map_with_path(lambda path, x: spec_for(mesh, axes(path, x), x.shape), tree)

    weights = _weight_axes(spec)

    def base_axes(path, x):
        return _stacked(array_axes(path, weights[dotted(path)]), x)

    of_trained = specs(_trained_axes(spec), trained)
    lines = PartitionSpec(None, _axes_of(mesh, "batch"))
    results = {"trained": of_trained, "whole": PartitionSpec(), "lines": lines}
    mapped = jax.shard_map(
        function,
        in_specs=(of_trained, specs(base_axes, frozen), jax.tree.map(lambda _: lines, batch)),
        out_specs=tuple(results[name] for name in out),
        check_vma=False,
    )
    return mapped(trained, frozen, batch)


def slot_shards() -> int:
    """Over how many devices of this context's mesh `by_slot` splits slots: all, unless weights are split."""
    mesh = auto_mesh()
    if mesh is None or mesh.shape["tensor"] > 1 or mesh.shape.get("expert", 1) > 1:
        return 1
    return token_shards(mesh)


def by_slot(function: Callable, *arguments: Any, whole: tuple[int, ...] = ()) -> Any:
    """`function(*arguments)` on every device with its part of each first axis, where all can be split.

    Args:
      whole: the numbers of the arguments that every device has whole.
    """
    shards = slot_shards()
    split = [x for i, argument in enumerate(arguments) if i not in whole for x in jax.tree.leaves(argument)]
    if shards == 1 or any(x.shape[0] % shards for x in split):
        return function(*arguments)
    own = PartitionSpec(_axes_of(auto_mesh(), "batch"))
    specs = tuple(PartitionSpec() if i in whole else own for i in range(len(arguments)))
    return jax.shard_map(function, in_specs=specs, out_specs=own, check_vma=False)(*arguments)


def summed_over_lines(spec: Any, grads: Any) -> Any:
    """Inside `by_line`: the sum over devices of each one's gradient of what is trained, once for all of it.

    What `fsdp` splits was summed over it where its parts were gathered.
    """
    axes, mesh = _trained_axes(spec), jax.sharding.get_abstract_mesh()

    def over(path, x) -> tuple[str, ...]:
        split = mesh.shape["fsdp"] > 1 and {"embed", "adapter"} & set(axes(path, x))
        return ("data",) if split else _axes_of(mesh, "length")

    return jax.tree.map_with_path(lambda path, x: jax.lax.psum(x, over(path, x)), grads)


def total(x: Any) -> Any:
    """Inside `by_line`: the sum over all devices."""
    axes = _axes_of(jax.sharding.get_abstract_mesh(), "length")
    return jax.tree.map(lambda value: jax.lax.psum(value, axes), x)


def embedded(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows `[batch, length, hidden]` of the table `[vocab, hidden]`, which is never gathered.

    Every chip looks up all tokens of its copy of the base in its own columns; then the parts change places.
    """
    if auto_mesh() is None and fsdp_ways() > 1:
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        rows = jnp.take(table, tokens, axis=0, mode="clip")
        return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)
    copy = ("batch_of_copy", "length_of_copy")
    rows = jnp.take(table, constrain(tokens, *copy), axis=0, mode="clip")
    return constrain(constrain(rows, *copy, "embed"), "batch", "length", None)


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
        return _stacked(own, leaf)

    return axes


def _decode_axes(leaf: Any) -> tuple[str | None, ...]:
    return ("batch", None, "kv_heads", None) if leaf.ndim == 4 else ("batch", *(None,) * (leaf.ndim - 1))


def _place(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # several processes: each gives its devices their part of the same array
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
