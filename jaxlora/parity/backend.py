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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from jaxlora.config import Condition
from jaxlora.data.render import RenderedRow, shifted
from jaxlora.train.objective import objective_of

# How the gradients of a step's rows become one. Tinker's documentation says `sum`: every weighted target
# token counts the same. SkyRL's engine computes `sequence_mean`: the mean over rows of each row's weighted
# mean. For rows with equal sums of weights the two differ by a constant factor, which Adam cancels. Rows of
# policy gradients carry no weights; there the same engine divides by all tokens of a row, those of its prompt
# as well: `length_mean`.
Reduction = Literal["sum", "sequence_mean", "length_mean"]


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


class Drawn(NamedTuple):
    """A sampled answer with the log-probabilities that its sampler reported."""

    tokens: list[int]
    logprobs: list[float]


class Trainer(Protocol):
    """One adapter in training."""

    def forward(self, rows: Sequence[RenderedRow]) -> Pass:
        """Log-probabilities; nothing changes."""

    def forward_backward(self, rows: Sequence[RenderedRow], loss: str = "cross_entropy") -> Pass:
        """The same, and the gradient of these rows is kept for the next step.

        For objectives of policy gradients, rows have the extras `advantages` and `sampler_logprobs`.
        """

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

    def draw(self, checkpoint: str, prompt: Sequence[int], limits: Sequence[int], end: int) -> list[Drawn]:
        """Answers of at most so many tokens each, drawn at temperature 1; call this last, as `sample`."""

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

    def divisor(row: RenderedRow) -> float:
        own = float(shifted(row)[2].sum()) if reduction == "sequence_mean" else row.n_tokens
        return own * len(rows)

    return [replace(row, weights=row.weights / np.float32(divisor(row))) for row in rows]


def loss_of(row: RenderedRow, logprobs: np.ndarray, loss: str) -> float:
    """The summed objective of a row, from log-probabilities of its targets."""
    if loss == "cross_entropy":
        return -float(np.dot(shifted(row)[2], logprobs))
    extras = {name: values[1:] for name, values in row.extras.items()}
    values = objective_of(loss)(jnp.asarray(logprobs), jnp.asarray(shifted(row)[2]), extras)
    return float(np.sum(np.asarray(values), dtype=np.float64))
