"""Which axis of which array lies on which axis of the device mesh: one table.

The mesh has three axes. `fsdp` splits the base's weights and the tokens of a step; `data` splits the tokens
only; `tensor` splits heads and hidden units.

    mesh = make_mesh(MeshConfig(fsdp=8))
    with jax.set_mesh(mesh): ...
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlora.config import MeshConfig
from jaxlora.errors import UserError

# logical axis -> mesh axes
RULES: dict[str, tuple[str, ...]] = {
    "length": ("data", "fsdp"),  # packed tokens are what is split over chips, not rows
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh `[data, fsdp, tensor]` over the devices (default: all).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"config.mesh: {asked} does not fit {len(devices)} devices; set one axis to -1")
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec_for(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes (None: not split)."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, spec_for(*axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask the compiler to lay x out by its logical axes; outside a mesh, x itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(*axes))


def weight_sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a weight; an axis that its mesh axes do not divide is not split."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        names = RULES.get(axis, ()) if axis else ()
        ways = math.prod(mesh.shape[name] for name in names)
        spec.append(names if names and size % ways == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
