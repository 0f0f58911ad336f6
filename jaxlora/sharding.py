"""How arrays are sharded over the device mesh: one table from array axes to mesh axes.

The mesh has three axes. `fsdp` splits the base's weights and the tokens of a step; `data` splits only the
tokens; `tensor` splits heads, hidden units of the MLP and the vocabulary. The hidden axis of the residual
stream is never split: each layer's weights are gathered over `fsdp` just before use. A model with experts may
add a fourth axis, `expert`, which splits experts and tokens and replicates all other weights.

On GPUs a buffer has one line of whole rows for each device that tokens are split over. Without `tensor`, no
device then needs another's lines, and a step runs as one program per device (`by_line`), whose collectives
are exactly those written here rather than inserted by the compiler.

    mesh = make_mesh(MeshConfig(fsdp=8))
    with jax.set_mesh(mesh):
        state = place_trained(mesh, spec, init_state(lora, optim))
        state, metrics = step(state, frozen, place_batch(mesh, batch), rate)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from jaxlora.config import MeshConfig
from jaxlora.runtime.devices import devices_here, gathers_mapped_memory, memory_of
from jaxlora.runtime.errors import UserError

# logical axis -> mesh axes. They split the first array axis that they divide; later axes stay whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # rows, if there are enough: decoding, padded batches
    "length": (
        "data",
        "fsdp",
        "expert",
    ),  # a packed buffer is one line: its tokens are split over chips
    "batch_of_copy": ("data", "expert"),  # the same, but over copies of the base only
    "length_of_copy": ("data", "expert"),
    "expert": ("expert",),
    "vocab": ("tensor",),
    "logits": ("tensor",),  # the vocabulary, of a head that is not the embedding as well
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "adapter": ("fsdp",),  # the long axis of a LoRA matrix, from SHARD_LORA_FROM_RANK on
}
# Below this rank, adapters with gradients and moments take less than 6 GB at Qwen3-8B's size even when every
# projection has one; gathering them in every layer would cost more time than the memory is worth.
SHARD_LORA_FROM_RANK = 256
COPY_SHARE = 0.25  # share of a GPU's memory that the decoder's copy of the weights may take
LORA_AXES: dict[str, tuple[str | None, str | None]] = {
    "lora_a": (None, "adapter"),  # [r, in]
    "lora_b": ("adapter", None),  # [out, r]
}
EXPERTS = "layers.mlp.experts."  # experts' weights; their adapters are sharded alike


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh `[data, fsdp, tensor]` over the devices (default: all); `expert`, if given, is before `tensor`.

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
    """The mesh's sizes on `n_devices` devices, with those that are -1 or not given filled in.

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


