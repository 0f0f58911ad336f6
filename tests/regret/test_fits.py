"""Envelopes, best rates, lines and capacities against values that are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxlora.models.families import count_matrix_parameters, published_config
from jaxlora.regret.arms import parse_arm
from jaxlora.regret.capacity import code_length, flops_ratio, rank_for
from jaxlora.regret.fits import (
    best_rate,
    departure,
    envelope,
    line_in_log,
    pooled_scatter,
    ratio,
    slope,
)
from jaxlora.runtime.errors import UserError


def curve(*values, steps=(1, 2, 4)):
    return list(zip(steps, values, strict=False))


def test_an_envelope_is_the_pointwise_minimum_with_its_rate():
    points = envelope({1e-4: curve(3.0, 2.0, 1.0), 2e-4: curve(2.5, 2.0, 1.5)})
    assert [(p.step, p.loss, p.rate) for p in points] == [(1, 2.5, 2e-4), (2, 2.0, 1e-4), (4, 1.0, 1e-4)]


def test_a_run_that_diverged_takes_part_until_then():
    points = envelope({1e-4: curve(3.0, 2.0, 1.0), 8e-4: curve(1.0, steps=(1,))}, frozenset({8e-4}))
    assert [p.loss for p in points] == [1.0, 2.0, 1.0]
    assert envelope({}) == []


@pytest.mark.parametrize("other", [curve(3.0, 2.0, 1.0, steps=(1, 3, 4)), curve(3.0, 2.0, steps=(1, 2))])
def test_curves_of_different_step_grids_have_no_envelope(other):
    with pytest.raises(UserError, match="has other steps than the others") as error:
        envelope({1e-4: curve(3.0, 2.0, 1.0), 2e-4: other})
    assert "\n" not in str(error.value)


def parabola(centre, curvature=0.01, places=range(-2, 3), middle=1e-3):
    return {middle * 2.0**p: 1 + curvature * (p - centre) ** 2 for p in places}


@pytest.mark.parametrize("centre", [-0.9, -0.3, 0.0, 0.45])
def test_a_parabola_in_log_rate_is_found_exactly(centre):
    best = best_rate(parabola(centre))
    assert best.rate == pytest.approx(1e-3 * 2**centre, rel=1e-9)
    assert best.on_grid == pytest.approx(1e-3 * 2 ** round(centre))
    assert (best.low, best.high, best.edge) == (None, None, None)


def test_the_interval_has_the_width_that_error_propagation_gives():
    scatter, curvature = 1e-4, 0.01
    best = best_rate(parabola(0.1, curvature), scatter)
    # v = (y- - y+) / (2 (y- - 2 y0 + y+)) with y = 1 + c (p - v)^2: to first order, for noise of each y
    deviation = scatter * math.sqrt(2 + 24 * 0.1**2) / (4 * curvature)
    width = math.log2(best.high / best.low)
    assert width == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert best.low < best.rate < best.high


@pytest.mark.parametrize(("centre", "edge"), [(5, "high"), (-5, "low")])
def test_a_best_rate_on_an_edge_is_none_for_a_ratio(centre, edge):
    best = best_rate(parabola(centre), 1e-3)
    assert best.edge == edge
    assert best.low is None
    assert ratio(best, best_rate(parabola(0))) is None
    assert best_rate({1e-3: math.inf}) is None


def test_beside_a_run_that_diverged_the_tried_rate_stands():
    losses = parabola(0) | {2e-3: math.inf, 4e-3: math.inf}
    assert best_rate(losses).rate == best_rate(losses).on_grid == 1e-3


def test_a_ratio_of_equal_sweeps_holds_the_true_one():
    lora, full = best_rate(parabola(0.2), 1e-3), best_rate(parabola(-0.1, middle=1e-4), 1e-3)
    found = ratio(lora, full)
    assert found.value == pytest.approx(10 * 2**0.3, rel=1e-6)
    assert found.low < found.value < found.high
    assert str(found).startswith("12.3 (")
    # The noise of two sweeps is independent, also where both were drawn with the same seed.
    two, one = (math.log2(found.high / found.low) for found in (ratio(lora, lora), lora))
    assert two == pytest.approx(math.sqrt(2) * one, rel=0.1)


def test_a_line_in_log_step_and_where_a_curve_leaves_it():
    steps = [2**k for k in range(8)]
    line = [(s, 2 - 0.1 * math.log(s)) for s in steps]
    bent = [(s, max(loss, 1.75) + 0.004 * (s == 2)) for s, loss in line]
    reference, other = envelope({1e-3: line}), envelope({1e-3: bent})
    fit = line_in_log(reference)
    assert (fit.a, fit.b, fit.r2) == pytest.approx((2, -0.1, 1))
    assert departure(other, reference, by=0.002) == 16
    assert departure(other, reference, by=0.5) is None
    assert line_in_log(reference[:2]) is None
    with pytest.raises(UserError, match="different steps"):
        departure(other[1:], reference, by=0.1)


def test_scatter_is_pooled_over_cells_of_repeats():
    cells = [{"a": 1.0, "b": 3.0}, {"c": 5.0, "d": 5.0, "e": 5.0}]
    # Student's quantile for three degrees of freedom is 3.182 in every table, the normal one 1.960.
    assert pooled_scatter(cells) == pytest.approx(math.sqrt(2 / 3) * 3.1824 / 1.95996, rel=1e-4)
    assert pooled_scatter([{"a": 1.0}, {}]) is None


def test_what_a_seed_does_to_all_cells_is_no_scatter():
    rng = np.random.default_rng(0)
    noise, seeds = rng.normal(0, 0.01, (40, 3)), (0.0, 1.0, -2.0)
    cells = [{s: place + seeds[s] + noise[place, s] for s in range(3)} for place in range(40)]
    assert pooled_scatter(cells) == pytest.approx(0.01, rel=0.2)
    assert pooled_scatter([dict(list(cells[0].items())[:2]), cells[1]]) < 0.05
    alone = np.std(list(cells[0].values()), ddof=1) * 4.3027 / 1.95996  # two degrees of freedom
    assert pooled_scatter(cells[:1]) == pytest.approx(alone, rel=1e-4)


def test_a_slope_and_its_error_are_those_of_least_squares():
    x, y = [3.0, 5.0, 7.0, 9.0], [0.1, 0.25, 0.3, 0.5]
    assert slope(x, y, 0.02) == pytest.approx((np.polyfit(x, y, 1)[0], 0.02 / math.sqrt(20)))


def test_code_length_counts_the_first_pass_alone():
    assert code_length([math.log(2) * 10, math.log(2) * 6, 99.0], steps_per_epoch=2) == pytest.approx(16)
    assert rank_for(16, per_rank=4) == 2
    assert rank_for(0.1, per_rank=4) == 1


@pytest.mark.parametrize(
    ("model", "rank", "expected"),
    [("llama-3.1-8b", 1, 0.6670), ("llama-3.1-8b", 128, 0.7147), ("llama-3.1-8b", 512, 0.8590),
     ("qwen3-8b", 32, 0.6792), ("smollm2-135m", 8, 0.6897), ("smollm2-135m", 256, 1.403),
     ("llama-3.2-1b", 512, 1.037)],
)  # fmt: skip
def test_the_share_of_flops_is_the_published_one(model, rank, expected):
    config = published_config(model)
    weights = count_matrix_parameters(config) - config.vocab_size * config.hidden_size  # without the head
    assert flops_ratio(weights, parse_arm(f"all_layer:{rank}", config).parameters) == pytest.approx(
        expected, abs=6e-4
    )
