"""Adapters from elsewhere are read whole or refused; nothing is applied in part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.adapters import PLACEMENTS, trained_lora
from helpers.bad_input import (
    FORBIDDEN_NAME,
    VALUES,
    assert_exit_2,
    attempt,
    bad_json,
    damaged,
    refused,
    tries,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.spec import ModelConfig
from jaxlora.parity.tinker_service import unpack_adapter
from jaxlora.runtime.remote import embedded_path

MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)  # fmt: skip
SETTINGS, TENSORS, ARCHIVE = "adapter_config.json", "adapter tensors", "adapter archive"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    spec = ModelSpec(MODEL, PLACEMENTS["all_layer and head"], "float32")
    export_adapter(folder, spec, trained_lora(spec), "base", seed=3, extra={"step": 7, "run_id": "r"})
    return folder


@pytest.fixture
def adapter(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def use(folder: Path) -> None:
    """Whatever is taken is a whole, finite adapter of the right shapes, with metadata of the right types."""
    lora_config, lora, metadata, _ = read_adapter(folder, MODEL)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(lora))
    assert lora_config.rank > 0
    assert metadata["seed"] is None or isinstance(metadata["seed"], int)
    assert isinstance(metadata.get("run_id"), str | None)


def change(folder: Path, name: str, **values: object) -> Path:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
    return folder


def test_the_adapter_that_is_changed_below_is_right(adapter):
    use(adapter)


class TestSettings:
    @tries(60)
    @given(data=st.data())
    @pytest.mark.parametrize("name", [SETTINGS, "jaxlora.json"])
    def test_changed_files(self, good, tmp_path, name, data):
        folder = tmp_path / "adapter"
        if not folder.exists():
            shutil.copytree(good, folder)
        (folder / name).write_bytes(data.draw(bad_json(json.loads((good / name).read_text()))))
        attempt(SETTINGS, use, folder)

    @pytest.mark.parametrize(
        "values",
        [
            {"use_dora": True},
            {"use_rslora": "false"},
            {"use_rslora": 1},
            {"bias": "all"},
            {"bias": "lora_only"},
            {"lora_bias": True},
            {"modules_to_save": ["lm_head"]},
            {"alpha_pattern": {"q_proj": 64}},
            {"rank_pattern": {"q_proj": 4}},
            {"layers_to_transform": [0]},
            {"layer_replication": [[0, 2]]},
            {"fan_in_fan_out": True},
            {"target_parameters": ["mlp.gate"]},
            {"trainable_token_indices": [1, 2]},
            {"arrow_config": {}, "some_future_setting": "on"},
            {"init_lora_weights": "pissa"},
            {"init_lora_weights": "olora"},
            {"peft_type": "LOHA"},
            {"peft_type": None},
            {"r": 0},
            {"r": -8},
            {"r": 4},
            {"r": 8.0},
            {"r": True},
            {"r": 10**30},
            {"r": None},
            {"lora_alpha": 0},
            {"lora_alpha": float("nan")},
            {"lora_alpha": float("inf")},
            {"lora_alpha": "32"},
            {"lora_alpha": 10**300},
            {"target_modules": ["q_proj"]},
            {"target_modules": [{}]},
            {"base_model_name_or_path": "a\x1b[2Jb"},
            {"base_model_name_or_path": ["x"]},
        ],
        ids=str,
    )
    def test_lies_are_refused(self, adapter, values):
        assert refused(SETTINGS, use, change(adapter, SETTINGS, **values))

    @pytest.mark.parametrize(
        "values",
        [
            {"rank": 4},
            {"alpha": 1},
            {"condition": "attention_only"},
            {"seed": "0"},
            {"seed": -1},
            {"seed": True},
            {"seed": 10**30},
            {"step": "7"},
            {"run_id": ["x"]},
            {"run_id": "[/red]\n"},
            {"output_head": False},
        ],
        ids=str,
    )
    def test_metadata_that_lies_is_refused(self, adapter, values):
        refused(SETTINGS, use, change(adapter, "jaxlora.json", **values))

    @pytest.mark.parametrize("name", [SETTINGS, "jaxlora.json", WEIGHTS])
    def test_a_link_out_of_the_folder_is_not_followed(self, adapter, tmp_path, name):
        outside = tmp_path / FORBIDDEN_NAME
        outside.mkdir()
        (adapter / name).rename(outside / name)
        (adapter / name).symlink_to(outside / name)
        assert "link" in refused(SETTINGS, use, adapter)


class TestTensors:
    @pytest.mark.parametrize("dtype", [np.int32, np.float64, np.bool_, np.uint8])
    def test_other_kinds_of_numbers_are_refused(self, adapter, dtype):
        tensors = load_file(adapter / WEIGHTS)
        first = min(tensors)
        save_file(tensors | {first: tensors[first].astype(dtype)}, adapter / WEIGHTS)
        refused(TENSORS, use, adapter)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_a_value_that_is_no_number_is_refused(self, adapter, value, dtype):
        tensors = load_file(adapter / WEIGHTS)
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)
        tensors[max(tensors)].flat[-1] = value
        save_file(tensors, adapter / WEIGHTS)
        assert "NaN or infinity" in refused(TENSORS, use, adapter)

    @tries(60)
    @given(data=st.data())
    def test_missing_renamed_and_reshaped_tensors_are_refused(self, good, tmp_path, data):
        folder = tmp_path / "adapter"
        if not folder.exists():
            shutil.copytree(good, folder)
        tensors = load_file(good / WEIGHTS)
        name = data.draw(st.sampled_from(sorted(tensors)))
        array = tensors.pop(name)
        way = data.draw(
            st.sampled_from(["missing", "renamed", "extra", "cut", "turned", "flat", "layer 2", "base"])
        )
        other = {
            "missing": {},
            "renamed": {name.replace("lora_A", "lora_C").replace("lora_B", "lora_D"): array},
            "extra": {name: array, name + ".extra": array},
            "cut": {name: np.ascontiguousarray(array[:-1])},
            "turned": {name: np.ascontiguousarray(array.T)},
            "flat": {name: array.reshape(-1)},
            "layer 2": {
                name: array,
                name.replace("layers.0.", "layers.2.").replace("layers.1.", "layers.2.") + ".": array,
            },
            "base": {name.replace("lora_A", "base_layer").replace("lora_B", "base_layer"): array},
        }[way]
        save_file(tensors | other, folder / WEIGHTS)
        if way == "turned" and array.shape[0] == array.shape[1]:
            return
        refused(TENSORS, use, folder)

    @tries(60)
    @given(data=st.data())
    def test_damaged_headers(self, good, tmp_path, data):
        folder = tmp_path / "adapter"
        if not folder.exists():
            shutil.copytree(good, folder)
        whole = (good / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        (folder / WEIGHTS).write_bytes(data.draw(damaged(whole[:end])) + whole[end:])
        attempt(TENSORS, use, folder)

    @pytest.mark.parametrize(
        "change",
        [
            {"hidden_size": 32},
            {"num_hidden_layers": 3},
            {"num_hidden_layers": 1},
            {"num_key_value_heads": 2},
            {"vocab_size": 65},
        ],
        ids=str,
    )
    def test_an_adapter_of_another_base_is_refused(self, adapter, change):
        values = {name: getattr(MODEL, name) for name in MODEL.__pydantic_fields__} | change
        refused(TENSORS, read_adapter, adapter, ModelConfig(**values))

    @pytest.mark.parametrize(
        "names", [["adapter_model.bin"], ["adapter_model.pt"], ["adapter_model.safetensors.index.json"]]
    )
    def test_weights_in_another_form_are_not_read(self, adapter, names):
        (adapter / WEIGHTS).unlink()
        for name in names:
            (adapter / name).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
        assert "safetensors only" in refused(TENSORS, use, adapter)

    def test_the_entry_point_ends_with_code_2_and_never_scores_the_base(
        self, repository, adapter, tmp_path, capsys
    ):
        words = ["--config", str(repository / "configs/tiny.py"), "--adapter", str(adapter), "--seed", "0"]
        out = tmp_path / "scores"
        assert_exit_2(TENSORS, repository / "launch/evaluate.py", [*words, "--out", str(out)], capsys)
        assert not out.exists()

    def test_a_tokenizer_with_more_tokens_than_the_base_is_refused(self, repository, tmp_path, capsys):
        """Ids beyond the embedding would be read as others, in silence."""
        folder = Path(shutil.copytree(embedded_path("base"), tmp_path / "base"))
        settings = json.loads((folder / "tokenizer.json").read_text())
        settings["added_tokens"] += [
            settings["added_tokens"][-1] | {"id": 1024 + i, "content": f"<more {i}>"} for i in range(5)
        ]
        (folder / "tokenizer.json").write_text(json.dumps(settings))
        words = ["--config", str(repository / "configs/tiny.py"), "--base", f"--config.model.path={folder}"]
        words += [f"--config.results_dir={tmp_path / 'results'}", "--dry-run"]  # a base may be evaluated here
        line = assert_exit_2(TENSORS, repository / "launch/evaluate.py", words, capsys)
        assert "tokenizer" in line


class TestArchives:
    @tries(150)
    @given(VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=600))
    def test_bytes_that_are_no_archive(self, tmp_path, content):
        refused(ARCHIVE, unpack_adapter, content, tmp_path)

    @pytest.mark.parametrize("name", ["../{}", "/tmp/{}", "a/../../{}", "./{}"])
    @pytest.mark.parametrize("kind", ["file", "link", "hard link"])
    def test_no_member_is_written_outside(self, tmp_path, name, kind):
        import io
        import tarfile

        folder = tmp_path / "inner"
        folder.mkdir()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for member in (WEIGHTS, SETTINGS):
                info = tarfile.TarInfo(name.format(member))
                if kind == "file":
                    info.size = 2
                    archive.addfile(info, io.BytesIO(b"{}"))
                else:
                    info.type = tarfile.SYMTYPE if kind == "link" else tarfile.LNKTYPE
                    info.linkname = "/etc/passwd"
                    archive.addfile(info)
        attempt(ARCHIVE, unpack_adapter, buffer.getvalue(), folder)
        assert {path.name for path in tmp_path.iterdir()} == {"inner"}
        assert all(path.read_bytes() == b"{}" for path in folder.iterdir())
