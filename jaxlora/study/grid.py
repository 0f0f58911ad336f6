"""The runs of a study, from its one configuration: the trials, the sweep, and what they are called.

    trials(config)[0].run_id                       # "qwen3-8b-attention_only-lr-1e-4"
    members(config, {"all_layer": 3e-4, ...})      # 6 configurations, each that of one run

Every run is a `RunConfig` of its own, and nothing else tells it from a run of `launch/train.py`. An id says
what differs between the runs: `<prefix>-<condition>[-rank-<r>][-lr-<rate>][-batch-<rows>]-seed-<seed>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from jaxlora.config import RunConfig

TRIALS = "lr-selection"  # the folder of the trials, below the results
CONDITION_ORDER = ("attention_only", "mlp_only", "all_layer")
_AXES = "rank|lr|batch"
_NUMBER = r"\d[0-9.]*(?:e[+-]?\d+)?"


def study_dir(config: RunConfig) -> Path:
    """Where the study's own files are: report, figures, comparison, exported adapters."""
    return Path(config.results_dir) / f"{config.prefix}-report"


def rate(value: float) -> str:
    """A learning rate, as 3e-4."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def setting_of(run_id: str, prefix: str) -> str:
    """What a run's id says besides prefix and seed: the condition, and what else the sweep varies.

    >>> setting_of("tiny-all_layer-rank-4-seed-0", "tiny")
    'all_layer-rank-4'
    """
    return re.sub(r"-seed-\d+$", "", run_id.removeprefix(f"{prefix}-"))


def rate_of(setting: str) -> float | None:
    """The learning rate in a setting, where it names one.

    >>> rate_of("all_layer-rank-4-lr-3e-4")
    0.0003
    """
    return dict(_numbers(setting)).get("lr")


def without_rate(setting: str) -> str:
    """The setting with its learning rate left out: runs that differ in nothing but their rate share it."""
    return re.sub(rf"-lr-{_NUMBER}(?=-|$)", "", setting)


def condition_of(setting: str) -> str:
    """The condition at the beginning of a setting."""
    return re.split(rf"-(?:{_AXES})-", setting, maxsplit=1)[0]


def setting_key(setting: str) -> tuple[int, str, tuple[tuple[str, float], ...]]:
    """Sort key: the study's conditions in the study's order, others behind them; then by number."""
    name = condition_of(setting)
    place = CONDITION_ORDER.index(name) if name in CONDITION_ORDER else len(CONDITION_ORDER)
    return place, name, tuple(_numbers(setting))


def _numbers(setting: str) -> list[tuple[str, float]]:
    found = re.findall(rf"-({_AXES})-({_NUMBER})(?=-|$)", setting)
    return [(axis, float(number)) for axis, number in found]


def selects_rates(config: RunConfig) -> bool:
    """Whether trials choose the learning rates. Not where the sweep names its own, or there is no grid."""
    return bool(config.selection.learning_rates) and not config.sweep.learning_rates


def trials(config: RunConfig) -> list[RunConfig]:
    """The trials: every condition at every rate of the grid, one epoch over the first rows, constant rate."""
    if not selects_rates(config):
        return []
    grid = config.selection
    return [
        replace(
            config,
            name=f"{config.prefix}-{condition}-lr-{rate(peak)}",
            results_dir=str(Path(config.results_dir) / TRIALS),
            seed=grid.seed,
            lora=replace(config.lora, targets=condition),
            optim=replace(config.optim, peak_lr=peak, schedule="constant"),
            data=replace(
                config.data,
                train_rows=_least(grid.train_rows, config.data.train_rows),
                validation_rows=_least(grid.validation_rows, config.data.validation_rows),
            ),
            train=replace(config.train, epochs=1, validation_every=grid.validation_every, validation_merge=0),
        )
        for condition, peak in product(config.sweep.conditions, sorted(grid.learning_rates))
    ]


def _least(first: int, second: int | None) -> int:
    return first if second is None else min(first, second)


def members(config: RunConfig, rates: Mapping[str, float] | None = None) -> list[RunConfig]:
    """The runs of the sweep, a condition's together, so that they can share a compiled program.

    Args:
      rates: the chosen learning rate by condition; None: `optim.peak_lr` stands where a choice belongs.
    """
    sweep = config.sweep
    runs = []
    for condition, rank, rows, peak, seed in product(
        sweep.conditions,
        sweep.ranks or [None],
        sweep.batch_rows or [None],
        sweep.learning_rates or [None],
        sweep.seeds,
    ):
        parts = [config.prefix, condition]
        parts += [f"rank-{rank}"] if rank else []
        parts += [f"lr-{rate(peak)}"] if peak else []
        parts += [f"batch-{rows}"] if rows else []
        runs.append(
            replace(
                config,
                name="-".join([*parts, f"seed-{seed}"]),
                seed=seed,
                lora=replace(config.lora, targets=condition, rank=rank or config.lora.rank),
                optim=replace(
                    config.optim, peak_lr=peak or (rates or {}).get(condition, config.optim.peak_lr)
                ),
                train=replace(config.train, batch_rows=rows or config.train.batch_rows),
            )
        )
    return [replace(run, name=None) if run.name == plain_id(run) else run for run in runs]


def plain_id(config: RunConfig) -> str:
    """The id that a run has when nothing but condition and seed tells it from others."""
    return replace(config, name=None).run_id
