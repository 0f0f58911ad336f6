"""Promises of the comparison: the study's own tables from its paired counts, exact tests, honest absences."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from helpers.study_fixtures import FORMAT, NO_BOX, RIGHT, TRUNCATED, WRONG, evaluation

from jaxlora.runtime.errors import UserError
from jaxlora.study.comparison import bootstrap_interval, compare_evaluations, mcnemar_p, verdict
from jaxlora.study.grid import Setting


@pytest.fixture(scope="module")
def reference(shared):
    return json.loads((shared / "reference" / "study.json").read_text())["gsm8k_eval"]


@pytest.fixture(scope="module")
def study(reference):
    """The comparison of prediction sets with exactly the study's counts, paired seed by seed."""
    base = reference["base"]
    wrong = base["total"] - base["correct"]
    kinds = [RIGHT] * base["correct"] + [NO_BOX] * base["extraction_failures"]
    evaluations = [evaluation(None, None, kinds + [WRONG] * (wrong - base["extraction_failures"]))]
    for seed, paired in reference["paired"].items():
        both, first = paired["both_correct"], paired["attention_only_only"]
        second, neither = paired["all_layer_only"], paired["both_wrong"]
        for condition, kinds in (
            ("attention_only", [RIGHT] * (both + first) + [WRONG] * (second + neither)),
            ("all_layer", [RIGHT] * both + [WRONG] * first + [RIGHT] * second + [WRONG] * neither),
        ):
            failures = reference[condition][seed]["extraction_failures"]
            kinds[-failures:] = [NO_BOX] * failures
            evaluations.append(evaluation(condition, int(seed), kinds))
    return compare_evaluations(evaluations, resamples=999)


# --- The study's tables -------------------------------------------------------------------------------------


def test_the_studys_means_gap_and_verdict_are_reproduced(study):
    attention, everything = study["conditions"]
    assert (attention["condition"], everything["condition"]) == ("attention_only", "all_layer")
    assert attention["strict"]["mean"] == 0.9054839524892596
    assert everything["strict"]["mean"] == 0.9009350518069245
    assert attention["strict"]["correct"] == [1193, 1196, 1194]
    assert everything["strict"]["correct"] == [1186, 1190, 1189]
    assert (attention["strict"]["min"], attention["strict"]["max"]) == (1193 / 1319, 1196 / 1319)
    (pair,) = study["pairs"]
    assert pair["strict"]["gap"] == pytest.approx(0.0045489, abs=5e-8)
    assert pair["strict"]["verdict"] == "inconclusive"


def test_the_studys_paired_tables_are_reproduced(study, reference):
    (pair,) = study["pairs"]
    assert [row["difference"] for row in pair["strict"]["by_seed"]] == [7, 6, 5]
    for row in pair["strict"]["by_seed"]:
        assert reference["paired"][str(row["seed"])] == {
            "both_correct": row["both_correct"],
            "both_wrong": row["both_wrong"],
            "attention_only_only": row["only_first"],
            "all_layer_only": row["only_second"],
        }
    pooled = pair["strict"]["pooled"]
    assert (pooled["only_first"], pooled["only_second"], pooled["difference"]) == (149, 131, 18)


def test_the_studys_deltas_to_the_baseline_and_failures_are_reproduced(study, reference):
    assert study["baseline"]["correct_strict"] == 1115
    assert study["baseline"]["extraction_failures"] == 31
    assert study["baseline"]["delta_correct_strict"] is None
    for run in study["runs"]:
        recorded = reference[run["condition"]][str(run["seed"])]
        assert run["correct_strict"] == recorded["correct"]
        assert run["delta_correct_strict"] == recorded["correct"] - 1115
        assert run["extraction_failures"] == recorded["extraction_failures"]
    delta = study["conditions"][0]["strict"]["delta_to_baseline"]
    assert delta == pytest.approx(0.9054839524892596 - 1115 / 1319, abs=1e-15)


# --- The rule and the tests ---------------------------------------------------------------------------------


def test_a_difference_below_the_threshold_is_never_a_winner():
    for gap in ("0.0099999999", "-0.0099999999", "0"):
        assert verdict(Fraction(gap), "a", "b") == "inconclusive"
    assert verdict(Fraction("0.01"), "a", "b") == "a"
    assert verdict(Fraction("-0.01"), "a", "b") == "b"


@pytest.mark.parametrize(("first", "second"), [(54, 47), (49, 43), (46, 41), (10, 0), (3, 12), (5, 5)])
def test_mcnemar_is_the_sum_of_binomial_tails(first, second):
    n, low = first + second, min(first, second)
    tail = Fraction(sum(comb(n, k) for k in range(low + 1)), 2**n)
    assert mcnemar_p(first, second) == pytest.approx(float(min(1, 2 * tail)), rel=1e-12)


def test_no_disagreement_is_no_evidence():
    assert mcnemar_p(0, 0) == 1.0
    assert bootstrap_interval(np.zeros(50), 99) == [0.0, 0.0]


def test_the_bootstrap_interval_agrees_with_the_normal_one_and_repeats():
    differences = np.array([1] * 54 + [-1] * 47 + [0] * 1218)
    low, high = bootstrap_interval(differences, 9999)
    half = 1.959964 * differences.std() / np.sqrt(len(differences))
    assert low == pytest.approx(differences.mean() - half, abs=1e-3)
    assert high == pytest.approx(differences.mean() + half, abs=1e-3)
    assert bootstrap_interval(differences, 9999) == [low, high]


