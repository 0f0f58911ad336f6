"""Which conditions there are, which runs they take, and that the grid follows its best rate."""

from __future__ import annotations

import math

import pytest

from jaxlora.config import RegretConfig, RunConfig
from jaxlora.models.families import published_config
from jaxlora.regret.arms import matched_rank, parse_arm, parse_arms
from jaxlora.regret.design import RunId, best_run, cells_of, next_runs, wanted
from jaxlora.regret.runs import look_steps
from jaxlora.regret.worker import in_order
from jaxlora.runtime.errors import UserError
from jaxlora.train.rates import outside_domain, published_rate, rate_warning

LLAMA, SMALL = published_config("llama-3.1-8b"), published_config("smollm2-135m")


@pytest.mark.parametrize(
    ("arm", "billions"),
    [("mlp_only+lm_head:256", 0.49), ("attention_only+lm_head:256", 0.25), ("all_layer+lm_head:256", 0.70),
     ("mlp_only+lm_head:128", 0.24)],
)  # fmt: skip
def test_the_posts_parameter_table_has_an_adapter_on_the_head_in_every_row(arm, billions):
    assert parse_arm(arm, LLAMA).parameters / 1e9 == pytest.approx(billions, abs=0.0051)
    assert round(parse_arm(arm, LLAMA).parameters / 1e9 - billions, 2) in (0.0, 0.01)


@pytest.mark.parametrize(
    ("model", "attention", "mlp", "head"),
    [("llama-3.1-8b", 851_968, 1_769_472, 132_352), ("llama-3.2-1b", 212_992, 491_520, 130_304),
     ("qwen3-8b", 958_464, 1_769_472, 156_032), ("smollm2-135m", 115_200, 190_080, 49_728)],
)  # fmt: skip
def test_parameters_of_one_rank_are_those_of_the_published_shapes(model, attention, mlp, head):
    config = published_config(model)
    counts = [parse_arm(f"{place}:1", config).parameters for place in ("attention_only", "mlp_only")]
    assert counts == [attention, mlp]
    assert parse_arm("all_layer+lm_head:1", config).parameters == attention + mlp + head


@pytest.mark.parametrize(
    ("model", "other", "rank"), [("qwen3-8b", 128, 236), ("qwen3-0.6b", 128, 154), ("smollm2-135m", 64, 106)]
)
def test_a_matched_rank_is_solved_for_the_model_and_its_residual_is_stated(model, other, rank):
    found, residual = matched_rank("attention_only", "mlp_only", other, published_config(model), 32.0)
    assert found == rank
    arm = parse_arm(f"attention_only~mlp_only:{other}", published_config(model))
    mlp = parse_arm(f"mlp_only:{other}", published_config(model))
    assert arm.residual == residual == pytest.approx(arm.parameters / mlp.parameters - 1)
    assert abs(residual) < 0.005


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("everything:4", "config.lora.targets"),
        ("all_layer", "give full, PLACEMENT:RANK"),
        ("all_layer:0", "config.lora.rank: 0 is not allowed"),
        ("attention_only~mlp_only:1", "cannot be matched: the nearest rank, 2, has +21% parameters"),
        ("all_layer+q_proj:4", "stands alone"),
        ("w_proj:4", "this model has no w_proj"),
        ("full@0", "give 1 to 65,536 rows per step"),
    ],
)
def test_an_arm_that_cannot_be_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse_arm(text, SMALL)
    assert message in str(error.value)
    assert str(error.value).startswith("config.regret.arms: ")
    assert "\n" not in str(error.value)


def test_an_arm_is_named_once():
    with pytest.raises(UserError, match="all_layer-r8@32 is named twice"):
        parse_arms(["all_layer:8", "all_layer:8@32"], SMALL)
    assert len(parse_arms(["all_layer:8", "all_layer:8@16"], SMALL)) == 2


@pytest.mark.parametrize(
    ("model", "lora", "full"),
    [
        ("llama-3.2-1b", 4.908e-4, 4.908e-5),
        ("llama-3.1-8b", 2.856e-4, 2.856e-5),
        ("qwen3-8b", 4.730e-4, 4.730e-5),
    ],
)
def test_rates_are_those_of_the_published_formula(model, lora, full):
    config = published_config(model)
    assert published_rate(config, "lora") == pytest.approx(lora, rel=2e-4)
    assert published_rate(config, "full") == pytest.approx(full, rel=2e-4)
    assert outside_domain(config) is None


