"""A run's directory is complete, resumable to the bit, and never overwritten by accident."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import kills
from helpers.trials import flip_a_bit

from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.files import write_json_atomic
from jaxlora.train import run_directory as artifacts


@pytest.fixture
def folder(lab) -> Path:
    """A folder for one run."""
    return lab.new_folder()


@pytest.fixture
def copied(lab, folder) -> Path:
    """A folder with a copy of the finished run."""
    shutil.copytree(lab.whole.path.parent, folder / "results")
    return folder


def refused(lab: kills.Lab, folder: Path, *words: str) -> str:
    """Start, expect exit code 2 and no trace, and return the one-line error."""
    run = lab.start(folder, *words)
    assert run.wait() == 2, run.log()
    assert "Traceback" not in run.log()
    return next(line for line in run.log().splitlines() if line.startswith("error: "))


def ends(run: kills.Run, code: int = 0) -> str:
    """Wait, check the exit code, and return what was printed, as one line."""
    assert run.wait() == code, run.log()
    return " ".join(run.log().split())


def metrics(run: Path, split: str) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


class TestWhatARunLeaves:
    def test_a_finished_run_has_every_artifact(self, lab):
        run = lab.whole.path
        names = {path.name for path in run.iterdir()}
        assert names == {
            *("manifest.json", "metrics.jsonl", "summary.json", "sample_render.txt", "validation.png"),
            *("selected", "checkpoints", "tensorboard"),
        }
        assert [r["step"] for r in metrics(run, "train")] == list(range(1, 25))
        nll = {r["step"]: r["loss"] for r in metrics(run, "validation")}
        assert list(nll) == [5, 10, 12, 15, 20, 24]
        summary = json.loads((run / "summary.json").read_text())
        assert summary["status"] == "completed"
        assert summary["selected_step"] == min(nll, key=lambda step: (nll[step], -step))
        manifest = json.loads((run / "manifest.json").read_text())
        assert len(manifest["dataset"]["train"]["row_ids"]) == 24
        assert manifest["schedule"]["validation_steps"] == list(nll)
        assert list((run / "tensorboard").rglob("events*"))
        assert (run / "sample_render.txt").read_text().startswith("<|im_start|>system")

    def test_checkpoints_between_validations_change_no_result(self, lab, folder):
        run = lab.start(folder, "--config.train.checkpoint_every=none")
        ends(run)
        ours = kills.outcome(run.path)
        assert ours.pop("checkpoints") == ["20", "24"]
        assert kills.differing(ours | {"checkpoints": lab.expected["checkpoints"]}, lab.expected) == []


class TestWhoseDirectoryItIs:
    def test_a_finished_run_is_refused_and_overwritten_only_when_asked(self, lab, copied):
        run = copied / "results" / kills.RUN_ID
        before = kills.outcome(run)
        assert "this run is finished" in refused(lab, copied)
        assert kills.outcome(run) == before
        (run / "old").touch()
        ends(lab.start(copied, "--config.overwrite=true"))
        assert kills.differing(kills.outcome(run), lab.expected) == []

    def test_a_folder_that_is_no_run_is_never_deleted(self, lab, folder):
        precious = folder / "results" / kills.RUN_ID / "thesis.txt"
        precious.parent.mkdir(parents=True)
        precious.touch()
        for words in ((), ("--config.overwrite=true",)):
            assert "exists and is not a run" in refused(lab, folder, *words)
        assert precious.exists()

    def test_only_one_process_writes_a_run_and_the_other_says_who(self, lab, folder):
        first = lab.start(folder)
        assert first.wait_for_steps()
        message = refused(lab, folder)
        assert f"process {first.process.pid} on {os.uname().nodename}" in message
        assert "is writing this run" in message
        ends(first)
        lab.compare(first)

    def test_a_lock_that_another_host_holds_is_worth_another_try(self, tmp_path, monkeypatch):
        """A host that died may hold its lock on a shared folder a while longer."""
        file, run = tmp_path / "run.lock", tmp_path / "run"
        with artifacts._lock(file, run):
            with pytest.raises(UserError, match="is writing this run"), artifacts._lock(file, run):
                pass
            monkeypatch.setattr("socket.gethostname", lambda: "another")
            with pytest.raises(MachineError, match="is writing this run"), artifacts._lock(file, run):
                pass

    def test_the_lock_of_a_killed_process_does_not_stay(self, lab, folder):
        lab.kill_at(folder, "between rewind and first step")
        lab.finish(folder)

    def test_an_overwriting_command_that_was_interrupted_goes_on_instead_of_deleting_again(self, lab, copied):
        overwrite = "--config.overwrite=true"
        lab.kill_at(copied, "half an adapter exported", overwrite)
        # A copy in a bucket loses nothing by itself, so the summary of the run before must be replaced.
        summary = copied / "results" / kills.RUN_ID / "summary.json"
        assert json.loads(summary.read_text()) == {"status": "unfinished"}
        run = lab.start(copied, overwrite)
        assert "resuming" in ends(run)
        lab.compare(run)


class TestResuming:
    def test_after_sigterm_it_ends_with_the_bytes_of_an_undisturbed_run(self, lab, folder):
        run = lab.start(folder)
        assert run.wait_for_steps()
        run.send(signal.SIGTERM)
        assert "the same command resumes" in ends(run, code=75)
        assert not (run.path / "failure.json").exists()
        assert "resuming" in " ".join(lab.finish(folder).log().split())

    def test_another_configuration_base_or_dataset_is_refused_with_what_differs(self, lab, folder, tmp_path):
        run = lab.kill_at(folder, "published, older ones not deleted")
        before = (run.path / "manifest.json").read_bytes()
        other = kills.options(tmp_path / "model")[2].partition("=")[2]
        config = json.loads((Path(other) / "config.json").read_text())
        write_json_atomic(Path(other) / "config.json", config | {"rope_theta": 5.0, "rope_parameters": None})
        for field, value, expected in (
            ("optim.peak_lr", "0.5", "optim.peak_lr: 0.001 then, 0.5 now"),
            ("model.dtype", "bfloat16", "model.dtype: 'float32' then, 'bfloat16' now"),
            ("lora.rank", "4", "lora.rank: 8 then, 4 now"),
            ("data.train_path", "embedded:data/val.jsonl", "dataset.train.sha256: "),
            ("data.max_length", "300", "data.max_length: 256 then, 300 now"),
            ("model.path", other, "base: "),
        ):
            assert expected in refused(
                lab, folder, f"--config.{field}={value}", "--config.data.allow_ungated=true"
            )
        assert (run.path / "manifest.json").read_bytes() == before
        lab.finish(folder)

    def test_another_layout_resumes_and_says_that_the_result_is_equal_up_to_rounding_only(self, lab, folder):
        lab.kill_at(folder, "published, older ones not deleted", nth=3)
        run = lab.start(folder, "--config.train.layout=packed")
        text = ends(run)
        assert "train.layout: 'padded' then, 'packed' now" in text
        assert "up to rounding, but not bit for bit" in text
        history = json.loads((run.path / "manifest.json").read_text())["resumed_with"]
        assert len(history) == 1
        expected = [r["loss"] for r in metrics(lab.whole.path, "validation")]
        assert [r["loss"] for r in metrics(run.path, "validation")] == pytest.approx(expected, rel=1e-5)

    def test_a_damaged_newest_checkpoint_is_named_and_its_steps_computed_again(self, lab, folder):
        run = lab.kill_at(folder, "between rewind and first step", nth=1)
        run = lab.kill_at(folder, "published, older ones not deleted", nth=4)
        newest = max(int(path.name) for path in (run.path / "checkpoints").iterdir())
        (run.path / "checkpoints" / str(newest) / "progress.json").write_text("{}")
        text = " ".join(lab.finish(folder).log().split())
        assert f"skipping the checkpoint of step {newest}: progress.json has 2 bytes" in text

    def test_metrics_that_lag_behind_a_checkpoint_send_it_back(self, lab, folder):
        """As after copying a run directory file by file while it was written."""
        run = lab.kill_at(folder, "published, older ones not deleted", nth=3)
        lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run.path / "metrics.jsonl").write_bytes(b"".join(lines[:-2]))
        assert "metrics.jsonl has" in lab.finish(folder).log()

    def test_an_evaluation_that_was_interrupted_is_made_up_for(self, lab, folder):
        words = (
            "--config.eval.after_training=true",
            "--config.eval.problems=2",
            "--config.eval.max_new_tokens=2",
        )
        run = lab.kill_at(folder, kills.AFTER_TRAINING, *words)
        before = kills.outcome(run.path)
        assert "2 problems" in ends(lab.start(folder, *words))
        assert (run.path / "evaluation" / "summary.json").is_file()
        shutil.rmtree(run.path / "evaluation")
        assert kills.outcome(run.path) == before

    def test_but_not_of_weights_that_are_not_what_the_run_wrote(self, lab, folder):
        words = ("--config.eval.after_training=true", "--config.eval.problems=2")
        run = lab.kill_at(folder, kills.AFTER_TRAINING, *words)
        flip_a_bit(run.path / "selected" / "adapter_model.safetensors")
        assert "adapter_model.safetensors: is not what the run wrote" in refused(lab, folder, *words)
        assert not (run.path / "evaluation").exists()


class TestThingsThatGoWrong:
    def test_a_number_that_is_not_finite_stops_the_run_with_rows_step_and_rate(self, lab, folder):
        # The first step is finite; the second overflows in the product of two adapters.
        words = (
            "--config.optim.peak_lr=1e16",
            "--config.lora.alpha=1e6",
            "--config.train.checkpoint_every=1",
        )
        message = refused(lab, folder, *words)
        path = folder / "results" / kills.RUN_ID
        rows = json.loads((path / "manifest.json").read_text())["dataset"]["train"]["row_ids"]
        failure = json.loads((path / "failure.json").read_text())
        step = failure["step"]
        assert f"step {step}: loss " in message
        assert step > 1
        # One warm-up step of 24, then the cosine to a tenth of the peak.
        rate = 1e16 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / 23)) / 2)
        assert f"at learning rate {rate:g}" in message
        assert ", ".join(rows[2 * step - 2 : 2 * step]) in message
        assert failure["stage"] == "training"
        assert failure["trace"]
        assert max(int(p.name) for p in (path / "checkpoints").iterdir()) == step - 1
        assert max(r["step"] for r in metrics(path, "train")) == step - 1
        assert not (path / "selected").exists()

    def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(self, lab, folder):
        disk = folder / "results"
        disk.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", disk]
        if subprocess.run(mount, check=False).returncode:
            pytest.skip("mounting a small disk is not allowed here")
        try:
            message = refused(lab, folder)
            assert "the disk is full" in message
            assert "free some space, then run the same command to resume" in message
            subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
            lab.finish(folder)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


class TestTheBestCheckpoint:
    @pytest.fixture(scope="class")
    def overfitting(self, tmp_path_factory, compiled) -> kills.Lab:
        """A job whose best checkpoint is not among its last two."""
        lab = kills.Lab(
            tmp_path_factory.mktemp("best"),
            compiled,
            "--config.optim.peak_lr=20",
            "--config.optim.schedule=constant",
        )
        assert len(lab.expected["checkpoints"]) == 3
        return lab

    def test_if_it_is_damaged_at_the_end_its_steps_are_computed_again(self, overfitting):
        lab, folder = overfitting, overfitting.new_folder()
        best = json.loads(lab.expected["summary.json"])["selected_step"]
        run = lab.kill_at(folder, "half an adapter exported")
        (run.path / "checkpoints" / str(best) / "progress.json").write_text("{}")
        text = " ".join(lab.finish(folder).log().split())
        assert (
            f"the checkpoint of step {best}, the selected one, is damaged (progress.json has 2 bytes" in text
        )


@pytest.mark.slow
def test_the_embedded_default_learns_the_format(repository, tmp_path):
    """The base boxes fewer than 20% of 200 held-out problems rightly, the adapter at least 70%."""
    launch = [
        sys.executable,
        str(repository / "launch/train.py"),
        "--config",
        str(repository / "configs/tiny.py"),
    ]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    subprocess.run([*launch, f"--config.results_dir={tmp_path}"], check=True, timeout=1500, env=environment)
    scores = {
        name: json.loads((tmp_path / name / "evaluation/summary.json").read_text())
        for name in ("tiny-base", "tiny-all_layer-seed-0")
    }
    assert {summary["total"] for summary in scores.values()} == {200}
    assert scores["tiny-base"]["correct_strict"] < 40
    assert scores["tiny-all_layer-seed-0"]["correct_strict"] >= 140
