"""Compare a study's evaluated models: by condition, against the baseline, and problem by problem.

    comparison = compare_evaluations([baseline, *adapters])   # plain values, ready for comparison.json
    comparison["pairs"][0]["strict"]["verdict"]          # "inconclusive" or the name of a condition

Everything is computed for both scores: strict, the study's, which decides; and numeric, which is reported
with it and never replaces it. Counts and means are exact fractions until they are written. Tests and
intervals come from `scipy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from jaxlora.evals.gsm8k import aggregate
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record
from jaxlora.study.grid import Setting

WINNER_THRESHOLD = 0.01  # a smaller difference of condition means is "inconclusive"; fixed before the runs
SCORES = {"strict": "correct", "numeric": "correct_numeric"}  # score -> field of a prediction record
RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Evaluation:
    """The predictions of one model; `setting` and `seed` are None for the untouched base."""

    run_id: str
    setting: Setting | None
    seed: int | None
    records: tuple[Record, ...]

    @property
    def condition(self) -> str | None:
        """The adapter's placement; None for the base."""
        return None if self.setting is None else self.setting.condition

    def outcomes(self, score: str) -> np.ndarray:
        """1 where the answer is right, else 0: int64 [problems], in benchmark order."""
        return np.array([record[SCORES[score]] for record in self.records], dtype=np.int64)

    def correct(self, score: str) -> int:
        return int(self.outcomes(score).sum())


def compare_evaluations(evaluations: Sequence[Evaluation], resamples: int = RESAMPLES) -> dict[str, Any]:
    """All tables of the comparison as plain values, in which `condition` is a setting's label.

    At most one evaluation may be the baseline. Anything that needs a missing baseline or an unpaired seed is
    null or omitted, never guessed. Raises `UserError` if the evaluations are not of the same problems, or if
    two have the same condition and seed.
    """
    _check_comparable(evaluations)
    baseline = next((evaluation for evaluation in evaluations if evaluation.setting is None), None)
    by_setting = _by_setting(evaluations)
    return {
        "problems": len(evaluations[0].records),
        "threshold": WINNER_THRESHOLD,
        "confidence": CONFIDENCE,
        "bootstrap_resamples": resamples,
        "baseline": None if baseline is None else _run_row(baseline, None),
        "runs": [_run_row(run, baseline) for runs in by_setting.values() for run in runs],
        "conditions": [
            _setting_row(setting, runs, baseline, resamples) for setting, runs in by_setting.items()
        ],
        "pairs": [_pair_row(by_setting, first, second, resamples) for first, second in _pairs(by_setting)],
    }


def _check_comparable(evaluations: Sequence[Evaluation]) -> None:
    if not evaluations:
        raise UserError("there is nothing to compare: no evaluation was found")
    seen: dict[tuple[Setting | None, int | None], str] = {}
    first = evaluations[0]
    for evaluation in evaluations:
        key = (evaluation.setting, evaluation.seed if evaluation.setting else None)
        if key in seen:
            raise UserError(f"{evaluation.run_id} and {seen[key]} have the same condition and seed; keep one")
        seen[key] = evaluation.run_id
        if _problems(evaluation) != _problems(first):
            raise UserError(
                f"{evaluation.run_id} and {first.run_id} were not evaluated on the same problems; "
                "evaluate both with the same benchmark and the same number of problems"
            )


def _problems(evaluation: Evaluation) -> list[tuple[Any, ...]]:
    fields = ("benchmark_index", "question", "reference_answer")
    return [tuple(record[field] for field in fields) for record in evaluation.records]


def _by_setting(evaluations: Sequence[Evaluation]) -> dict[Setting, list[Evaluation]]:
    """Adapters by setting, in the order of settings, with seeds ascending."""
    settings = {evaluation.setting for evaluation in evaluations if evaluation.setting is not None}
    return {
        setting: sorted((run for run in evaluations if run.setting == setting), key=lambda run: run.seed or 0)
        for setting in sorted(settings, key=lambda setting: setting.order)
    }


def _pairs(settings: Iterable[Setting]) -> list[tuple[Setting, Setting]]:
    """Pairs that differ only in condition: ranks, rates or batch sizes of one condition are not paired."""
    return [
        (first, second)
        for first, second in combinations(settings, 2)
        if replace(first, condition=second.condition) == second
    ]


# --- One model, one condition -------------------------------------------------------------------------------


def _run_row(run: Evaluation, baseline: Evaluation | None) -> dict[str, Any]:
    delta = {score: baseline and run.correct(score) - baseline.correct(score) for score in SCORES}
    return {
        "run_id": run.run_id,
        "condition": None if run.setting is None else str(run.setting),
        "seed": run.seed,
        **aggregate(run.records),
        "delta_correct_strict": delta["strict"],
        "delta_correct_numeric": delta["numeric"],
    }


def _setting_row(
    setting: Setting, runs: list[Evaluation], baseline: Evaluation | None, resamples: int
) -> dict[str, Any]:
    counts = [aggregate(run.records) for run in runs]
    answers = sum(row["total"] for row in counts)
    return {
        "condition": str(setting),
        "seeds": [run.seed for run in runs],
        **{score: _score_row(score, runs, baseline, resamples) for score in SCORES},
        "extraction_failure_rate": sum(row["extraction_failures"] for row in counts) / answers,
        "truncation_rate": sum(row["truncated"] for row in counts) / answers,
        "mean_generated_tokens": sum(row["generated_tokens"] for row in counts) / len(runs),
        "format_share_of_gain": _format_share(runs, baseline),
    }


