"""A base in a bucket trains as the same base on the disk: only its small files are copied."""

from __future__ import annotations

import dataclasses

import fsspec
import jax
import numpy as np
import pytest
from hf_models import make_checkpoint

from jaxlora.checkpoints.huggingface import fingerprint
from jaxlora.checkpoints.remote import mirror, mirrors, weights_of
from jaxlora.config import MeshConfig, load_config
from jaxlora.embedded import embedded_path
from jaxlora.errors import UserError
from jaxlora.sharding import make_mesh
from jaxlora.train.job import prepare
from jaxlora.train.member import load_frozen

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
    assert not list(there.model_dir.glob("*.safetensors"))
    assert fingerprint(there.model_dir) == fingerprint(here.model_dir)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        loaded = [load_frozen(dataclasses.replace(job, mesh=mesh)) for job in (here, there)]
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
