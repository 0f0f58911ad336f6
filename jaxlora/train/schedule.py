"""The schedule of a run: steps, learning rates, validations. Pure functions of the configuration.

plan = plan_run(config.optim, config.train, n_rows=25348)
plan.total_steps, plan.validation_steps       # 6338, (1000, 2000, 3169, 4000, 5000, 6000, 6338)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jaxlora.config import OptimConfig, TrainConfig
from jaxlora.data.batches import rows_of_step


@dataclass(frozen=True)
class RunPlan:
    """Steps of a run, counted from 1."""

    n_rows: int
    batch_rows: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    validation_steps: tuple[int, ...]
    order_seed: int | None = None  # seed of the shuffle; None: file order in every epoch

    def rows_of_step(self, step: int) -> Sequence[int]:
        """Row numbers of a step: each row once per epoch; the last batch of an epoch may be short."""
        return rows_of_step(self.order_seed, self.n_rows, self.batch_rows, step)


def plan_run(optim: OptimConfig, train: TrainConfig, n_rows: int, order_seed: int | None = None) -> RunPlan:
    """The steps of a run over `n_rows` training rows, shuffled by `order_seed` (None: in file order).

    Validations fall on the end of each epoch and on multiples of `validation_every`, except multiples within
    `validation_merge` steps before the end of an epoch. The run's last step counts as an end, even if
    `max_steps` puts it in the middle of an epoch.
    """
    steps_per_epoch = math.ceil(n_rows / train.batch_rows)
    total = min(steps_per_epoch * train.epochs, train.max_steps or sys.maxsize)
    ends = [*range(steps_per_epoch, total, steps_per_epoch), total]
    regular = range(train.validation_every, total + 1, train.validation_every)
    kept = {step for step in regular if not any(0 < end - step <= train.validation_merge for end in ends)}
    warmup = round(optim.warmup_fraction * total) if optim.schedule != "constant" else 0
    validation = tuple(sorted(kept | set(ends)))
    return RunPlan(n_rows, train.batch_rows, steps_per_epoch, total, warmup, validation, order_seed)


def learning_rate(step: int, optim: OptimConfig, plan: RunPlan) -> float:
    """Learning rate of a step (the first is 1).

    cosine: peak s/W up to W, then min + (peak - min) (1 + cos(pi (s - W) / (S - W))) / 2; linear: the same
    with 1 - (s - W) / (S - W) as the factor of (peak - min); constant: peak.
    """
    if optim.schedule == "constant":
        return optim.peak_lr
    if step <= plan.warmup_steps:
        return optim.peak_lr * step / plan.warmup_steps
    minimum = optim.min_lr_fraction * optim.peak_lr
    progress = (step - plan.warmup_steps) / max(1, plan.total_steps - plan.warmup_steps)
    if optim.schedule == "linear":
        return minimum + (optim.peak_lr - minimum) * (1 - progress)
    return minimum + (optim.peak_lr - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
