"""Decisions by validation: a learning rate per condition, a checkpoint per run, early stopping.

    select_learning_rate({1e-4: 0.3786, 3e-4: 0.3633, 1e-3: None})       # 3e-4; None marks a failed run
    select_checkpoint({1000: 0.3469, 2000: 0.3411, 3169: 0.3362})        # 3169
    stops_early({1000: 0.3411, 2000: 0.3469, 3169: 0.3462}, patience=2)  # True: 1000 is the best

All take validation mean negative log-likelihoods (NLL) in full precision, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxlora.runtime.errors import UserError


def select_learning_rate(nll_by_rate: Mapping[float, float | None]) -> float:
    """The rate with the lowest validation NLL; exact ties choose the smaller rate.

    A failed run (None) or a non-finite NLL is ineligible. Raises `UserError` if no rate is left.
    """
    eligible = [(nll, rate) for rate, nll in nll_by_rate.items() if nll is not None and math.isfinite(nll)]
    if not eligible:
        raise UserError("no learning rate can be selected: no run finished with a finite validation NLL")
    return min(eligible)[1]


def select_checkpoint(nll_by_step: Mapping[int, float]) -> int:
    """The step with the lowest validation NLL; exact ties choose the later one.

    A non-finite NLL is never chosen. Raises `UserError` if no step is left.
    """
    eligible = [(nll, -step) for step, nll in nll_by_step.items() if math.isfinite(nll)]
    if not eligible:
        raise UserError("no checkpoint can be selected: no validation has a finite NLL")
    return -min(eligible)[1]


def stops_early(nll_by_step: Mapping[int, float], patience: int | None) -> bool:
    """Whether none of the last `patience` validations lowered the best NLL before them (None: never stop).

    An equal NLL counts as better, as in `select_checkpoint`. Depends on the validations alone, so a resumed
    run stops where an uninterrupted one does.
    """
    if patience is None or not nll_by_step:
        return False
    best = select_checkpoint(nll_by_step)
    return sum(step > best for step in nll_by_step) >= patience
