"""What is minimised: each objective turns log-probabilities of targets into a loss of each position.

    loss = OBJECTIVES["cross_entropy"](logprobs, weights, extras)      # float32, in the shape of logprobs

A step sums the losses over all positions of all its rows (as Tinker does), so how rows are packed, padded or
split over buffers never changes a result. A new objective is one function and one line of the table.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxlora.models.head import Objective
from jaxlora.runtime.errors import UserError


def cross_entropy(logprobs: jax.Array, weights: jax.Array, extras: Any) -> jax.Array:
    """-weight * log p(target): the negative log likelihood of the weighted targets. Takes no extras."""
    return -weights * logprobs


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy}


def objective_named(name: str) -> Objective:
    """The objective of this name.

    Raises:
      UserError: there is none.
    """
    if name not in OBJECTIVES:
        raise UserError(f"loss: {name!r:.80} is not known; give one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
