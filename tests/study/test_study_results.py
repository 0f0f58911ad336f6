"""Promises of the study reader and its tables: what the files say, and in words what they do not say."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.study_fixtures import RATES, SELECTED, build_study

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import append_jsonl, read_json, write_json_atomic
from jaxlora.study import tables, training_tables
from jaxlora.study.comparison import compare_evaluations
from jaxlora.study.grid import Setting
from jaxlora.study.results import load_study


@pytest.fixture
def root(tmp_path):
    return build_study(tmp_path / "results")


def edit(path, **changes):
    write_json_atomic(path, read_json(path) | changes)


# --- Reading ------------------------------------------------------------------------------------------------


def test_a_finished_study_is_read_completely(root):
    study = load_study(root, "test")
    assert study.absent == ()
    assert [(run.condition, run.seed) for run in study.runs] == [
        (condition, seed) for condition in ("attention_only", "all_layer") for seed in (0, 1, 2)
    ]
    assert {run.selected_step() for run in study.runs} == {SELECTED}
    assert [run.learning_rate() for run in study.trials] == 2 * sorted(RATES)
    assert study.evaluations[0].run_id == "test-base"
    assert len(study.evaluations) == 7
    assert study.runs[0].adapter() == {"bytes": study.runs[0].adapter_file.stat().st_size, "parameters": 16}


def test_another_study_in_the_same_directory_is_left_alone(root):
    build_study(root, seeds=(0,), prefix="test-other")
    build_study(root, seeds=(0,), prefix="more")
    (root / "test-notes").mkdir()
    study = load_study(root, "test")
    assert len(study.runs) == 6
    assert len(study.trials) == 6
    assert study.absent == ()


def record_config(run, **fields):
    """Add to the configuration in a run's manifest."""
    manifest = read_json(run / "manifest.json")
    for name, value in fields.items():
        own = manifest["config"].get(name)
        manifest["config"][name] = own | value if isinstance(own, dict) else value
    write_json_atomic(run / "manifest.json", manifest)


def test_what_a_run_is_stands_in_its_manifest_and_not_in_its_name(root):
    """Nothing after the condition in these names is a number that the manifest does not confirm."""
    run = root / "test-all_layer-rank-4-lr-3e-4-seed-0"
    shutil.move(root / "test-all_layer-seed-0", run)
    record_config(run, lora={"rank": 4}, train={"batch_rows": 16}, name=run.name)
    sweep = {"ranks": [1, 4], "learning_rates": [3e-4, 1e-3], "batch_rows": []}
    assert run.name not in {found.run_id for found in load_study(root, "test").runs}  # a name of its own
    record_config(run, sweep=sweep)
    (found,) = (found for found in load_study(root, "test").runs if found.run_id == run.name)
    assert found.setting == Setting("all_layer", rank=4, rate=3e-4)
    record_config(
        run, sweep=sweep | {"batch_rows": [16, 32]}, name="test-all_layer-rank-4-lr-3e-4-batch-16-seed-0"
    )
    (found,) = (found for found in load_study(root, "test").runs if found.run_id == run.name)
    assert found.setting == Setting("all_layer", rank=4, rate=3e-4, batch_rows=16)


@pytest.mark.parametrize("old", [True, False])
def test_a_list_of_modules_is_a_placement_and_the_placement_has_an_old_name(root, old):
    run = root / "test-q_proj+v_proj-seed-0"
    shutil.move(root / "test-all_layer-seed-0", run)
    manifest = read_json(run / "manifest.json")
    manifest["config"]["lora"] = {"condition": "q_proj+v_proj"} if old else {"targets": "q_proj,v_proj"}
    write_json_atomic(run / "manifest.json", manifest)
    for name in ("summary.json", "metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "evaluation")
    assert [
        found.run_id for found in load_study(root, "test").runs if found.condition == "q_proj+v_proj"
    ] == [run.name]


def test_a_study_whose_prefix_ends_like_a_condition_is_another_study(root):
    build_study(root, seeds=(0,), prefix="test-all_layer")
    for run in root.glob("test-all_layer-*_*-seed-0"):
        record_config(run, prefix="test-all_layer")
    assert len(load_study(root, "test").runs) == 6


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda r: shutil.rmtree(r / "test-base"), "There is no finished evaluation of the untouched base."),
        (
            lambda r: shutil.rmtree(r / "test-all_layer-seed-1" / "evaluation"),
            "There is no finished evaluation of test-all_layer-seed-1.",
        ),
        (lambda r: shutil.rmtree(r / "lr-selection"), "There are no learning-rate selection runs."),
        (lambda r: shutil.rmtree(r / "test-all_layer-seed-1" / "adapter"), "seed-1 has no exported adapter."),
        (
            lambda r: (r / "test-all_layer-seed-1" / "summary.json").unlink(),
            "test-all_layer-seed-1 is unfinished.",
        ),
        (
            lambda r: (r / "test-all_layer-seed-1" / "metrics.jsonl").unlink(),
            "seed-1 has no recorded validation.",
        ),
        (
            lambda r: edit(r / "test-all_layer-seed-1" / "evaluation" / "summary.json", checkpoint="step-50"),
            "seed-1 was evaluated at step 50, but its lowest validation NLL is at step 30.",
        ),
        (
            lambda r: edit(r / "test-all_layer-seed-1" / "evaluation" / "summary.json", checkpoint=None),
            "The evaluation of test-all_layer-seed-1 does not say which checkpoint it used.",
        ),
    ],
)
def test_what_is_absent_is_said(root, damage, sentence):
    damage(root)
    study = load_study(root, "test")
    assert [line for line in study.absent if sentence in line], study.absent