def test_a_rate_of_full_fine_tuning_on_an_adapter_is_warned_of():
    assert "times below the published rule" in (rate_warning(LLAMA, "lora", 5e-7) or "")
    assert rate_warning(LLAMA, "lora", 2e-5) is None
    assert rate_warning(LLAMA, "full", 5e-7) is None
    assert "576" in (outside_domain(SMALL) or "")


def test_looks_are_log_spaced_and_end_at_the_last_step():
    assert look_steps(234, 1, (50, 100, 400)) == [1, 2, 4, 8, 16, 32, 50, 64, 100, 128, 234]
    assert look_steps(1, 2) == [1]


def cell_of(arms=("all_layer:8",), **regret):
    config = RunConfig(regret=RegretConfig(arms=arms, **regret))
    return config.regret, cells_of(config, LLAMA)


def losses_of(runs, best, marks=(50, 100), floor=1.0):
    """Parabolas around a best place, in log rate."""
    return {
        run: dict.fromkeys(marks, floor + 0.01 * (run.place - best) ** 2 + 0.001 * run.seed) for run in runs
    }


def made_until_done(regret, cells, loss):
    """Make the runs that are wanted until none is; what was made, in order."""
    known, made = {}, []
    while left := next_runs(regret, cells, known):
        known.update(loss(left[:1]))
        made += left[:1]
        assert len(made) < 100
    return made


def test_the_grid_is_extended_until_the_best_rate_is_inside():
    regret, cells = cell_of(rates=5, extend=4, repeats=2)
    made = made_until_done(regret, cells, lambda runs: losses_of(runs, best=3))
    assert [run.place for run in made] == [-2, -1, 0, 1, 2, 3, 4, 3, 3]
    assert [run.seed for run in made] == [0] * 7 + [1, 2]
    assert cells[0].middle == 2.9e-4
    assert made[6].name == "all_layer-r8-b8-lr4.64e-3-s0"


def test_a_best_rate_at_a_mark_must_lie_inside_the_grid_too():
    regret, cells = cell_of(rates=3, extend=4, repeats=0)

    def loss(runs):
        ends = losses_of(runs, best=0, marks=(100,))
        early = losses_of(runs, best=2, marks=(50,))
        return {run: early[run] | ends[run] for run in runs}

    assert [run.place for run in made_until_done(regret, cells, loss)] == [-1, 0, 1, 2, 3]


def test_where_both_edges_ask_for_more_rates_the_higher_come_first():
    regret, cells = cell_of(rates=3, extend=2, repeats=0)

    def loss(runs):
        ends = losses_of(runs, best=-2, marks=(100,))
        return {run: losses_of([run], best=2, marks=(50,))[run] | ends[run] for run in runs}

    assert [run.place for run in made_until_done(regret, cells, loss)] == [-1, 0, 1, 2, 3]


def test_a_grid_is_not_extended_for_ever_and_divergence_asks_for_lower_rates():
    regret, cells = cell_of(rates=3, extend=2, repeats=0)
    made = made_until_done(regret, cells, lambda runs: losses_of(runs, best=9))
    assert [run.place for run in made] == [-1, 0, 1, 2, 3]
    made = made_until_done(regret, cells, lambda runs: {run: {100: math.inf} for run in runs})
    assert [run.place for run in made] == [-1, 0, 1, -2, -3]


def test_a_grid_goes_on_where_its_ends_ask_for_it():
    regret, cells = cell_of(rates=3, extend=4, repeats=1)

    def ends(grid):  # as where a range of good rates is open at the low end, until the fifth rate
        assert [run.seed for run in grid] == [0] * len(grid)
        return {"low"} if grid[0].place > -3 else set()

    known, made = {}, []
    while left := next_runs(regret, cells, known, ends=ends):
        known.update(losses_of(left[:1], best=0))
        made += left[:1]
    assert [run.place for run in made] == [-1, 0, 1, -2, -3, 0]


def test_of_equal_losses_the_lower_rate_is_the_best():
    _, (cell,) = cell_of()
    grid = [RunId(cell, place, 0) for place in (-1, 0, 1)]
    assert best_run(grid, {run: {10: 1.0} for run in grid}).place == -1


def test_a_process_stays_with_its_program_and_leaves_others_theirs():
    regret, cells = cell_of(arms=("full", "all_layer:8", "all_layer:16"), rates=3)
    left = next_runs(regret, cells, {})
    assert in_order(left, None, set())[0] == left[0]
    busy = {left[0].name}
    assert in_order(left, None, busy)[0].cell == cells[1]
    assert in_order(left, RunId(cells[2], 0, 0), busy)[0].cell == cells[2]
    assert in_order(left, RunId(cells[0], 0, 0), busy)[0] == left[1]
    assert wanted(regret, cells[0], {}) == left[:3]
