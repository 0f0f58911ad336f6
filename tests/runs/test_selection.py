"""Promises of the two selection rules."""

from __future__ import annotations

import json
import math

import pytest

from jaxlora.runtime.errors import UserError
from jaxlora.train.selection import select_checkpoint, select_learning_rate, stops_early


@pytest.fixture(scope="module")
def reference(shared):
    return json.loads((shared / "reference" / "study.json").read_text())


def test_the_studys_nlls_select_step_3169_in_all_six_runs(reference):
    nlls = reference["validation_nll"]
    chosen = {
        (condition, seed): select_checkpoint(dict(zip(nlls["steps"], values, strict=True)))
        for condition in ("attention_only", "all_layer")
        for seed, values in nlls[condition].items()
    }
    assert len(chosen) == 6
    assert set(chosen.values()) == {3169}


@pytest.mark.parametrize("condition", ["attention_only", "all_layer"])
def test_the_studys_nlls_select_3e_4_for_both_conditions(reference, condition):
    nlls = {float(rate): nll for rate, nll in reference["lr_selection"][condition].items()}
    assert len(nlls) == 3
    assert select_learning_rate(nlls) == 3e-4


def test_exact_ties_choose_the_smaller_rate_and_the_later_checkpoint():
    assert select_learning_rate({3e-4: 0.5, 1e-4: 0.5, 1e-3: 0.5}) == 1e-4
    assert select_checkpoint({100: 0.5, 300: 0.5, 200: 0.5}) == 300


def test_a_difference_in_the_last_digit_is_no_tie():
    lower = math.nextafter(0.5, 0)
    assert select_learning_rate({1e-4: 0.5, 3e-4: lower}) == 3e-4
    assert select_checkpoint({100: lower, 200: 0.5}) == 100


def test_failed_runs_and_nlls_that_are_not_finite_are_ineligible():
    assert select_learning_rate({1e-4: None, 3e-4: math.nan, 1e-3: 9.0}) == 1e-3
    assert select_checkpoint({100: 9.0, 200: math.nan, 300: math.inf}) == 100
    with pytest.raises(UserError, match="no learning rate can be selected"):
        select_learning_rate({1e-4: None, 3e-4: math.inf})
    with pytest.raises(UserError, match="no checkpoint can be selected"):
        select_checkpoint({})


@pytest.mark.parametrize(
    ("nll", "patience", "expected"),
    [
        ({}, 1, False),
        ({10: 2.0}, 1, False),
        ({10: 2.0, 20: 2.1}, 1, True),
        ({10: 2.0, 20: 2.1}, 2, False),
        ({10: 2.0, 20: 2.1, 30: 1.9, 40: 2.5}, 2, False),
        ({10: 2.0, 20: 2.1, 30: 2.0}, 2, False),  # an equal one is the better one
        ({10: 2.0, 20: 2.1, 30: 2.05}, 2, True),
        ({10: 2.0, 20: 2.1, 30: 2.05}, None, False),
    ],
)
def test_early_stopping_counts_validations_since_the_best(nll, patience, expected):
    assert stops_early(nll, patience) is expected
