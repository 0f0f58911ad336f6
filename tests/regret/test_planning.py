"""What experiments would take at full size: the memory of full fine-tuning, and hours that add up."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from jaxlora.cli import load_config
from jaxlora.commands import plan
from jaxlora.models.families import count_parameters, published_config
from jaxlora.regret.planning import grid_table, machine_named, plan_grid
from jaxlora.regret.runs import look_steps
from jaxlora.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
ARMS = {"regret.arms": "full,all_layer:16,all_layer:256"}


def planned(model, machine):
    config = load_config("regret/rank", ARMS)
    rows = plan_grid(config, published_config(model), machine_named(machine), 100_000, 600)
    return {row.arm.label: row for row in rows}


@pytest.mark.parametrize(
    ("model", "machine", "fits"),
    [("llama-3.1-8b", "v5e-8", False), ("llama-3.1-8b", "v5e-16", True), ("llama-3.1-8b", "v6e-8", True),
     ("llama-3.1-8b", "h100-8", True), ("qwen3-8b", "h100-2", False), ("llama-3.2-1b", "v5e-4", True)],
)  # fmt: skip
def test_full_fine_tuning_fits_where_18_bytes_a_parameter_do(model, machine, fits):
    rows = planned(model, machine)
    assert rows["full"].fits == fits
    assert rows["all_layer-r16"].fits
    slice_ = machine_named(machine)
    assert rows["full"].gigabytes > 18 * count_parameters(published_config(model)) / slice_.n_chips / 1e9


def test_hours_are_those_of_all_runs_and_an_adapter_takes_fewer():
    rows = planned("llama-3.1-8b", "h100-8")
    full, lora = rows["full"], rows["all_layer-r16"]
    assert (full.runs, full.steps) == (7, 782)
    assert full.hours * 3600 / (full.runs * full.steps) == pytest.approx(full.choice.best.seconds, rel=0.1)
    assert lora.hours < full.hours
    # A look at 1,024 rows is a forward pass: a third of full training over them, half of an adapter's.
    looks = len(look_steps(782, 2)) + 1
    for row, share in ((full, 1 / 3), (lora, 1 / 2)):
        steps = row.steps + share * looks * 1024 / 128
        assert row.hours * 3600 == pytest.approx(row.runs * steps * row.choice.best.seconds)
    # 6N FLOPs a token at the data sheet's rate is a bound that no estimate may undercut.
    bound = 6 * 8.03e9 * 600 * 128 / (8 * 989e12)
    assert full.choice.best.seconds > 0.9 * bound
    table = grid_table(list(rows.values()), machine_named("h100-8"), price=2.0)
    assert table.row_count == 4


def test_the_work_of_an_adapter_is_counted():
    """6 FLOPs a token and weight beside the base's 4: 1.34 billion weights of rank 512 are a quarter more."""
    config = load_config("regret/rank", {"regret.arms": "all_layer:1,all_layer:512"})
    rows = plan_grid(config, published_config("llama-3.1-8b"), machine_named("h100-8"), 100_000, 600)
    low, high = (row.choice.best.compute for row in rows)
    head = 128_256 * 4096
    weights, adapter = 8.03e9 - 2 * head, 512 * 2_621_440
    expected = 6 * adapter / (4 * (weights + head))
    assert high / low - 1 == pytest.approx(expected, rel=0.1)
    # From rank 256 on an adapter is split over fsdp: whole on each chip it would take 21 GB.
    ways = rows[1].choice.mesh.fsdp
    assert rows[0].choice.mesh.fsdp == ways > 1
    assert rows[1].gigabytes - rows[0].gigabytes == pytest.approx(16 * adapter / (1e9 * ways), rel=0.1)


def test_steps_are_cut_into_lines_that_a_buffer_holds():
    config = load_config("regret/rank", ARMS | {"train.max_buffer_tokens": "8192"})
    for machine, longest in (("v6e-8", 8192), ("h100-8", 8 * 8192)):  # a GPU has a line of its own
        rows = plan_grid(config, published_config("llama-3.1-8b"), machine_named(machine), 100_000, 600)
        for row in rows:
            assert row.choice.tokens <= longest + 8 * 128
            assert row.choice.buffers * row.choice.tokens >= 128 * 600


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen3-8B-Base"])
def test_base_and_instruct_models_have_one_shape(name):
    plain = name.removesuffix("-Instruct").removesuffix("-Base")
    assert published_config(name) == published_config(plain)


def test_the_page_of_full_size_is_the_one_that_its_tool_writes():
    tool = runpy.run_path(str(ROOT / "tools" / "full_size.py"))
    assert tool["PAGE"].read_text() == tool["page"]()


def test_a_machine_that_is_not_known_is_named():
    with pytest.raises(UserError, match="'h100-16' is not known; give one of v4-8"):
        machine_named("h100-16")


@pytest.mark.parametrize("word", ["--search", "--json=-", "--validation-rows=9"])
def test_what_the_plan_of_an_experiment_would_ignore_is_refused(monkeypatch, word):
    monkeypatch.setattr(sys, "argv", ["plan", "--config", "regret/rank", "--topology", "v5e-8", word])
    with pytest.raises(UserError, match=rf"^{word.split('=')[0]} is for one run, not for the arms"):
        plan.main()
