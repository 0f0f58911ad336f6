"""The interface that a parity check needs from a trainer; it has two implementations.

    trainer = backend.create("all_layer", rank=8, seed=0)
    trainer.forward_backward(rows)            # -> log-probabilities and loss
    trainer.optim_step(AdamStep(3e-4))
    trainer.fetch(trainer.save("end"), folder)        # the adapter as a PEFT folder

`jaxlora.parity.ours` runs this package; `jaxlora.parity.tinker_service` drives a Tinker service through its
own SDK. In both cases the rows come from this package's renderer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from jaxlora.config import Condition
from jaxlora.data.render import RenderedRow, shifted
from jaxlora.train.objective import objective_of

# How the gradients of a step's rows are combined. Tinker's documentation says `sum`: all weighted target
# tokens count equally. SkyRL's engine computes `sequence_mean`: the mean over rows of each row's weighted
# mean. If all rows have the same sum of weights, the two differ by a constant factor, which Adam cancels.
# Rows for policy gradients carry no weights; for those, the same engine divides by all tokens of a row,
# including its prompt: `length_mean`.
Reduction = Literal["sum", "sequence_mean", "length_mean"]


class AdamStep(NamedTuple):
    """Adam's settings for one step; eps is added outside the root; no weight decay, no clipping."""

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-12


@dataclass(frozen=True)
class Pass:
    """The result of one pass over some rows."""

    logprobs: list[np.ndarray]  # per row: float32 [tokens], log p of each target
    loss: float  # sum over weighted targets of -log p, as reported by the trainer itself


class Drawn(NamedTuple):
    """A sampled answer with the log-probabilities reported by its sampler."""

    tokens: list[int]
    logprobs: list[float]


class Trainer(Protocol):
    """One adapter in training."""

    def forward(self, rows: Sequence[RenderedRow]) -> Pass:
        """Log-probabilities; nothing changes."""

    def forward_backward(self, rows: Sequence[RenderedRow], loss: str = "cross_entropy") -> Pass:
        """The same, also accumulating the gradient of these rows for the next step.

        For policy-gradient objectives, rows have the extras `advantages` and `sampler_logprobs`.
        """

    def optim_step(self, adam: AdamStep) -> None:
        """One optimizer step with the gradients accumulated since the last one."""

    def save(self, name: str) -> str:
        """Save the adapter in its current state; returns the checkpoint's own name."""

    def sample(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], limit: int, end: int
    ) -> list[list[int]]:
        """Greedy tokens after each prompt, up to and including the token `end`, at most `limit`.

        Call this last: a service may load the checkpoint over the weights in training.
        """

    def draw(self, checkpoint: str, prompt: Sequence[int], limits: Sequence[int], end: int) -> list[Drawn]:
        """One answer for each limit on its length, drawn at temperature 1; call this last, like `sample`."""

    def fetch(self, checkpoint: str, folder: Path) -> None:
        """Write a saved adapter to a new PEFT folder."""


class Backend(Protocol):
    """A place where adapters on one base are trained."""

    def create(self, condition: Condition, rank: int, seed: int) -> Trainer:
        """A fresh adapter."""

    def describe(self) -> dict[str, str]:
        """Names and versions for a recording, without addresses or keys."""


def reduced(rows: Sequence[RenderedRow], reduction: Reduction) -> list[RenderedRow]:
    """The rows, reweighted so that a plain weighted sum equals the given reduction."""
    if reduction == "sum":
        return list(rows)

    def divisor(row: RenderedRow) -> float:
        own = float(shifted(row)[2].sum()) if reduction == "sequence_mean" else row.n_tokens
        return own * len(rows)

    return [replace(row, weights=row.weights / np.float32(divisor(row))) for row in rows]


def loss_of(row: RenderedRow, logprobs: np.ndarray, loss: str) -> float:
    """The summed objective of a row, from the log-probabilities of its targets."""
    if loss == "cross_entropy":
        return -float(np.dot(shifted(row)[2], logprobs))
    extras = {name: values[1:] for name, values in row.extras.items()}
    values = objective_of(loss)(jnp.asarray(logprobs), jnp.asarray(shifted(row)[2]), extras)
    return float(np.sum(np.asarray(values), dtype=np.float64))
