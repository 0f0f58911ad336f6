"""The tool that repeats a run with PyTorch and PEFT finds the run's losses and answers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxlora.runtime.files import read_json, read_jsonl


@pytest.mark.slow
def test_a_run_repeated_by_peft_has_its_losses_and_answers(repository, tmp_path):
    words = ["--config", "tiny", f"--config.results_dir={tmp_path}", "--config.train.epochs=1"]
    words += ["--config.data.train_rows=32", "--config.data.validation_rows=8", "--config.optim.peak_lr=3e-3"]
    words += ["--config.train.validation_every=2", "--config.train.validation_merge=0"]
    words += ["--config.eval.problems=4", "--config.eval.max_new_tokens=24"]
    run, out = tmp_path / "tiny-all_layer-seed-0", tmp_path / "peft"
    subprocess.run([sys.executable, "-m", "jaxlora", "train", *words], cwd=repository, check=True)
    command = [sys.executable, "tools/peft_run.py", "--run", run, "--out", out]
    subprocess.run(command, cwd=repository, check=True)
    summary = read_json(out / "summary.json")
    assert [row["step"] for row in summary["validation_nll"]] == [2, 4]
    for row in summary["validation_nll"]:
        assert row["peft"] == pytest.approx(row["jaxlora"], abs=1e-5)
    first, last = (summary["validation_nll"][i]["jaxlora"] for i in (0, -1))
    assert last < first - 0.01  # it has learnt
    assert summary["largest_difference_of_a_step"] < 1e-4
    ours, theirs = read_jsonl(run / "evaluation" / "predictions.jsonl"), read_jsonl(out / "predictions.jsonl")
    assert [row["generated_text"] for row in ours] == [row["generated_text"] for row in theirs]
