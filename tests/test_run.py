"""A run's directory is complete, resumable to the bit, and never overwritten by accident."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hf_models import make_checkpoint

TIMES = {"seconds", "tokens_per_second", "model_flops_utilisation", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, repository) -> Path:
    """A random two-layer model with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": True}
    make_checkpoint(folder, initializer_range=0.05, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repository / "jaxlora/embedded/base" / name, folder)
    return folder


def command(repository: Path, model_dir: Path, results: Path, *extra: str) -> list[str]:
    fields = {
        "model.path": model_dir,
        "results_dir": results,
        "data.train_rows": 24,
        "data.validation_rows": 8,
        "train.validation_every": 2,
        "train.validation_merge": 0,
        "eval.after_training": "false",
        "train.startup_check": "false",
    }
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    launch = [
        sys.executable,
        str(repository / "launch/train.py"),
        "--config",
        str(repository / "configs/tiny.py"),
    ]
    return [*launch, *words, *extra]


def run(*arguments, code: int = 0) -> str:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == code, done.stderr
    return done.stderr


def metrics(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(repository, model_dir, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("results")
    run(repository, model_dir, results)
    return results / "tiny-all_layer-seed-0"


def test_a_finished_run_has_every_artifact(finished):
    names = {path.name for path in finished.iterdir()}
    expected = {
        "manifest.json",
        "metrics.jsonl",
        "summary.json",
        "sample_render.txt",
        "validation.png",
        "selected",
    }
    assert expected <= names
    assert "failure.json" not in names
    records = metrics(finished)
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["split"] == "validation"] == [2, 3, 4, 6]
    summary = json.loads((finished / "summary.json").read_text())
    nll = {r["step"]: r["loss"] for r in records if r["split"] == "validation"}
    assert summary["status"] == "completed"
    assert summary["selected_step"] == min(nll, key=lambda step: (nll[step], -step))
    manifest = json.loads((finished / "manifest.json").read_text())
    assert len(manifest["dataset"]["train"]["row_ids"]) == 24
    assert manifest["schedule"]["validation_steps"] == [2, 3, 4, 6]
    assert list((finished / "tensorboard").glob("events*"))
    assert (finished / "sample_render.txt").read_text().startswith("<|im_start|>system")


def test_a_finished_run_is_refused_and_overwritten_only_when_asked(finished, repository, model_dir, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished.parent, results)
    before = (results / finished.name / "metrics.jsonl").read_bytes()
    assert "finished" in run(repository, model_dir, results, code=2)
    assert (results / finished.name / "metrics.jsonl").read_bytes() == before
    run(repository, model_dir, results, "--config.overwrite=true")
    assert metrics(results / finished.name) == metrics(finished)


def test_a_run_stopped_by_sigterm_resumes_to_the_same_bytes(finished, repository, model_dir, tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    process = subprocess.Popen(
        command(repository, model_dir, tmp_path), stderr=subprocess.PIPE, text=True, env=environment
    )
    file = tmp_path / finished.name / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (file.is_file() and file.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode in (75, 0), errors
    assert process.returncode == 75, "the run ended before the signal: make it longer"
    changed = run(repository, model_dir, tmp_path, "--config.optim.peak_lr=0.5", code=2)
    assert "optim.peak_lr: 0.001 then, 0.5 now" in changed.replace("\n", " ")
    assert "resuming" in run(repository, model_dir, tmp_path)
    ours = tmp_path / finished.name
    assert metrics(ours) == metrics(finished)
    weights = "selected/adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (finished / weights).read_bytes()


def test_only_one_process_writes_a_run(finished, repository, model_dir, tmp_path):
    import fcntl

    with (tmp_path / f".{finished.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another process" in run(repository, model_dir, tmp_path, code=2)
    assert not (tmp_path / finished.name).exists()


@pytest.mark.slow
def test_the_embedded_default_learns_the_format(repository, tmp_path):
    """The base boxes fewer than 20% of 200 held-out problems rightly, the adapter at least 70%."""
    launch = [
        sys.executable,
        str(repository / "launch/train.py"),
        "--config",
        str(repository / "configs/tiny.py"),
    ]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    subprocess.run([*launch, f"--config.results_dir={tmp_path}"], check=True, timeout=1500, env=environment)
    scores = {
        name: json.loads((tmp_path / name / "evaluation/summary.json").read_text())
        for name in ("tiny-base", "tiny-all_layer-seed-0")
    }
    assert {summary["total"] for summary in scores.values()} == {200}
    assert scores["tiny-base"]["correct_strict"] < 40
    assert scores["tiny-all_layer-seed-0"]["correct_strict"] >= 140
