"""Steps, learning rates and validations follow the study's rules to the digit."""

from __future__ import annotations

import math

import pytest

from jaxlora.config import OptimConfig, TrainConfig
from jaxlora.train.schedule import learning_rate, plan_run

STUDY = plan_run(OptimConfig(), TrainConfig(), 25348)


def test_the_studys_steps():
    assert (STUDY.steps_per_epoch, STUDY.total_steps, STUDY.warmup_steps) == (3169, 6338, 190)
    assert STUDY.validation_steps == (1000, 2000, 3169, 4000, 5000, 6000, 6338)


def test_the_studys_selection_runs_validate_twice():
    train = TrainConfig(epochs=1, validation_every=32, validation_merge=0)
    plan = plan_run(OptimConfig(schedule="constant"), train, 512)
    assert (plan.total_steps, plan.validation_steps) == (64, (32, 64))
    rates = {learning_rate(s, OptimConfig(schedule="constant", peak_lr=1e-3), plan) for s in range(1, 65)}
    assert rates == {1e-3}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 3e-4 / 190),
        (95, 1.5e-4),
        (190, 3e-4),
        (190 + 3074, 3e-5 + 2.7e-4 * 0.5),  # half-way through the cosine
        (6338, 3e-5),
        (1000, 3e-5 + 2.7e-4 * 0.5 * (1 + math.cos(math.pi * 810 / 6148))),
    ],
)
def test_learning_rate_by_hand(step, expected):
    assert learning_rate(step, OptimConfig(), STUDY) == pytest.approx(expected, rel=1e-12)


def test_linear_falls_to_the_minimum_in_a_straight_line():
    optim = OptimConfig(schedule="linear", min_lr_fraction=0.0)
    plan = plan_run(optim, TrainConfig(), 25348)
    assert plan.warmup_steps == 190
    rates = [learning_rate(step, optim, plan) for step in (95, 190, 190 + 1537, 190 + 3074, 6338)]
    assert rates == pytest.approx([1.5e-4, 3e-4, 2.25e-4, 1.5e-4, 0.0], rel=1e-12)
    assert learning_rate(6338, OptimConfig(schedule="linear"), plan) == pytest.approx(3e-5)


def test_max_steps_ends_a_run_in_the_middle_of_an_epoch_with_a_validation():
    plan = plan_run(OptimConfig(), TrainConfig(max_steps=3500), 25348)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (3169, 3500, 105)
    assert plan.validation_steps == (1000, 2000, 3169, 3500)
    assert plan_run(OptimConfig(), TrainConfig(max_steps=9999), 25348) == STUDY
    assert plan_run(OptimConfig(), TrainConfig(max_steps=5), 25348).validation_steps == (5,)


def test_rows_come_in_file_order_and_the_last_batch_is_short():
    assert STUDY.rows_of_step(1) == range(8)
    assert STUDY.rows_of_step(3169) == range(25344, 25348)
    assert STUDY.rows_of_step(3170) == range(8)
    assert STUDY.rows_of_step(6338) == range(25344, 25348)
    epoch = [row for step in range(1, 3170) for row in STUDY.rows_of_step(step)]
    assert epoch == list(range(25348))


def test_figures_of_the_reference_file(shared):
    import json

    figures = json.loads((shared / "reference/study.json").read_text())["schedule"]
    assert figures["validation_steps"] == list(STUDY.validation_steps)
    assert figures["total_steps"] == STUDY.total_steps
    assert figures["warmup_steps"] == STUDY.warmup_steps
