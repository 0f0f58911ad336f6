"""The runs of a study, derived from its one configuration: the trials, the sweep, and their names.

    trials(config)[0].run_id                       # "qwen3-8b-attention_only-lr-1e-4"
    sweep_runs(config, {"all_layer": 3e-4, ...})   # 6 configurations, one for each run
    setting_of(manifest["config"], "all_layer")    # Setting("all_layer", rank=4): read back, as data

Every run is a `RunConfig` of its own, no different from a run of `launch/train.py`. Its name says what varies
between the runs: `<prefix>-<condition>[-rank-<r>][-lr-<rate>][-batch-<rows>]-seed-<seed>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from jaxlora.config import RunConfig

TRIALS = "lr-selection"  # the trials' folder, inside the results directory
CONDITION_ORDER = ("attention_only", "mlp_only", "all_layer")


def study_dir(config: RunConfig) -> Path:
    """The folder of the study's own files: report, figures, comparison, exported adapters."""
    return Path(config.results_dir) / f"{config.prefix}-report"


def rate(value: float) -> str:
    """Format a learning rate, as in 3e-4."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@dataclass(frozen=True)
class Setting:
    """What a study varies between its runs, besides the seed. None: the same in all runs.

    >>> str(Setting("all_layer", rank=4, rate=3e-4))
    'all_layer-rank-4-lr-3e-4'
    """

    condition: str  # what is trained, such as `all_layer`
    rank: int | None = None
    rate: float | None = None  # the peak learning rate
    batch_rows: int | None = None

    def __str__(self) -> str:
        return "-".join([self.condition, *self.axes])

    @property
    def axes(self) -> list[str]:
        """The parts of the label after the condition."""
        parts = [f"rank-{self.rank}"] if self.rank is not None else []
        parts += [f"lr-{rate(self.rate)}"] if self.rate is not None else []
        return parts + ([f"batch-{self.batch_rows}"] if self.batch_rows is not None else [])

    @property
    def order(self) -> tuple[int, str, list[tuple[str, float]]]:
        """Sort key: the study's conditions in the study's order, then others; then by number."""
        known = self.condition in CONDITION_ORDER
        place = CONDITION_ORDER.index(self.condition) if known else len(CONDITION_ORDER)
        axes = (("rank", self.rank), ("lr", self.rate), ("batch", self.batch_rows))
        return place, self.condition, [(name, value) for name, value in axes if value is not None]

    def without_rate(self) -> Setting:
        """The setting shared by runs that differ only in learning rate and seed."""
        return replace(self, rate=None)


def setting_of(config: Mapping[str, Any], condition: str, trial: bool = False) -> Setting:
    """The setting of a run, from the configuration recorded in its manifest.

    Args:
      config: nested plain values, as returned by `to_dict`; missing ones count as not varied.
      condition: as named in the run's records.
      trial: whether it is a run of the learning-rate selection, which varies only the rate.
    """
    peak = (config.get("optim") or {}).get("peak_lr")
    if trial:
        return Setting(condition, rate=peak)
    sweep = config.get("sweep") or {}
    if config.get("name") is None:  # trained on its own, or by a study that varies nothing else
        return Setting(condition)
    return Setting(
        condition,
        rank=(config.get("lora") or {}).get("rank") if sweep.get("ranks") else None,
        rate=peak if sweep.get("learning_rates") else None,
        batch_rows=(config.get("train") or {}).get("batch_rows") if sweep.get("batch_rows") else None,
    )


def run_name(prefix: str, setting: Setting, seed: int | None = None) -> str:
    """The name of a study's run; trials, which all have the same seed, omit it."""
    return f"{prefix}-{setting}" + ("" if seed is None else f"-seed-{seed}")


def selects_rates(config: RunConfig) -> bool:
    """Whether trials choose the learning rates: not if the sweep sets its own, or if there are no trials."""
    return bool(config.selection.learning_rates) and not config.sweep.learning_rates


def trials(config: RunConfig) -> list[RunConfig]:
    """The trials: every condition at every rate of the grid, one epoch over the first rows, constant rate."""
    if not selects_rates(config):
        return []
    grid = config.selection
    return [
        replace(
            config,
            name=run_name(config.prefix, Setting(condition, rate=peak)),
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


def sweep_runs(config: RunConfig, rates: Mapping[str, float] | None = None) -> list[RunConfig]:
    """The runs of the sweep, grouped by condition.

    Args:
      rates: the chosen learning rate by condition; None: use `optim.peak_lr` in its place.
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
        setting = Setting(condition, rank, peak, rows)
        chosen = (rates or {}).get(condition, config.optim.peak_lr)
        runs.append(
            replace(
                config,
                # If only condition and seed vary, this is the run that launch/train.py would make.
                name=run_name(config.prefix, setting, seed) if setting.axes else None,
                seed=seed,
                lora=replace(config.lora, targets=condition, rank=rank or config.lora.rank),
                optim=replace(config.optim, peak_lr=peak or chosen),
                train=replace(config.train, batch_rows=rows or config.train.batch_rows),
            )
        )
    return runs