def test_a_failed_run_is_named_with_its_reason_and_not_selected(root):
    folder = root / "lr-selection" / "test-all_layer-lr-0.0003"
    (folder / "summary.json").unlink()
    write_json_atomic(folder / "failure.json", {"error": "FloatingPointError: loss nan"})
    study = load_study(root, "test")
    assert "test-all_layer-lr-0.0003 is failed (FloatingPointError: loss nan)." in study.absent
    rows = [row for row in training_tables.learning_rates(study).rows if str(row["setting"]) == "all_layer"]
    assert [(row["learning_rate"], row["status"], row["selected"]) for row in rows] == [
        (1e-4, "completed", False),
        (3e-4, "failed", False),
        (1e-3, "completed", True),
    ]
    assert rows[1]["validation_nll"] is None


def test_a_stored_score_that_its_text_does_not_earn_is_refused(root):
    path = root / "test-all_layer-seed-1" / "evaluation" / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[3])
    lines[3] = json.dumps(record | {"correct": not record["correct"]})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="record 4 is stored as correct="):
        load_study(root, "test")


def test_an_evaluation_of_another_model_is_refused(root):
    edit(root / "test-all_layer-seed-1" / "evaluation" / "summary.json", condition=None, seed=None)
    with pytest.raises(
        UserError, match="condition None, seed None, but it lies in the run of condition all_layer"
    ):
        load_study(root, "test")


def test_an_empty_or_missing_directory_is_plain_about_it(tmp_path):
    assert "There is no training run whose id begins with test-." in load_study(tmp_path, "test").absent
    with pytest.raises(UserError, match="is not a directory"):
        load_study(tmp_path / "none", "test")


# --- Tables -------------------------------------------------------------------------------------------------


def test_the_primary_table_puts_the_baseline_first_and_both_scores_side_by_side(root):
    study = load_study(root, "test")
    table = tables.primary(study, compare_evaluations(study.evaluations, resamples=99))
    base, attention, _ = table.rows
    assert (base["condition"], base["strict_mean"], base["numeric_mean"]) == (
        "untouched base",
        30 / 60,
        42 / 60,
    )
    assert attention["strict_delta"] == pytest.approx(attention["strict_mean"] - base["strict_mean"])
    assert attention["format_share_of_gain"] == pytest.approx(
        1 - (attention["numeric_mean"] - 42 / 60) / (attention["strict_mean"] - 30 / 60)
    )
    assert table.shown()[0][:4] == ["untouched base", "–", "50.00 %", "–"]


def test_tokens_and_hours_are_added_up_from_the_files(root):
    row = training_tables.accounting(load_study(root, "test")).rows[0]
    assert row["train_tokens"] == sum(300 + step for step in range(1, 51))
    assert row["validation_tokens"] == 5 * 1234
    (speed, *_) = training_tables.throughput(load_study(root, "test")).rows
    assert speed["hours"] == pytest.approx(0.5)


def test_the_pointwise_minimum_is_the_lowest_of_all_rates_at_each_step(root):
    append_jsonl(
        root / "lr-selection" / "test-all_layer-lr-0.001" / "metrics.jsonl",
        {"step": 10, "split": "validation", "loss": 0.1},
    )
    rows = training_tables.rate_minimum(load_study(root, "test")).rows
    assert [(row["step"], row["learning_rate"]) for row in rows if str(row["setting"]) == "all_layer"] == [
        (10, 1e-3), (20, 3e-4), (30, 3e-4), (40, 3e-4), (50, 3e-4),
    ]  # fmt: skip
    assert len(rows) == 10


def test_a_table_that_cannot_be_made_says_why(tmp_path):
    study = load_study(tmp_path, "test")
    for make in (training_tables.accounting, training_tables.validation, training_tables.learning_rates):
        assert isinstance(make(study), str)
    assert training_tables.throughput(study) == "No run recorded its tokens per second."


@pytest.mark.parametrize(
    ("value", "shown"), [(3e-4, "3e-4"), (1e-3, "1e-3"), (2.5e-5, "2.5e-5"), (1.0, "1e0"), (5e-7, "5e-7")]
)
def test_learning_rates_are_shown_as_people_write_them(value, shown):
    assert tables.rate(value) == shown
    assert float(shown) == value