def test_the_pooled_interval_draws_problems_with_all_their_seeds():
    kinds = [RIGHT] * 30 + [WRONG] * 70
    other = [WRONG] * 20 + [RIGHT] * 10 + [WRONG] * 70
    one, three = (
        compare_evaluations(
            [
                evaluation(name, seed, answers)
                for seed in range(n)
                for name, answers in (("a", kinds), ("b", other))
            ],
            resamples=999,
        )["pairs"][0]["strict"]["pooled"]
        for n in (1, 3)
    )
    assert three["difference"] == 3 * one["difference"]
    assert three["interval"] == one["interval"]  # the same answers three times carry no more information


# --- Strict and numeric -------------------------------------------------------------------------------------


def test_a_gain_that_is_only_format_vanishes_in_the_numeric_score():
    base = evaluation(None, None, [RIGHT] * 50 + [FORMAT] * 40 + [WRONG] * 10)
    format_only = evaluation("attention_only", 0, [RIGHT] * 90 + [WRONG] * 10)
    half = evaluation("all_layer", 0, [RIGHT] * 55 + [FORMAT] * 35 + [RIGHT] * 5 + [WRONG] * 5)
    result = compare_evaluations([base, format_only, half], resamples=99)
    first, second = result["conditions"]
    assert first["strict"]["delta_to_baseline"] == pytest.approx(0.4)
    assert first["numeric"]["delta_to_baseline"] == 0
    assert first["format_share_of_gain"] == 1
    assert second["format_share_of_gain"] == pytest.approx(0.5)
    (pair,) = result["pairs"]
    assert pair["strict"]["verdict"] == "attention_only"
    assert pair["numeric"]["verdict"] == "all_layer"


def test_no_gain_has_no_format_share():
    base = evaluation(None, None, [RIGHT] * 5)
    assert (
        compare_evaluations([base, evaluation("a", 0, [RIGHT] * 4 + [WRONG])])["conditions"][0][
            "format_share_of_gain"
        ]
        is None
    )
    assert compare_evaluations([evaluation("a", 0, [RIGHT])])["conditions"][0]["format_share_of_gain"] is None


def test_no_box_and_truncation_rates_are_over_all_seeds():
    runs = [
        evaluation("a", 0, [RIGHT, NO_BOX, TRUNCATED, WRONG]),
        evaluation("a", 1, [RIGHT, RIGHT, RIGHT, NO_BOX]),
    ]
    row = compare_evaluations(runs, resamples=99)["conditions"][0]
    assert row["extraction_failure_rate"] == 3 / 8
    assert row["truncation_rate"] == 1 / 8


# --- What is absent is said ---------------------------------------------------------------------------------


def test_without_a_baseline_deltas_are_null():
    result = compare_evaluations([evaluation("a", 0, [RIGHT]), evaluation("b", 0, [WRONG])], resamples=99)
    assert result["baseline"] is None
    assert result["runs"][0]["delta_correct_strict"] is None
    assert result["conditions"][0]["strict"]["delta_to_baseline"] is None


def test_unpaired_seeds_are_named_and_left_out_of_the_paired_tables():
    runs = [evaluation("a", 0, [RIGHT]), evaluation("a", 1, [RIGHT]), evaluation("b", 1, [WRONG])]
    (pair,) = compare_evaluations(runs, resamples=99)["pairs"]
    assert (pair["seeds"], pair["unpaired_seeds"]) == ([1], [0])
    assert [row["seed"] for row in pair["strict"]["by_seed"]] == [1]
    (pair,) = compare_evaluations([runs[0], runs[2]], resamples=99)["pairs"]
    assert pair["strict"]["pooled"] is None


def test_three_conditions_make_three_pairs_in_the_studys_order():
    runs = [evaluation(name, 0, [RIGHT]) for name in ("all_layer", "other", "mlp_only", "attention_only")]
    pairs = [(pair["first"], pair["second"]) for pair in compare_evaluations(runs, resamples=99)["pairs"]]
    assert pairs[:3] == [
        ("attention_only", "mlp_only"),
        ("attention_only", "all_layer"),
        ("attention_only", "other"),
    ]
    assert len(pairs) == 6


def test_different_problems_or_the_same_run_twice_are_refused():
    first = evaluation("a", 0, [RIGHT, RIGHT])
    with pytest.raises(UserError, match="not evaluated on the same problems"):
        compare_evaluations([first, evaluation("b", 0, [RIGHT])])
    with pytest.raises(UserError, match="have the same condition and seed"):
        compare_evaluations([first, evaluation("a", 0, [WRONG, RIGHT])])
    with pytest.raises(UserError, match="nothing to compare"):
        compare_evaluations([])


def test_the_comparison_is_plain_json(study):
    assert json.loads(json.dumps(study, allow_nan=False)) == study


def test_in_a_grid_two_conditions_are_paired_where_all_else_is_equal():
    runs = [
        replace(
            evaluation(condition, seed, [RIGHT] * n + [WRONG] * (9 - n)),
            setting=Setting(condition, rank=rank),
        )
        for condition, n in (("attention_only", 5), ("all_layer", 6))
        for rank in (16, 4)
        for seed in (0, 1)
    ]
    comparison = compare_evaluations(runs, resamples=0)
    groups = [f"{condition}-rank-{rank}" for condition in ("attention_only", "all_layer") for rank in (4, 16)]
    assert [row["condition"] for row in comparison["conditions"]] == groups
    assert [(pair["first"], pair["second"]) for pair in comparison["pairs"]] == [
        (f"attention_only-rank-{rank}", f"all_layer-rank-{rank}") for rank in (4, 16)
    ]
