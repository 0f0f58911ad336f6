"""How much there is to learn, in bits, and how much an adapter can hold: a rule of thumb.

    bits = code_length(nll, steps_per_epoch=234)    # of the training rows, each measured before it is learned
    rank_for(bits, per_rank=305_280)                # the rank whose 2 bits a parameter would hold it all
    flops_ratio(weights, adapter)                   # (2W + 3P) / (3W), of full fine-tuning's FLOPs

The code length of the first pass (the sum of -log2 p, with each row measured before the step that learns from
it) bounds what there is to memorise. Models were found to store 2 bits per parameter when trained for long on
random facts (Allen-Zhu and Li 2024). Generalising on a task needs far less, so this overestimates the rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BITS_PER_PARAMETER = 2.0


def code_length(nll: Sequence[float], steps_per_epoch: int) -> float:
    """Bits of the first pass over the rows.

    Args:
      nll: summed loss of each training step in nats, before its update.
    """
    return sum(nll[:steps_per_epoch]) / math.log(2)


def rank_for(bits: float, per_rank: int) -> int:
    """The smallest rank whose parameters can hold `bits`, at 2 bits per parameter; at least 1.

    Args:
      per_rank: parameters of an adapter of rank 1.
    """
    return max(1, math.ceil(bits / (BITS_PER_PARAMETER * per_rank)))


def flops_ratio(weights: float, adapter: float) -> float:
    """FLOPs of training an adapter relative to full fine-tuning, without attention scores.

    A frozen matrix of W weights costs 2W multiply-adds per token (forward and backward), a trained one 3W,
    and an adapter's P parameters cost 3P.
    """
    return (2 * weights + 3 * adapter) / (3 * weights)
