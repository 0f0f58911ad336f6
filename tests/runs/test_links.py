"""One writer a run, whatever happens to its lock; links stay links; a folder that is gone stays gone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import kills
from helpers.trials import one_line

from jaxlora.runtime.errors import UserError
from jaxlora.train.run_directory import _lock

PAUSE = "between rewind and first step"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, compiled) -> kills.Lab:
    return kills.Lab(tmp_path_factory.mktemp("links"), compiled)


@pytest.fixture
def folder(lab) -> Path:
    return lab.new_folder()


def refused(lab: kills.Lab, folder: Path, *words: str) -> str:
    run = lab.start(folder, *words)
    assert run.wait() == 2, run.log()
    return one_line(run.log())


class TestTheLock:
    @pytest.fixture
    def target(self, tmp_path) -> Path:
        target = tmp_path / "thesis.txt"
        target.write_text("precious")
        return target

    @pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
    def test_it_does_not_follow_a_link(self, tmp_path, target, link):
        file = tmp_path / ".run.lock"
        link(file, target)
        with (
            pytest.raises(UserError, match=r"\.run\.lock: (must be a plain file|is a hard link)"),
            _lock(file, tmp_path / "run"),
        ):
            pass
        assert target.read_text() == "precious"

    def test_it_does_not_make_the_target_of_a_dangling_link(self, tmp_path):
        (tmp_path / ".run.lock").symlink_to(tmp_path / "new")
        with pytest.raises(UserError), _lock(tmp_path / ".run.lock", tmp_path / "run"):
            pass
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_it_is_a_file(self, tmp_path, make):
        make(tmp_path / ".run.lock")
        with (
            pytest.raises(UserError, match="must be a plain file"),
            _lock(tmp_path / ".run.lock", tmp_path / "run"),
        ):
            pass

    def test_it_says_who_has_it(self, tmp_path):
        with _lock(tmp_path / "lock", tmp_path / "run"):
            assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
        with _lock(tmp_path / "lock", tmp_path / "run"):
            assert (tmp_path / "lock").read_text().count("\n") == 1

    @pytest.mark.parametrize("words", [(), ("--config.overwrite=true",)])
    def test_deleting_it_lets_no_second_writer_in(self, lab, folder, words):
        first = lab.pause_at(folder, PAUSE)
        (folder / "results" / f".{kills.RUN_ID}.lock").unlink()
        assert "another process is writing this run" in refused(lab, folder, *words)
        assert first.go_on() == 0, first.log()
        lab.compare(first)


class TestAFolderThatIsALink:
    @pytest.fixture
    def linked(self, lab, folder) -> Path:
        """The folder of a finished run, which lies on another disk."""
        disk = folder / "disk"
        disk.mkdir(parents=True)
        shutil.copytree(lab.whole.path, disk / "run")
        (folder / "results").mkdir()
        (folder / "results" / kills.RUN_ID).symlink_to("../disk/run")
        return folder

    def test_it_is_overwritten_as_often_as_asked_and_stays_a_link(self, lab, linked):
        for _ in range(2):
            lab.finish(linked, "--config.overwrite=true")
            assert (linked / "results" / kills.RUN_ID).is_symlink()
        assert [path.name for path in (linked / "disk").iterdir() if path.name[0] != "."] == ["run"]
        assert not (linked / "results" / f".{kills.RUN_ID}.deleted").exists()

    def test_it_is_finished_or_resumed_like_any_other(self, lab, linked):
        assert "this run is finished" in refused(lab, linked)
        (linked / "disk/run/summary.json").write_text('{"status": "unfinished"}')
        lab.finish(linked)

    def test_two_links_to_one_folder_have_one_lock(self, lab, linked):
        results = linked / "results" / kills.RUN_ID
        (linked / "disk/run/summary.json").unlink()
        other = lab.new_folder()
        (other / "results").mkdir(parents=True)
        (other / "results" / kills.RUN_ID).symlink_to(results.resolve())
        first = lab.pause_at(linked, PAUSE)
        assert f"process {first.process.pid} on" in refused(lab, other)
        assert first.go_on() == 0, first.log()


class TestAFolderThatGoes:
    @pytest.mark.parametrize(
        "moment", ["a step computed, not yet recorded", "hashed, not published", "exported, no summary"]
    )
    def test_a_folder_that_was_moved_is_not_made_again(self, lab, folder, moment):
        run = lab.pause_at(folder, moment)
        moved = folder / "moved"
        run.path.rename(moved)
        assert run.go_on() == 2, run.log()
        assert kills.RUN_ID in one_line(run.log())
        assert not run.path.exists()
        moved.rename(run.path)
        lab.finish(folder)

    def test_nor_one_that_was_deleted(self, lab, folder):
        run = lab.pause_at(folder, "a step computed, not yet recorded", nth=8)
        shutil.rmtree(run.path)
        assert run.go_on() == 2, run.log()
        assert "was deleted or moved during training" in one_line(run.log())
        assert not run.path.exists()
        lab.finish(folder)

    def test_something_else_that_writes_the_metrics_stops_the_run(self, lab, folder):
        run = lab.pause_at(folder, "a step computed, not yet recorded", nth=8)
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"run_id": "other", "step": 8, "split": "train", "loss": 1.0}\n')
        assert run.go_on() == 2, run.log()
        assert "another process is writing to it" in one_line(run.log())
        lab.finish(folder)  # what is after the checkpoint is cut off
        steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert len(steps) == 24 + 6
