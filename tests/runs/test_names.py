"""Folders and runs may have any name: what a library cannot carry never reaches it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import kills
from helpers.trials import one_line, small_disk

import jaxlora.checkpoints.run_state as module
from jaxlora.checkpoints.run_state import RunState
from jaxlora.runtime.errors import UserError
from jaxlora.train import run_directory
from jaxlora.train.display import draw_validation

NAMES = (
    *(
        "two words",
        " first",
        "new\nline",
        "tab\t",
        "st*r",
        "what?",
        "tiny[lr=1e-3]",
        "]",
        "{a,b}",
        "back\\slash",
    ),
    *("it's", '"quoted"', "$x_1^2$", "%s", "#", "a:b", "gs:", "~", "-dash", "漢字 ü", "e\u0301", "x" * 200),
)
STATE = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((3, 4), jnp.bfloat16), "n": jnp.int32(7)}}


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_in_a_folder_of_any_name_comes_back(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    with RunState(folder, {}) as store:
        store.save(1, STATE, {"step": 1})
    with RunState(folder, {}) as store:
        assert equal(store.restore(STATE).state, STATE)
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_a_relative_link_to_a_folder_of_such_a_name_works_too(tmp_path, monkeypatch):
    (tmp_path / "disk[1]").mkdir()
    (tmp_path / "link").symlink_to("disk[1]")
    monkeypatch.chdir(tmp_path)
    with RunState(Path("link/checkpoints"), {}) as store:
        store.save(1, STATE, {"step": 1})
    with RunState(Path("disk[1]/checkpoints"), {}) as store:
        assert equal(store.restore(STATE).state, STATE)


class TestReadBack:
    """A checkpoint is published only when its arrays can be opened."""

    @pytest.fixture
    def by_path(self, monkeypatch):
        """Orbax gets the folder's own name, which it cannot carry."""
        monkeypatch.setattr(module, "_OPEN_FOLDERS", Path("/not/there"))

    def test_what_cannot_be_read_is_not_published(self, tmp_path, by_path):
        folder = tmp_path / "tiny[lr=1e-3]"
        with RunState(folder, {}) as store:
            store.save(1, STATE, {"step": 1})
            with pytest.raises(UserError, match=r"cannot be read back; give another --config.results_dir"):
                store.wait()
        assert list(folder.iterdir()) == []

    def test_what_was_published_before_there_was_such_a_check_is_passed_over(self, tmp_path, by_path):
        folder = tmp_path / "tiny[lr=1e-3]"
        state = folder / "3" / "state"
        state.parent.mkdir(parents=True)
        writer = ocp.StandardCheckpointer()
        writer.save(state, STATE)
        writer.wait_until_finished()
        (folder / "3" / "progress.json").write_text('{"step": 3}')
        (folder / "3" / "sha256.json").write_text(json.dumps(module.hashes(folder / "3")))
        with (
            RunState(folder, {}) as store,
            pytest.raises(UserError, match=r"step 3 \(its arrays cannot be read"),
        ):
            store.restore(STATE)

    def test_a_lost_array_is_seen_before_it_is_published(self, tmp_path, monkeypatch):
        original = module.RunState._read_back

        def lose(self, place, shapes):
            for file in (tmp_path / ".writing-1/state/ocdbt.process_0/d").iterdir():
                file.unlink()
            original(self, place, shapes)

        monkeypatch.setattr(module.RunState, "_read_back", lose)
        with RunState(tmp_path, {}) as store:
            store.save(1, STATE | {"large": jnp.arange(10_000.0)}, {"step": 1})
            with pytest.raises(UserError, match="cannot be read back"):
                store.wait()
        assert list(tmp_path.iterdir()) == []


class TestPictures:
    TITLES = ("$", "$x", "$\\frac{$", "a_b^c", "\\", "tiny[lr=1e-3]", "{", "%")

    @pytest.mark.parametrize("title", TITLES)
    def test_a_name_is_no_formula(self, tmp_path, title):
        draw_validation(tmp_path / "v.png", {1: 0.5, 2: 0.25}, 2, title)
        assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
        assert [path.name for path in tmp_path.iterdir()] == ["v.png"]

    def test_underscores_are_drawn_as_they_are(self, tmp_path):
        for name, title in (("a", "x_1"), ("b", "$x_1$")):
            draw_validation(tmp_path / name, {1: 0.5}, 1, title)
        assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, compiled) -> kills.Lab:
    return kills.Lab(tmp_path_factory.mktemp("names"), compiled)


def test_a_run_of_a_hostile_name_in_a_hostile_folder_is_killed_resumed_and_completed(lab, monkeypatch):
    prefix = "tiny[lr=1e-3] {a} $x_1^2$ 漢"
    monkeypatch.setattr(lab, "run_id", f"{prefix}-all_layer-seed-0")
    folder, words = lab.folder / "run [1] it's *?", (f"--config.prefix={prefix}",)
    lab.kill_at(folder, "published, older ones not deleted", *words, nth=3)
    run = lab.start(folder, *words)
    assert run.wait() == 0, run.log()
    ours = kills.outcome(run.path)
    for name in ("selected/adapter_model.safetensors", "sample_render.txt", "files", "checkpoints"):
        assert ours[name] == lab.expected[name]
    assert "validation.png" in ours["files"]


def test_a_picture_that_fails_does_not_stop_the_run(lab, tmp_path):
    folder = lab.new_folder()
    shutil.copytree(lab.whole.path.parent, folder / "results")
    path = folder / "results" / kills.RUN_ID
    (path / "summary.json").unlink()
    (path / "validation.png").unlink()
    (path / "validation.png").mkdir()  # nothing can be written there
    run = lab.start(folder)
    assert run.wait() == 0, run.log()
    assert "validation.png could not be drawn" in run.log()
    assert json.loads((path / "summary.json").read_text())["status"] == "completed"


class TestNamesThatAreRefused:
    def test_a_name_longer_than_file_systems_take(self, lab):
        folder = lab.new_folder()
        run = lab.start(folder, f"--config.prefix={'漢' * 90}")
        assert run.wait() == 2, run.log()
        assert "the run's name takes 287 bytes" in one_line(run.log())
        assert not (folder / "results").exists() or not any(
            path.name.startswith("漢") for path in (folder / "results").iterdir()
        )

    def test_a_folder_that_cannot_be_written(self, lab):
        folder = lab.new_folder()
        with small_disk(folder / "results", "1m") as change:
            change("1m,ro")
            run = lab.start(folder)
            assert run.wait() == 2, run.log()
            assert re.search(r"error: .*results.*Read-only file system", one_line(run.log()))
            change("50m,rw")
            lab.finish(folder)


def test_a_lock_is_never_made_for_a_name_that_is_refused(tmp_path):
    assert run_directory._LONGEST_NAME + len("..deleted") <= os.pathconf(tmp_path, "PC_NAME_MAX")
