"""A run that ends before its epochs do says why, and ends there however often it was stopped on the way."""

from __future__ import annotations

import json

import pytest
from helpers import kills

from jaxlora.checkpoints.export import load_selected


@pytest.fixture(scope="module")
def early(tmp_path_factory, compiled) -> kills.Lab:
    """A job that gets worse from its first validation on, with adapters that drop inputs."""
    return kills.Lab(
        tmp_path_factory.mktemp("early"),
        compiled,
        "--config.optim.peak_lr=20",
        "--config.optim.schedule=constant",
        "--config.train.early_stopping=2",
        "--config.lora.dropout=0.25",
    )


def records(run, split: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["split"] == split]


def test_it_stops_after_as_many_validations_without_a_better_one(early):
    run = early.whole.path
    nll = {r["step"]: r["loss"] for r in records(run, "validation")}
    best = min(nll, key=nll.get)
    assert [step for step in nll if step > best] == list(nll)[-2:]
    last = max(nll)
    assert last < 24
    assert [r["step"] for r in records(run, "train")] == list(range(1, last + 1))
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["selected_step"], summary["last_step"]) == (best, last)
    assert summary["ended_by"] == "early stopping: no lower validation NLL in the last 2 validations"
    assert summary["train_token_count"] == sum(r["token_count"] for r in records(run, "train"))
    assert summary["validation_token_count"] == sum(r["token_count"] for r in records(run, "validation"))
    assert f"stopped early, after step {last}" in early.whole.log()


@pytest.mark.parametrize(
    ("moment", "nth"),
    [
        ("published, older ones not deleted", 4),
        pytest.param("half an adapter exported", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_it_draws_the_same_masks_and_stops_at_the_same_step(early, moment, nth):
    folder = early.new_folder()
    early.kill_at(folder, moment, nth=nth)
    early.finish(folder)


def test_what_it_selected_can_be_handed_on(early):
    assert load_selected(early.whole.path).spec.lora.dropout == 0


def test_max_steps_is_in_the_record_and_a_whole_run_has_no_such_field(early, lab):
    folder = lab.new_folder()
    run = lab.start(folder, "--config.train.max_steps=7", "--config.optim.schedule=linear")
    assert run.wait() == 0, run.log()
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["last_step"], summary["ended_by"]) == (7, "train.max_steps")
    assert [v["step"] for v in summary["validations"]] == [5, 7]
    rates = [r["learning_rate"] for r in records(run.path, "train")]
    assert rates == pytest.approx([1e-3 * (1 - 0.9 * step / 7) for step in range(1, 8)])
    assert "ended_by" not in json.loads((lab.whole.path / "summary.json").read_text())