def exchanged(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """x with this sharding, over the same devices, which exchange its parts: `jax.device_put` would take them
    through the host."""
    return jax.block_until_ready(_make_exchange(sharding)(x))


@cache
def _make_exchange(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def decode_mesh(mesh: Mesh, kv_heads: int, experts: int = 1, weights: int = 0, shares: bool = False) -> Mesh:
    """A mesh of the same devices for decoding.

    On GPUs every device decodes with its own copy of the weights if that leaves memory for the base and the
    KV caches. Otherwise weights are split by key-value heads, as far as their number allows: on GPUs into as
    few parts as fit, on TPUs over all chips. Experts are split over the same chips as slots, as far as their
    number allows.

    Args:
      weights: bytes of the weights.
      shares: decode on the mesh itself if `fsdp` splits nothing: the weights then need no copy.
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

    An axis stays whole if its mesh axes do not divide it or are taken by an earlier axis.
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
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def token_shards(mesh: Any) -> int:
    """The number of chips that the tokens of a step are split over."""
    return _ways(mesh, _axes_of(mesh, "length"))


def token_lines(mesh: Mesh) -> int:
    """Lines of a packed buffer: on GPUs one per device that tokens are split over; elsewhere a single one.

    GPU attention kernels need whole rows; the TPU kernel attends over one line spread across chips.
    """
    return token_shards(mesh) if mesh.devices.flat[0].platform == "gpu" else 1


def token_multiple(mesh: Mesh) -> int:
    """Line lengths must be multiples of this, so that every chip has whole blocks of the attention kernel."""
    platform = mesh.devices.flat[0].platform
    return token_shards(mesh) // token_lines(mesh) * (128 if platform == "tpu" else 1)


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Place host arrays `[buffers, batch, length]` on the mesh, splitting rows over chips, or else tokens.

    Every process passes the same whole arrays; each device receives only its part.
    """
    return {name: _place(x, named(mesh, (None, "batch", "length"), x.shape)) for name, x in batch.items()}


def base_shardings(mesh: Mesh, spec: Any) -> Any:
    """The sharding of each weight of the base, a tree like `spec.abstract_base` (of a `ModelSpec`)."""
    axes = _weight_axes(spec)
    return jax.tree.map_with_path(
        lambda path, x: _lying(mesh, path, axes[dotted(path)], x), spec.abstract_base
    )


def weight_shardings(mesh: Mesh, axes: tuple[str | None, ...], weight: Any) -> Any:
    """The sharding of each array of one weight with these axes; the weight may be quantised or stacked."""
    return jax.tree.map_with_path(lambda path, x: _lying(mesh, path, axes, x), weight)


def _lying(mesh: Mesh, path: Any, axes: tuple[str | None, ...], x: Any) -> NamedSharding:
    own = array_axes(path, axes)
    return named(mesh, _stacked(_by_rows(own) if _splits_rows(mesh) else own, x), x.shape)


def _splits_rows(mesh: Any) -> bool:
    """Whether `fsdp` splits matrices of layers and the head by rows: on GPUs, where steps run `by_line`.

    A part of the columns would be transposed before it is gathered, 12 ms of a step of Qwen3-8B.
    """
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    return platform == "gpu" and mesh.shape["tensor"] == 1


def _by_rows(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes `[out, in]` of a matrix that is split by rows; those of other arrays as they are."""
    if axes == ("logits", "embed"):
        return "embed", "embed"  # by columns if the vocabulary cannot be divided
    return ("embed", None) if axes in (("heads", "embed"), ("kv_heads", "embed"), ("mlp", "embed")) else axes


def _stacked(axes: tuple[str | None, ...], x: Any) -> tuple[str | None, ...]:
    """The axes of x; additional leading axes, such as that of layers, are not split."""
    return (None,) * (np.ndim(x) - len(axes)) + axes


def array_axes(path: Any, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes of one array of a weight with these axes: a quantised weight's arrays are sharded like it."""
    turned = bool(path) and isinstance(path[-1], GetAttrKey) and path[-1].name == "turned"
    return axes[::-1] if turned else axes


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of these arrays, without the arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def device_bytes(tree: Any) -> int:
    """Bytes of `abstract` arrays on one device."""

    def own(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(own, jax.tree.leaves(tree)))


def place_trained(mesh: Mesh, spec: Any, tree: Any) -> Any:
    """Place trained weights, or their optimizer state, on the mesh by `trained_shardings`."""
    return jax.tree.map(_place, tree, trained_shardings(mesh, spec, tree))


def trained_shardings(mesh: Mesh, spec: Any, tree: Any) -> Any:
    """The sharding of each leaf of a `ModelSpec`'s trained weights, their gradients or any optimizer state.

    A leaf is sharded like the array that its path ends in. Adapters are replicated below rank
    `SHARD_LORA_FROM_RANK`, and split over `fsdp` along the long axis from that rank on; a trained weight is
    sharded like the base's. Leaves that belong to no array, such as Adam's step counter, are replicated.
    """
    axes = _trained_axes(spec, _splits_rows(mesh))
    return jax.tree.map_with_path(lambda path, x: named(mesh, axes(path, x), np.shape(x)), tree)


def decode_shardings(mesh: Mesh, state: Any) -> Any:
    """Slots are split over chips; KV caches `[slots, length, kv_heads, head_dim]` also by heads."""
    return jax.tree.map(lambda leaf: named(mesh, _decode_axes(leaf), leaf.shape), state)


def constrain_decode(state: Any) -> Any:
    """Apply `decode_shardings` as constraints inside a jitted function; a no-op outside a mesh."""
    return jax.tree.map(lambda leaf: constrain(leaf, *_decode_axes(leaf)), state)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of x to its logical axes; outside a mesh, return x unchanged."""
    mesh = auto_mesh()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(mesh, axes, x.shape))


def constrain_trained(spec: Any, tree: Any) -> Any:
    """Apply `trained_shardings` as constraints inside a jitted function; a no-op outside a mesh."""
    mesh = auto_mesh()
    axes = _trained_axes(spec, mesh is not None and _splits_rows(mesh))
    return jax.tree.map_with_path(lambda path, x: constrain(x, *axes(path, x)), tree)


def gathered(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The weight all-gathered over `fsdp` at its point of use (its `tensor` axis stays split)."""
    if fsdp_ways() == 1:
        return weight  # no constraint either: a scan would keep its result, a second copy of the base
    if auto_mesh() is None:
        return _whole_over_fsdp(weight, _by_rows(axes).index("embed")) if "embed" in axes else weight
    return constrain(weight, *(None if axis in ("embed", "adapter") else axis for axis in axes))


def gathered_adapter(matrix: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`gathered` for A `[r, in]` or B `[out, r]`, with the axes of the adapted weight and None for r."""
    if fsdp_ways() == 1 or auto_mesh() is not None:
        return gathered(matrix, axes)
    long = next(i for i, axis in enumerate(axes) if axis is not None)
    return _whole_over_fsdp(matrix, long) if matrix.shape[1 - long] >= SHARD_LORA_FROM_RANK else matrix


def _whole_over_fsdp(x: jax.Array, axis: int) -> jax.Array:
    """Inside `by_line`: all-gather x over `fsdp`; the gradient is reduce-scattered."""
    own = _in_its_own_memory(x) if gathers_mapped_memory() else x
    return jax.lax.all_gather(own, "fsdp", axis=axis, tiled=True)


def _in_its_own_memory(x: jax.Array) -> jax.Array:
    """x, read and written anew.

    A gather of mapped memory begins with a copy into it. Of an argument of the step the compiler would make
    one for the forward and the backward pass, and keep it meanwhile: 7 GiB of Qwen3-8B over two GPUs.
    """
    n = x[(slice(1),) * x.ndim].astype(jnp.int32)
    return jnp.where(n * (n + 1) & 1 == 0, x, jnp.zeros_like(x))  # it is even, but no compiler knows


def gather_again(function: Callable, *, in_loop: bool) -> Callable:
    """Make the backward pass of `function(x, weights, *others)` re-gather its weights.

    Otherwise the gathered weights would be kept from the forward pass: the whole base on every chip. Nothing
    else is computed twice, because the backward pass of a product needs only its inputs.

    Args:
      in_loop: the caller is the body of a scan, where forward and backward pass are separate loops and the
        compiler cannot merge their gathers.
    """
    if fsdp_ways() == 1:
        return function
    if in_loop or auto_mesh() is not None:
        return jax.checkpoint(function, prevent_cse=not in_loop)

    # `jax.checkpoint` would let a gather begin only when the gradient that meets its weight is there. This
    # one waits only for the input, so that the compiler can place it beside the products before.
    def backward(inputs, gradient):
        # Barriers, or the compiler would keep what the forward pass gathered and dropped out; and a barrier
        # of weights alone would let it gather them before a loop over buffers.
        x, weights, *others = inputs
        weights, x = jax.lax.optimization_barrier((weights, x))
        others, gradient = jax.lax.optimization_barrier((others, gradient))
        return jax.vjp(function, x, weights, *others)[1](gradient)

    again = jax.custom_vjp(function)
    again.defvjp(lambda *inputs: (function(*inputs), inputs), backward)
    return again


def split_tokens(x: jax.Array) -> jax.Array:
    """Reshape `[batch, length, ...]` to `[shards, tokens of a shard, ...]`, with no transfers between chips.

    Computation that treats shards as rows of a batch then stays local to each chip. One device is one shard.
    """
    mesh = auto_mesh()
    shards = 1 if mesh is None else token_shards(mesh)
    batch, length, *rest = x.shape
    if shards == 1 or (batch % shards and length % shards):  # or nothing divides: each chip has all of it
        return x.reshape(1, batch * length, *rest)
    if batch % shards == 0:  # rows are split
        y = x.reshape(shards, -1, *rest)
    else:  # each row's tokens are split
        y = x.reshape(batch, shards, length // shards, *rest).swapaxes(0, 1).reshape(shards, -1, *rest)
    return constrain(y, "batch", *(None,) * (y.ndim - 1))


# --- One program per device ---------------------------------------------------------------------------------


def auto_mesh() -> Any:
    """The mesh that the compiler partitions the current trace over; None outside one and inside `by_line`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def fsdp_ways() -> int:
    """The number of devices that the base is split over, also inside `by_line`; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["fsdp"]


def gathers_by_line(spec: Any) -> bool:
    """Whether a step of this model may gather weights inside `by_line`.

    Not quantised ones: whether their scales are split depends on their size.
    """
    return spec.config.experts is None and spec.scheme is None


def runs_by_line(spec: Any, lines: int) -> bool:
    """Whether a step over buffers with this many lines may run by `by_line`, on the current mesh.

    `fsdp` must divide every axis that it splits: a device cannot tell from its array whether it is a part.
    """
    mesh = auto_mesh()
    if mesh is None or mesh.shape["tensor"] > 1 or lines % token_shards(mesh):
        return False
    if spec.config.experts is not None:  # their products already run as one program per device
        return False
    if mesh.shape["fsdp"] > 1 and not gathers_by_line(spec):
        return False
    sizes = [spec.config.hidden_size, *(weight.shape[0] for weight in spec.table if weight.stacked)]
    if spec.lora is not None and spec.lora.rank >= SHARD_LORA_FROM_RANK:
        sizes += [size for weight in spec.adapted for size in weight.shape]
    return token_shards(mesh) > 1 and not any(size % mesh.shape["fsdp"] for size in sizes)


def by_line(
    function: Callable, spec: Any, trained: Any, frozen: Any, batch: Any, out: tuple[str, ...]
) -> Any:
    """Run `function(trained, frozen, batch)` on every device with its part of the weights and its own lines.

    Args:
      batch: arrays `[buffers, lines, length]`.
      out: the sharding of each result: like the `trained` weights, `whole` on every device, or by `lines`.
    """
    mesh = auto_mesh()

    def specs(axes, tree):
        return jax.tree.map_with_path(lambda path, x: spec_for(mesh, axes(path, x), x.shape), tree)

    weights = _weight_axes(spec)

    def base_axes(path, x):
        return _stacked(_by_rows(array_axes(path, weights[dotted(path)])), x)

    of_trained = specs(_trained_axes(spec, by_rows=True), trained)
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
    """The number of devices that `by_slot` splits slots over: the whole mesh, unless weights are split."""
    mesh = auto_mesh()
    if mesh is None or mesh.shape["tensor"] > 1 or mesh.shape.get("expert", 1) > 1:
        return 1
    return token_shards(mesh)


def by_slot(function: Callable, *arguments: Any, whole: tuple[int, ...] = ()) -> Any:
    """Run `function(*arguments)` on every device with its part of each first axis, if all can be split.

    Args:
      whole: indices of arguments that every device receives whole.
    """
    shards = slot_shards()
    split = [x for i, argument in enumerate(arguments) if i not in whole for x in jax.tree.leaves(argument)]
    if shards == 1 or any(x.shape[0] % shards for x in split):
        return function(*arguments)
    own = PartitionSpec(_axes_of(auto_mesh(), "batch"))
    specs = tuple(PartitionSpec() if i in whole else own for i in range(len(arguments)))
    return jax.shard_map(function, in_specs=specs, out_specs=own, check_vma=False)(*arguments)


def summed_over_lines(spec: Any, grads: Any) -> Any:
    """Inside `by_line`: sum the gradients of the trained weights over devices, all at once.

    Gradients of weights split over `fsdp` were already summed over it by the backward pass of their gather.
    """
    axes, mesh = _trained_axes(spec), jax.sharding.get_abstract_mesh()

    def over(path, x) -> tuple[str, ...]:
        split = mesh.shape["fsdp"] > 1 and {"embed", "adapter"} & set(axes(path, x))
        return tuple(axis for axis in _axes_of(mesh, "length") if not (split and axis == "fsdp"))

    return jax.tree.map_with_path(lambda path, x: jax.lax.psum(x, over(path, x)), grads)


def total(x: Any) -> Any:
    """Inside `by_line`: the sum over all devices."""
    axes = _axes_of(jax.sharding.get_abstract_mesh(), "length")
    return jax.tree.map(lambda value: jax.lax.psum(value, axes), x)


def embedded(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Look up rows `[batch, length, hidden]` of the table `[vocab, hidden]` without gathering the table.

    Every chip looks up all tokens of its copy of the base in its own columns, then an all-to-all exchanges
    the parts.
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
    """The dotted path of an array, without layer numbers and keys from outside the tree."""
    return ".".join(key.key for key in path if isinstance(key, DictKey) and isinstance(key.key, str))


def _trained_axes(spec: Any, by_rows: bool = False) -> Callable[[Any, Any], tuple[str | None, ...]]:
    """A function from the path of a trained leaf to its logical axes."""
    weights = _weight_axes(spec) if spec.full else {}
    split_lora = spec.lora is not None and spec.lora.rank >= SHARD_LORA_FROM_RANK

    def axes(path: Any, leaf: Any) -> tuple[str | None, ...]:
        own: tuple[str | None, ...] = ()
        if path and (part := getattr(path[-1], "key", None)) in LORA_AXES:
            own = LORA_AXES[part] if split_lora else (None, None)
            own = ("expert", *own) if EXPERTS in dotted(path) else own
        elif spec.full:
            own = weights.get(dotted(path), ())
            own = _by_rows(own) if by_rows else own
        return _stacked(own, leaf)

    return axes


def _decode_axes(leaf: Any) -> tuple[str | None, ...]:
    return ("batch", None, "kv_heads", None) if leaf.ndim == 4 else ("batch", *(None,) * (leaf.ndim - 1))


def _place(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # several processes: each fills its devices from the same array
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
