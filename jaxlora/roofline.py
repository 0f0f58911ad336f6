"""How long a program takes at best: the slowest of computing, memory and interconnect.

    best = roofline(slice_named("v5e-8"), flops=20e12, hbm_bytes=60e9, ici_bytes=27e9)
    best.seconds, best.bound          # 0.27, "interconnect"

The three are taken to overlap fully, so this is a lower bound on the time.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.chips import Slice


@dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program, by what it waits for."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(slice_: Slice, flops: float, hbm_bytes: float, ici_bytes: float) -> Roofline:
    """The three times of one chip's work."""
    chip = slice_.chip
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_rate, ici_bytes / slice_.ici_rate)


def attention_flops(config: ModelConfig, queries: float, keys: float, passes: float) -> float:
    """FLOPs of attention: 2 products x 2 x heads x head_dim x queries x keys, in each layer and pass.

    Args:
      keys: how many a query sees; under a causal mask about half of them.
      passes: 1 for the forward pass; `BACKWARD_PASSES` for the backward pass.
    """
    return (
        passes * 4 * config.num_attention_heads * config.head_dim * queries * keys * config.num_hidden_layers
    )


def keys_seen(length: int, lines: int, shards: int) -> float:
    """How many keys a query of the slowest chip sees, of lines whose tokens are split over `shards` chips.

    Whole lines go to the chips where there are enough of them. Else each line is split, and the chip with
    its last tokens sees most keys; the others wait for it.
    """
    return length * (0.5 if lines % shards == 0 else 1 - 0.5 / shards)


# The splash kernel's two backward kernels take 3 + 4 products where the forward pass takes 2.
BACKWARD_PASSES = 3.5


@dataclass(frozen=True)
class RunCost:
    """A whole run at the roofline."""

    hours: float
    dollars: float | None


def run_cost(
    train_seconds: float,
    steps: int,
    validation_seconds: float,
    validation_batches: int,
    n_chips: int,
    dollars_per_chip_hour: float | None,
) -> RunCost:
    """Hours of `steps` optimizer steps and `validation_batches` validation batches, and their price."""
    hours = (steps * train_seconds + validation_batches * validation_seconds) / 3600
    price = None if dollars_per_chip_hour is None else hours * n_chips * dollars_per_chip_hour
    return RunCost(hours, price)
