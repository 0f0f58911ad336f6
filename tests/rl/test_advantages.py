"""Advantages: the mean of the group is subtracted, and nothing else unless it is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlora.rl.advantages import advantages, bits


def test_the_mean_of_the_group_is_the_baseline():
    np.testing.assert_array_equal(advantages(np.array([1.0, 0, 0, 0])), [0.75, -0.25, -0.25, -0.25])


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = np.array([1.0, 0.3, 0, 0.5, 0.9])
    expected = [r - np.mean(np.delete(rewards, i)) for i, r in enumerate(rewards)]
    np.testing.assert_allclose(advantages(rewards, baseline="leave_one_out"), expected, atol=1e-12)


def test_standard_deviation_and_length_are_options():
    rewards, lengths = np.array([1.0, 0, 0, 0]), np.array([2, 1, 4, 5])
    plain = advantages(rewards)
    np.testing.assert_allclose(advantages(rewards, divide_by_std=True), plain / (0.5 + 1e-4))
    by_length = advantages(rewards, None, lengths, divide_by_length=True)
    np.testing.assert_allclose(by_length, plain / lengths)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.1, 1 / 3])
def test_a_constant_group_has_exactly_none(reward):
    for options in ({}, {"baseline": "leave_one_out"}, {"divide_by_std": True}):
        assert not advantages(np.full(7, reward), **options).any()


def test_the_baseline_is_over_answers_that_count():
    rewards, valid = np.array([1.0, 0, 1, 1]), np.array([True, True, False, True])
    np.testing.assert_allclose(advantages(rewards, valid), [1 / 3, -2 / 3, 0, 1 / 3])
    assert not advantages(rewards, np.array([True, False, False, True])).any()  # what counts is constant
    assert not advantages(rewards, np.array([True, False, False, False])).any()  # nothing to compare with


def test_bits_are_the_entropy_of_the_rewards_of_a_group():
    assert bits(np.array([1.0, 0, 0, 0])) == pytest.approx(4 * 0.8112781245)
    assert bits(np.zeros(8)) == 0
    assert bits(np.array([0.0, 1, 0, 1])) == 4
