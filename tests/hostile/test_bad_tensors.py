"""Bad safetensors files, indexes and links are refused from their headers, in one line and little memory."""

from __future__ import annotations

import json
import math
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.bad_input import (
    FORBIDDEN_NAME,
    TEXTS,
    VALUES,
    attempt,
    bad_json,
    changed,
    damaged,
    refused,
    tries,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxlora.checkpoints.base import fingerprint, save_model
from jaxlora.checkpoints.tensors import StoredTensor, open_tensors, read_header
from jaxlora.runtime.folders import file_in

HEADER, INDEX, LINK = "safetensors header", "safetensors index", "link or name out of a folder"
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "__metadata__": {"format": "pt"},
}
DATA = bytes(range(32))


def content(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def write(folder: Path, header: object, data: bytes = DATA) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(content(header if isinstance(header, bytes) else json.dumps(header).encode(), data))
    return file


def read_everything(file: Path) -> list[StoredTensor]:
    """Read each tensor: what a header promises must be there and stay inside the file."""
    tensors = read_header(str(file))
    size = file.stat().st_size
    places = sorted((tensor.offset, tensor.offset + tensor.size) for tensor in tensors)
    assert all(0 <= begin <= end <= size for begin, end in places)
    assert all(one[1] <= other[0] for one, other in pairwise(places))
    for tensor in tensors:
        assert math.prod(tensor.shape) * tensor.dtype.itemsize == tensor.size
        if tensor.shape:
            assert tensor.rows(0, tensor.shape[0]).shape == tensor.shape
    return tensors


def test_the_header_that_is_changed_below_is_right(tmp_path):
    tensors = {tensor.key: tensor for tensor in read_everything(write(tmp_path, GOOD))}
    assert tensors["a"].rows(0, 2).tobytes() == DATA[:24]
    assert tensors["b"].rows(0, 4).tobytes() == DATA[24:]


class TestHeaders:
    @tries(250)
    @given(bad_json(GOOD))
    def test_a_changed_header_is_consistent_or_refused(self, tmp_path, header):
        attempt(HEADER, read_everything, write(tmp_path, header))

    @tries(200)
    @given(damaged(content(json.dumps(GOOD).encode())))
    def test_a_damaged_file_is_consistent_or_refused(self, tmp_path, whole):
        (tmp_path / "model.safetensors").write_bytes(whole)
        attempt(HEADER, read_everything, tmp_path / "model.safetensors")

    @tries(200)
    @given(st.dictionaries(st.sampled_from("ab"), changed(GOOD["a"]), min_size=1))
    def test_a_changed_entry_is_consistent_or_refused(self, tmp_path, header):
        attempt(HEADER, read_everything, write(tmp_path, header))

    @pytest.mark.parametrize(
        "header",
        [
            {"a": GOOD["a"] | {"data_offsets": [0, 10**18]}},
            {"a": GOOD["a"] | {"shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}},
            {"a": GOOD["a"] | {"shape": [-2, -3]}},
            {"a": GOOD["a"] | {"shape": [2.0, 3.0]}},
            {"a": GOOD["a"] | {"shape": [True, 6]}},
            {"a": GOOD["a"] | {"shape": ["2", "3"]}},
            {"a": GOOD["a"] | {"shape": [1] * 10_000}},
            {"a": GOOD["a"] | {"shape": [10**4000] * 2000}},
            {"a": GOOD["a"] | {"data_offsets": [24, 0]}},
            {"a": GOOD["a"] | {"data_offsets": [-24, 0]}},
            {"a": GOOD["a"] | {"data_offsets": [0, 24, 32]}},
            {"a": GOOD["a"] | {"data_offsets": [math.inf, math.nan]}},
            {"a": GOOD["a"] | {"dtype": "F64"}},
            {"\x1b]0;title\x07\x1b[2J": GOOD["a"] | {"dtype": "F64"}},  # would rewrite the terminal
            {"a": GOOD["a"] | {"dtype": ["F32"]}},
            {"a": GOOD["a"], "b": GOOD["a"]},  # the same bytes twice
            {"a": GOOD["a"], "b": GOOD["b"] | {"data_offsets": [20, 28]}},
            {"a": GOOD["a"]},  # bytes that belong to nothing
            b'{"a": ' + json.dumps(GOOD["a"]).encode() + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}",
            json.dumps(GOOD).encode("utf-16"),
            b'{"\xff\xfe": 1}',
            b"[" * 200_000,
            b"[]",
            b"null",
            b"",
        ],
        ids=lambda header: str(header)[:60],
    )
    def test_lies_are_refused(self, tmp_path, header):
        refused(HEADER, read_header, str(write(tmp_path, header)))

    @pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 10**18, 101 * 2**20, 2])
    def test_a_header_that_lies_about_its_length_takes_no_memory(self, tmp_path, length):
        file = tmp_path / "model.safetensors"
        file.write_bytes(content(json.dumps(GOOD).encode(), length=length))
        with file.open("r+b") as handle:
            handle.truncate(2**33)  # takes no space on the disk, so that the length is there to be read
        tracemalloc.start()
        try:
            refused(HEADER, read_header, str(file))
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("length", [2**64 - 1, 2**40, 0])
    def test_a_fingerprint_reads_little_of_a_file_that_lies(self, tmp_path, length):
        (tmp_path / "config.json").write_text("{}")
        with (tmp_path / "model.safetensors").open("wb") as handle:
            handle.write(content(b"", b"", length))
            handle.truncate(2**36)
        tracemalloc.start()
        try:
            attempt(HEADER, fingerprint, tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
        finally:
            tracemalloc.stop()


class TestIndexes:
    @pytest.fixture
    def sharded(self, tmp_path) -> Path:
        for name in ("a", "b"):
            save_file({name: np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
        return tmp_path

    @tries(200)
    @given(bad_json({"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    def test_a_changed_index_agrees_with_the_files_or_is_refused(self, sharded, index):
        (sharded / "model.safetensors.index.json").write_bytes(index)

        def use() -> None:
            assert set(open_tensors(str(sharded))) <= {"a", "b"}

        attempt(INDEX, use)

    @pytest.mark.parametrize(
        "name", ["../{}/a.safetensors", "/{}/a.safetensors", "./a.safetensors", "..", "", "a\0b", "sub/a"]
    )
    def test_no_name_leads_out_of_the_folder(self, sharded, name):
        outside = sharded.parent / FORBIDDEN_NAME
        outside.mkdir(exist_ok=True)
        save_file({"a": np.zeros(2, np.float32)}, outside / "a.safetensors")
        path = name.format(outside if name.startswith("/") else FORBIDDEN_NAME)
        index = {"weight_map": {"a": path, "b": "b.safetensors"}}
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(LINK, open_tensors, str(sharded))


class TestLinks:
    @pytest.fixture
    def outside(self, tmp_path) -> Path:
        folder = tmp_path / FORBIDDEN_NAME
        folder.mkdir()
        save_file({"a": np.zeros(2, np.float32)}, folder / "model.safetensors")
        (folder / "notes.txt").write_text("private")
        return folder

    def test_weights_behind_a_link_out_of_the_folder_are_not_read(self, tmp_path, outside):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
        assert "link" in refused(LINK, open_tensors, str(folder))

    def test_links_of_a_hub_snapshot_lead_to_its_blobs_and_nowhere_else(self, tmp_path, outside):
        snapshot, blobs = tmp_path / "models--o--n/snapshots/0123", tmp_path / "models--o--n/blobs"
        for folder in (snapshot / "inner", blobs):
            folder.mkdir(parents=True)
        save_file({"a": np.zeros(2, np.float32)}, blobs / "5678")
        for folder, up in ((snapshot, "../.."), (snapshot / "inner", "../../..")):
            (folder / "model.safetensors").symlink_to(f"{up}/blobs/5678")
            assert list(open_tensors(str(folder))) == ["a"]
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
            refused(LINK, open_tensors, str(folder))

    def test_a_folder_may_itself_be_a_link_and_links_inside_are_followed(self, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        save_file({"a": np.zeros(2, np.float32)}, folder / "weights")
        (folder / "model.safetensors").symlink_to("weights")
        (tmp_path / "link").symlink_to(folder)
        assert list(open_tensors(str(tmp_path / "link"))) == ["a"]

    def test_a_circle_of_links_is_missing(self, tmp_path):
        (tmp_path / "model.safetensors").symlink_to("model.safetensors")
        refused(LINK, open_tensors, str(tmp_path))

    def test_a_merged_checkpoint_takes_no_text_from_outside_the_base(self, tmp_path, outside, monkeypatch):
        base = tmp_path / "base"
        base.mkdir()
        (base / "vocab.txt").symlink_to(outside / "notes.txt")
        monkeypatch.setattr("jaxlora.checkpoints.base._arrays", lambda spec, weights: iter(()))
        refused(LINK, save_model, tmp_path / "merged", None, {}, base)
        assert not (tmp_path / "merged").exists()

    @tries(200)
    @given(st.one_of(TEXTS, VALUES.map(str)))
    def test_no_text_names_a_file_outside(self, tmp_path, name):
        def use() -> None:
            assert file_in(tmp_path, name).parent == tmp_path

        attempt(LINK, use)
