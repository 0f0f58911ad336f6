"""Files of a run that were damaged: it is made good from what is sound, or the command ends with one line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers import kills
from helpers.trials import DAMAGE, JSON_DAMAGE, fill, one_line, small_disk, try_damage

import jaxlora.checkpoints.run_state as run_state
from jaxlora.checkpoints.run_state import RunState
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.records import progress_problem

RUN = f"results/{kills.RUN_ID}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, compiled) -> kills.Lab:
    return kills.Lab(tmp_path_factory.mktemp("damage"), compiled)


@pytest.fixture(scope="module")
def stopped(lab) -> Path:
    """The folder of a run that was killed after its third checkpoint."""
    folder = lab.new_folder()
    lab.kill_at(folder, "published, older ones not deleted", nth=3)
    return folder


@pytest.fixture(scope="module")
def finished(lab) -> Path:
    folder = lab.new_folder()
    shutil.copytree(lab.whole.path.parent, folder / "results")
    return folder


def newest(folder: Path) -> str:
    """The newest checkpoint below `folder`."""
    steps = [int(p.name) for p in (folder / RUN / "checkpoints").iterdir() if p.name.isdigit()]
    return f"{RUN}/checkpoints/{max(steps)}"


def tried(lab: kills.Lab, sound: Path, trials: list[tuple[str, str]]) -> Counter[str]:
    def check(folder: Path) -> None:
        different = kills.differing(kills.outcome(folder / RUN), lab.expected)
        assert not different, f"{different} after {trials}"

    return try_damage(sound, lab.new_folder, trials, lab.start, check)


def test_a_damaged_file_of_a_stopped_run(lab, stopped, capsys):
    trials = [
        (f"{newest(stopped)}/sha256.json", "lists deeper down"),
        (f"{newest(stopped)}/progress.json", "lists where objects belong"),
        (f"{RUN}/metrics.jsonl", "a truncation"),
        (f"{RUN}/manifest.json", "lists where objects belong"),
        (f"{RUN}/manifest.json", "half a surrogate pair"),
        (f"{RUN}/manifest.json", "a list"),
    ]
    ends = tried(lab, stopped, trials)
    with capsys.disabled():
        print(f"\ndamage to a stopped run: {dict(ends)}")
    assert ends["made good"] >= 2
    assert ends["one line"] >= 3


def test_a_damaged_summary_of_a_finished_run(lab, finished):
    trials = [(f"{RUN}/summary.json", fault) for fault in ("a list", "lists deeper down", "a missing file")]
    ends = tried(lab, finished, trials)
    assert ends == {"one line": 2, "made good": 1}


@pytest.mark.slow
def test_every_fault_in_every_file(lab, stopped, finished, capsys):
    checkpoint = newest(stopped)
    files = [f"{checkpoint}/{name}" for name in ("sha256.json", "progress.json", "state/manifest.ocdbt")]
    files += [f"{RUN}/{name}" for name in ("manifest.json", "metrics.jsonl", "sample_render.txt")]
    trials = [(file, fault) for file in files for fault in DAMAGE]
    trials += [(file, fault) for file in files if file.endswith(".json") for fault in JSON_DAMAGE]
    ends = tried(lab, stopped, trials)
    files = [f"{RUN}/{name}" for name in ("summary.json", "manifest.json")]
    ends += tried(lab, finished, [(file, fault) for file in files for fault in (*DAMAGE, *JSON_DAMAGE)])
    with capsys.disabled():
        print(f"\n{ends.total()} damaged files: {dict(ends)}")
    assert ends.total() >= 60


class TestProgressThatWasForged:
    """The hashes are right, and what they are of is not progress."""

    @pytest.mark.parametrize("content", ["[]", "null", '{"step": "1"}', '{"identity": []}'])
    def test_it_is_one_line(self, tmp_path, content):
        state = {"a": jnp.arange(3.0)}
        with RunState(tmp_path, {"seed": 0}) as store:
            store.save(1, state, {"step": 1})
        (tmp_path / "1" / "progress.json").write_text(content)
        (tmp_path / "1" / "sha256.json").write_text(json.dumps(run_state.hashes(tmp_path / "1")))
        with (
            RunState(tmp_path, {"seed": 0}) as store,
            pytest.raises(UserError, match=r"progress.json|no checkpoint can be used|of another run"),
        ):
            store.restore(state, usable=progress_problem)

    @pytest.mark.parametrize(
        "change",
        [{"validations": {}}, {"validations": [[1]]}, {"validations": [["1", 2.0]]}, {"metrics_bytes": -1}],
    )
    def test_a_field_of_another_kind_is_named(self, change):
        good = {"step": 1, "validations": [[1, 0.5]], "metrics_bytes": 10, "metrics_sha256": None}
        assert progress_problem(good) is None
        assert next(iter(change)) in progress_problem(good | change)


class TestFullDisks:
    """At every size of disk: one line, and the run goes on when there is room."""

    SIZES = ("64k", "200k", "400k", "600k", "800k")

    def try_disk(self, lab: kills.Lab, size: str) -> str:
        folder = lab.new_folder()
        with small_disk(folder / "results", size) as resize:
            run = lab.start(folder)
            assert run.wait() == 2, run.log()
            message = one_line(run.log())
            assert "the disk is full" in message
            resize("50m")
            lab.finish(folder)
        return message

    def test_a_disk_with_room_for_the_manifest_only(self, lab):
        assert "free some space, then run the same command" in self.try_disk(lab, "64k")

    @pytest.mark.slow
    def test_disks_that_fill_up_later(self, lab):
        for size in self.SIZES[1:]:
            self.try_disk(lab, size)

    @pytest.mark.parametrize(
        "moment",
        [
            "a step computed, not yet recorded",
            "checkpoint begun",
            "half an adapter exported",
            "exported, no summary",
        ],
    )
    def test_a_disk_that_fills_up_at_any_moment(self, lab, moment):
        folder = lab.new_folder()
        with small_disk(folder / "results", "50m"):
            run = lab.pause_at(folder, moment)
            filler = fill(folder / "results")
            assert run.go_on() == 2, run.log()
            assert "the disk is full" in one_line(run.log())
            filler.unlink()
            lab.finish(folder)

    def test_a_file_system_that_says_only_at_the_sync_that_it_is_full(self, tmp_path, monkeypatch):
        original = run_state.sync

        def full(folder: Path, below: bool = True) -> None:
            if folder.name == ".writing-2":
                raise OSError(28, "No space left on device")
            original(folder, below)

        monkeypatch.setattr(run_state, "sync", full)
        state = {"a": jnp.arange(3.0)}
        with RunState(tmp_path, {}) as store:
            store.save(1, state, {"step": 1})
            store.save(2, state, {"step": 2})
            with pytest.raises(UserError, match=r"the disk is full.*step 2 needs .*step 1 is intact"):
                store.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_every_file_of_a_checkpoint_is_on_the_disk_before_it_gets_its_number(tmp_path, monkeypatch):
    synced: list[str] = []
    original = run_state.os.fsync

    def remember(handle: int) -> None:
        synced.append(run_state.os.readlink(f"/proc/self/fd/{handle}"))
        original(handle)

    monkeypatch.setattr(run_state.os, "fsync", remember)
    published = run_state.RunState._publish

    def check(self, step: int, staging: Path) -> None:
        missing = {str(p) for p in staging.rglob("*")} - set(synced)
        assert not missing
        published(self, step, staging)

    monkeypatch.setattr(run_state.RunState, "_publish", check)
    with RunState(tmp_path, {}) as store:
        store.save(1, {"a": jnp.arange(3.0)}, {"step": 1})
    assert str(tmp_path) in synced  # the new name, too
