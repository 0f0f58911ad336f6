"""Cloud TPU chips and slices: public figures, and names as they are asked for in the cloud.

slice_named("v5e-8").chip.hbm_bytes          # 16 GiB a chip
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxlora.runtime.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One chip as JAX sees it (v4 and v5p: both cores as one device)."""

    name: str
    hbm_bytes: float  # what the compiler lets a program use is a little less
    flops: float  # dense bfloat16, FLOP/s
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s that one link of the interconnect brings in


# Cloud TPU documentation, "System architecture" pages of each version: peak compute, HBM capacity and
# bandwidth a chip. Link rates are the documented interconnect bandwidth of a chip over its links (6 in a
# three-dimensional torus, 4 in a two-dimensional one): v4 2400, v5e 1600, v5p 4800, v6e 3200 Gbit/s.
CHIPS = {
    "v4": Chip("v4", 32 * 2**30, 275e12, 1228e9, 50e9),
    "v5e": Chip("v5e", 16 * 2**30, 197e12, 819e9, 50e9),
    "v5p": Chip("v5p", 95 * 2**30, 459e12, 2765e9, 100e9),
    "v6e": Chip("v6e", 32 * 2**30, 918e12, 1640e9, 100e9),
}


@dataclass(frozen=True)
class Slice:
    """A slice: chips in a grid. v4 and v5p names count cores, two a chip; v5e and v6e names count chips."""

    name: str
    chip: Chip
    grid: tuple[int, ...]

    @property
    def n_chips(self) -> int:
        return math.prod(self.grid)

    @property
    def topology(self) -> str:
        """The name that the TPU compiler takes, such as `v5e:2x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.grid))}"

    @property
    def ici_rate(self) -> float:
        """Bytes/s into the least connected chip. Slices this small have no links around their ends, so a
        corner has one link along each axis of the grid, and every chip must receive its share of a
        collective: a gather cannot end before the corners have theirs.
        """
        return self.chip.link_rate * sum(size > 1 for size in self.grid)

    def to_json(self) -> dict[str, Any]:
        """Its name, number of chips, and name for the compiler."""
        return {"name": self.name, "chips": self.n_chips, "topology": self.topology}


SLICES = {
    name: Slice(name, CHIPS[name.split("-")[0]], grid)
    for name, grid in {
        "v4-8": (2, 2, 1),
        "v4-16": (2, 2, 2),
        "v4-32": (2, 2, 4),
        "v5e-4": (2, 2),
        "v5e-8": (2, 4),
        "v5e-16": (4, 4),
        "v5e-32": (4, 8),
        "v5p-8": (2, 2, 1),
        "v6e-4": (2, 2),
        "v6e-8": (2, 4),
    }.items()
}


# `device_kind` as JAX reports it
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None where it is no TPU of the table."""
    return CHIPS[_KINDS[device_kind]] if device_kind in _KINDS else None


def slice_of(devices: Sequence[Any]) -> Slice | None:
    """The slice that these JAX devices make up; None where they are no TPU of the table."""
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return None
    coordinates = [device.coords for device in devices]
    grid = tuple(max(axis) - min(axis) + 1 for axis in zip(*coordinates, strict=True))
    return Slice(f"{len(devices)} {chip.name} chips", chip, grid)


def slice_named(name: str) -> Slice:
    """The slice of a Cloud TPU name.

    Raises:
      UserError: the name is not in the table.
    """
    if name not in SLICES:
        raise UserError(f"--topology: {name!r} is not known; give one of {', '.join(SLICES)}, or all")
    return SLICES[name]
