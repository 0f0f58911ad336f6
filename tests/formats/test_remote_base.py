"""Bases that are fetched: in a bucket only small files are copied; from the Hub all, and never half of it."""

from __future__ import annotations

import dataclasses
import runpy
import shutil
import sys

import fsspec
import jax
import numpy as np
import pytest
from helpers.hf_models import make_checkpoint

from jaxlora.checkpoints.base import find_base, fingerprint
from jaxlora.cli import load_config
from jaxlora.config import MeshConfig
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import embedded_path, mirror, mirrors, weights_of
from jaxlora.sharding import make_mesh
from jaxlora.train.job import load_frozen, prepare

# --- In a bucket --------------------------------------------------------------------------------------------

ADDRESS = "memory://bucket/models/tiny"


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A base on the disk and the same in a bucket; the home folder is an empty one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mirror.cache_clear()
    folder = tmp_path / "model"
    make_checkpoint(folder, vocab_size=1024, shards=3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((embedded_path("base") / name).read_bytes())
    bucket = fsspec.filesystem("memory")
    if bucket.exists("/bucket"):
        bucket.rm("/bucket", recursive=True)
    bucket.put(str(folder) + "/", "/bucket/models/tiny/", recursive=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def job_on(repository, path):
    fields = {"model.path": str(path), "data.train_rows": "8", "data.validation_rows": "8"}
    return prepare(load_config(repository / "configs" / "tiny.py", fields))


def test_it_gives_the_same_job_the_same_weights_and_the_same_fingerprint(repository, local):
    here, there = job_on(repository, local), job_on(repository, ADDRESS)
    assert there.spec.config == here.spec.config
    assert [row.tokens.tolist() for row in there.train_rows] == [
        row.tokens.tolist() for row in here.train_rows
    ]
    assert not list(there.base.folder.glob("*.safetensors"))
    assert fingerprint(there.base.folder) == fingerprint(here.base.folder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        loaded = [
            load_frozen(dataclasses.replace(job, machine=dataclasses.replace(job.machine, mesh=mesh)))
            for job in (here, there)
        ]
    jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_what_changes_in_the_bucket_changes_here(repository, local):
    folder = mirror(ADDRESS)
    before = fingerprint(folder)
    (folder / "old.json").write_text("{}")
    (folder / ".config.json.1.tmp").write_text("{")  # another process is writing it
    bucket = fsspec.filesystem("memory")
    weights = next(str(f) for f in bucket.ls("/bucket/models/tiny", detail=False) if "safetensors" in f)
    content = bytearray(bucket.cat_file(weights))
    content[-1] ^= 1
    bucket.pipe_file(weights, bytes(content))
    assert mirror(ADDRESS) == folder
    assert (folder / "old.json").exists()  # one process asks the bucket once
    mirror.cache_clear()
    assert mirror(ADDRESS) == folder
    assert fingerprint(folder) != before
    assert not (folder / "old.json").exists()
    assert (folder / ".config.json.1.tmp").exists()


def test_a_mirror_is_known_by_its_place_alone(local, tmp_path):
    assert weights_of(mirror(ADDRESS + "/")) == ADDRESS
    elsewhere = tmp_path / mirror(ADDRESS).name
    assert weights_of(elsewhere) == str(elsewhere)
    assert mirrors().is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/none", "cannot be copied"),
        ("memory://bucket/models", "no config.json there"),
        ("nothing://bucket/model", "nothing"),
    ],
)
def test_what_is_not_there_is_one_line(repository, local, address, message):
    with pytest.raises(UserError, match=message) as caught:
        job_on(repository, address)
    assert "\n" not in str(caught.value)


def test_the_preview_takes_the_tokenizer_of_a_base_in_a_bucket(repository, local, monkeypatch, capsys):
    words = ["--config", "configs/tiny.py", "--rows", "1", f"--config.model.path={ADDRESS}"]
    monkeypatch.setattr(sys, "argv", ["preview.py", *words])
    runpy.run_path(str(repository / "tools/preview.py"))["main"]()
    assert "answer: loss" in capsys.readouterr().out


# --- On the Hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(local, tmp_path, monkeypatch):
    """A stand-in for the Hub's client, with the cache folder that it keeps and what it was asked."""
    cached, asked = tmp_path / "cached", []
    cached.mkdir()

    def snapshot_download(name, *, allow_patterns, revision=None, local_files_only=False):
        asked.append((name, local_files_only))
        if not local_files_only:
            for pattern in allow_patterns:
                for file in local.glob(pattern):
                    shutil.copy(file, cached / file.name)
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return cached, asked


def hub_config(repository, **fields):
    return load_config(repository / "configs" / "tiny.py", {"model.path": "someone/model"} | fields)


@pytest.mark.parametrize(
    "missing", ["config.json", "tokenizer_config.json", "*-00002-*", "*.safetensors", "*"]
)
def test_a_part_of_a_model_in_the_cache_is_not_taken_for_the_whole(repository, local, hub, missing):
    """Fetching a tokenizer, or stopping a download, leaves a folder of the model with files missing."""
    cached, asked = hub
    gone = set(local.glob(missing))
    assert gone
    for file in set(local.iterdir()) - gone:
        shutil.copy(file, cached / file.name)
    folder = find_base(hub_config(repository).model).folder
    assert (folder, asked) == (cached, [("someone/model", True), ("someone/model", False)])
    assert fingerprint(folder) == fingerprint(local)
    assert find_base(hub_config(repository).model).folder == cached
    assert asked[2:] == [("someone/model", True)]


def test_a_plan_needs_no_weights_and_a_tokenizer_elsewhere_no_tokenizer(repository, local, hub):
    cached, asked = hub
    shutil.copy(local / "config.json", cached)
    find_base(hub_config(repository, **{"model.tokenizer": "embedded:base"}).model, with_weights=False)
    assert asked == [("someone/model", True)]
    find_base(hub_config(repository).model, with_weights=False)
    assert not list(cached.glob("*.safetensors"))


def test_a_chat_template_in_a_file_of_its_own_is_fetched(repository, local, hub):
    """As Transformers 5 writes it."""
    (local / "chat_template.jinja").write_text("{{ messages }}")
    folder = find_base(hub_config(repository).model, with_weights=False).folder
    assert (folder / "chat_template.jinja").is_file()


def test_a_part_of_a_model_without_a_network_is_one_line(repository, tmp_path, monkeypatch):
    """With the Hub's own client: without a network it gives whatever its cache holds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--someone--model/refs").mkdir(parents=True)
    (tmp_path / "models--someone--model/refs/main").write_text("0" * 40)
    snapshot = tmp_path / "models--someone--model/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path("base") / name, snapshot / name)
    with pytest.raises(
        UserError, match=r"'someone/model': was not fetched completely: .*config\.json: missing"
    ):
        find_base(hub_config(repository).model)
