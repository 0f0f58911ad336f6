"""What a parity check needs from a trainer, in one interface with two implementations.

    trainer = backend.create("all_layer", rank=8, seed=0)
    trainer.forward_backward(rows)            # -> log-probabilities and loss
    trainer.optim_step(AdamStep(3e-4))
    trainer.fetch(trainer.save("end"), folder)        # the adapter as a PEFT folder

`jaxlora.parity.ours` runs this package, `jaxlora.parity.tinker_service` drives a Tinker service through its
own SDK. Rows come from this package's renderer in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from jaxlora.config import Condition
from jaxlora.data.render import RenderedRow, shifted

# How the gradients of a step's rows become one. Tinker's documentation says `sum`: every weighted target
# token counts the same. SkyRL's engine computes `sequence_mean`: the mean over rows of each row's weighted
# mean. For rows with equal sums of weights the two differ by a constant factor, which Adam cancels.
Reduction = Literal["sum", "sequence_mean"]


class AdamStep(NamedTuple):
    """Adam's settings for one step; eps is added outside the root, no weight decay, no clipping."""

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-12


@dataclass(frozen=True)
class Pass:
    """One pass over some rows."""

    logprobs: list[np.ndarray]  # a row: float32 [tokens], log p of each target
    loss: float  # sum over weighted targets of -log p, as the trainer itself reports it


class Trainer(Protocol):
    """One adapter in training."""

    def forward(self, rows: Sequence[RenderedRow]) -> Pass:
        """Log-probabilities; nothing changes."""

    def forward_backward(self, rows: Sequence[RenderedRow]) -> Pass:
        """The same, and the gradient of these rows is kept for the next step."""

    def optim_step(self, adam: AdamStep) -> None:
        """One optimizer step with the gradients kept since the last one."""

    def save(self, name: str) -> str:
        """Keep the adapter as it is now; returns the checkpoint's own name."""

    def sample(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], limit: int, end: int
    ) -> list[list[int]]:
        """Greedy tokens after each prompt, up to and with the token `end`, at most `limit`.

        Call this last: a service may put the checkpoint in place of the weights in training.
        """

    def fetch(self, checkpoint: str, folder: Path) -> None:
        """Write a saved adapter to a new PEFT folder."""


class Backend(Protocol):
    """A place where adapters are trained on one base."""

    def create(self, condition: Condition, rank: int, seed: int) -> Trainer:
        """A fresh adapter."""

    def describe(self) -> dict[str, str]:
        """Names and versions for a recording; no address and no key."""


def reduced(rows: Sequence[RenderedRow], reduction: Reduction) -> list[RenderedRow]:
    """The rows with weights under which a plain weighted sum is the given reduction."""
    if reduction == "sum":
        return list(rows)
    return [
        RenderedRow(row.row_id, row.tokens, row.weights / (shifted(row)[2].sum() * len(rows))) for row in rows
    ]