def _score_row(
    score: str, runs: list[Evaluation], baseline: Evaluation | None, resamples: int
) -> dict[str, Any]:
    correct = [run.correct(score) for run in runs]
    problems = len(runs[0].records)
    row = {
        "correct": correct,
        "mean": sum(count / problems for count in correct) / len(correct),  # in floats, as in the study
        "min": min(correct) / problems,
        "max": max(correct) / problems,
        "delta_to_baseline": None,
        "delta_interval": None,
    }
    if baseline is not None:
        row["delta_to_baseline"] = float(_mean_accuracy(runs, score) - _mean_accuracy([baseline], score))
        mean_outcome = np.mean([run.outcomes(score) for run in runs], axis=0)
        row["delta_interval"] = bootstrap_interval(mean_outcome - baseline.outcomes(score), resamples)
    return row


def _mean_accuracy(runs: list[Evaluation], score: str) -> Fraction:
    return Fraction(sum(run.correct(score) for run in runs), len(runs) * len(runs[0].records))


def _format_share(runs: list[Evaluation], baseline: Evaluation | None) -> float | None:
    """The part of the strict gain over the baseline that vanishes when both are scored numerically.

    1 - (numeric gain) / (strict gain): 0 means that none of the gain is answer format, 1 that all of it is;
    it is negative if the numeric gain is larger. Null without a baseline or a strict gain.
    """
    if baseline is None:
        return None
    gain = {score: _mean_accuracy(runs, score) - _mean_accuracy([baseline], score) for score in SCORES}
    return float(1 - gain["numeric"] / gain["strict"]) if gain["strict"] > 0 else None


# --- Two conditions -----------------------------------------------------------------------------------------


def _pair_row(
    by_setting: dict[Setting, list[Evaluation]], first: Setting, second: Setting, resamples: int
) -> dict[str, Any]:
    left = {run.seed: run for run in by_setting[first]}
    right = {run.seed: run for run in by_setting[second]}
    seeds = [seed for seed in left if seed in right]
    row: dict[str, Any] = {
        "first": str(first),
        "second": str(second),
        "seeds": seeds,
        "unpaired_seeds": sorted(set(left) ^ set(right), key=str),
    }
    for score in SCORES:
        gap = _mean_accuracy(by_setting[first], score) - _mean_accuracy(by_setting[second], score)
        outcomes = [(left[seed].outcomes(score), right[seed].outcomes(score)) for seed in seeds]
        row[score] = {
            "gap": float(gap),
            "verdict": verdict(gap, str(first), str(second)),
            "by_seed": [
                {"seed": seed} | _paired_row(*pair, resamples)
                for seed, pair in zip(seeds, outcomes, strict=True)
            ],
            "pooled": _pooled_row(outcomes, resamples) if seeds else None,
        }
    return row


def verdict(gap: Fraction, first: str, second: str) -> str:
    """The better condition, or "inconclusive" if the difference of means is below WINNER_THRESHOLD."""
    if abs(gap) < Fraction(str(WINNER_THRESHOLD)):
        return "inconclusive"
    return first if gap > 0 else second


def _paired_row(first: np.ndarray, second: np.ndarray, resamples: int) -> dict[str, Any]:
    """The paired table of two outcome vectors [problems], with its exact test and interval."""
    only_first = int(np.sum(first > second))
    only_second = int(np.sum(first < second))
    return {
        "both_correct": int(np.sum((first == 1) & (second == 1))),
        "both_wrong": int(np.sum((first == 0) & (second == 0))),
        "only_first": only_first,
        "only_second": only_second,
        "difference": only_first - only_second,
        "mcnemar_p": mcnemar_p(only_first, only_second),
        "interval": bootstrap_interval(first - second, resamples),
    }


def _pooled_row(outcomes: list[tuple[np.ndarray, np.ndarray]], resamples: int) -> dict[str, Any]:
    """All seeds pooled: counts are added up; the interval resamples problems, each with all of its seeds.

    Answers to one problem from several seeds are not independent. The interval allows for that; the exact
    test on the pooled counts does not, so its p-value tends to be too small.
    """
    first, second = (np.concatenate(side) for side in zip(*outcomes, strict=True))
    mean_difference = np.mean([left - right for left, right in outcomes], axis=0)
    return _paired_row(first, second, resamples=0) | {
        "interval": bootstrap_interval(mean_difference, resamples)
    }


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: the binomial test of the disagreements against one half."""
    disagreements = only_first + only_second
    return float(stats.binomtest(only_first, disagreements, 0.5).pvalue) if disagreements else 1.0


def bootstrap_interval(differences: np.ndarray, resamples: int) -> list[float] | None:
    """Percentile interval of the mean of per-problem differences [problems], resampling problems.

    The generator's seed is fixed, so the same predictions always give the same report.
    """
    if resamples == 0 or len(differences) < 2:
        return None
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        batch=500,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]
