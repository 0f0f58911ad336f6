"""The command itself: killed by the system and given again, and run by two processes together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.host_processes import kill, run_hosts, start_hosts, wait_for
from helpers.rl import make_model, outcome, without_times

RUN = "rl-tiny-all_layer-seed-0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    make_model(folder / "model")
    return folder


def words(folder: Path, results: Path, **rl) -> list[str]:
    fields = {
        "results_dir": results,
        "model.path": folder / "model",
        "model.random_weights": "true",
        "lora.start": "none",
        "optim.peak_lr": 1e-2,
        "rl.reward": "tests.helpers.rl_rule:reward",
        "rl.problem_rows": 10,
        "rl.eval_rows": 4,
        "rl.steps": 4,
        "rl.prompts": 4,
        "rl.group": 4,
        "rl.max_new_tokens": 6,
        "rl.slots": 8,
        "rl.eval_every": 1,
    } | {f"rl.{name}": value for name, value in rl.items()}
    return ["launch/rl.py", "--config", "rl_tiny", *(f"--config.{k}={v}" for k, v in fields.items())]


def records(results: Path) -> list[dict]:
    lines = (results / RUN / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def lines(results: Path) -> int:
    file = results / RUN / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed")
    run_hosts(1, words(folder, results), results / "logs")
    assert {record["reward/failed"] for record in records(results)} == {0}
    return results


@pytest.mark.slow
def test_the_command_killed_three_times_ends_in_the_same_bytes(folder, undisturbed, tmp_path):
    for enough in (2, 4, 7):
        running = start_hosts(1, words(folder, tmp_path), tmp_path / "logs")
        try:
            wait_for(lambda enough=enough: lines(tmp_path) >= enough, running)
        finally:
            kill(running)
        assert not (tmp_path / RUN / "summary.json").exists()
    (last,) = run_hosts(1, words(folder, tmp_path), tmp_path / "logs")
    assert "resuming" in last.text
    assert outcome(tmp_path / RUN) == outcome(undisturbed / RUN)


@pytest.mark.slow
def test_two_processes_find_the_same_tokens_and_losses(folder, undisturbed, tmp_path):
    run_hosts(2, words(folder, tmp_path), tmp_path / "logs", devices=2)
    for ours, theirs in zip(records(tmp_path), records(undisturbed), strict=True):
        for name in ("sampled_tokens", "reward/mean", "eval_metric", "optim/rows"):
            assert ours.get(name) == theirs.get(name), name
        for name in ("optim/loss", "grad_norm", "update_norm") if ours["split"] == "train" else ():
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=2e-3, abs=1e-5), name
    samples = sorted(file.name for file in (undisturbed / RUN / "samples").iterdir())
    assert sorted(file.name for file in (tmp_path / RUN / "samples").iterdir()) == samples
