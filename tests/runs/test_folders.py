"""A folder is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.hf_models import make_checkpoint, our_model

from jaxlora.checkpoints import base as base_files
from jaxlora.runtime.folders import new_folder


@pytest.mark.parametrize("older", [False, True])
def test_a_folder_appears_at_the_end_and_leaves_nothing_beside_it(tmp_path, older):
    out = tmp_path / "out"
    if older:
        out.mkdir()
        (out / "old").touch()
    with new_folder(out) as folder:
        (folder / "new").touch()
        assert out.exists() == older
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_the_older_folder_of_a_killed_process_goes_once_the_new_one_stands(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.replaced").mkdir()
    with new_folder(out) as folder:
        (folder / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_is_on_the_disk_before_it_gets_its_name_and_then_its_name_is(tmp_path, monkeypatch):
    out, synced = tmp_path / "out", []
    original = os.fsync

    def remember(handle):
        synced.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, out.exists()))
        original(handle)

    monkeypatch.setattr(os, "fsync", remember)
    with new_folder(out) as folder:
        (folder / "weights").write_bytes(b"0" * 10_000)
    assert ("weights", False) in synced
    assert synced[-1] == (tmp_path.name, True)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_after_an_error_nothing_has_changed(tmp_path, older, stop):
    out = tmp_path / "out"
    if older:
        out.mkdir()
        (out / "old").touch()

    def fail():
        with new_folder(out) as folder:
            (folder / "new").touch()
            raise stop

    with pytest.raises(stop):
        fail()
    assert [path.name for path in out.parent.glob("*")] == ["out"] * older
    assert not older or [path.name for path in out.iterdir()] == ["old"]
    assert len(list(tmp_path.iterdir())) == older


def test_a_checkpoint_whose_last_file_fails_is_not_there(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    make_checkpoint(base)
    spec, frozen = our_model(base, scan=False)
    save_file, written = base_files.save_file, []

    def full_disk(tensors, path, **options):
        if written:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(base_files, "save_file", full_disk)
    monkeypatch.setattr(base_files, "_SHARD_BYTES", 50_000)
    with pytest.raises(OSError, match="No space left"):
        base_files.save_model(tmp_path / "merged", spec, frozen, base)
    assert written
    assert list(tmp_path.iterdir()) == [base]
