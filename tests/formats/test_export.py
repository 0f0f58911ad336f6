"""A finished run is handed on: as the adapter it selected, and as a merged checkpoint; nothing else is."""

from __future__ import annotations

import json
import runpy
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.adapters import PLACEMENTS, load, our_logits, relative_error, torch_logits, trained_lora
from helpers.hf_models import make_checkpoint
from safetensors.numpy import load_file
from transformers import Qwen3ForCausalLM

from jaxlora.checkpoints import base as base_files
from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import ModelSource, RunConfig, to_dict
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config


def make_run(folder, base, placement, seed=4, **model):
    """What a finished run leaves behind, and its adapter."""
    source = ModelSource(path=str(base), dtype="float32", **model)
    config = RunConfig(prefix="made-up", seed=seed, lora=placement, model=source)
    spec = ModelSpec(load_model_config(base), placement, "float32")
    lora = trained_lora(spec, seed)
    run_id = config.run_id
    export_adapter(
        folder / "selected", spec, lora, str(base), seed=seed, extra={"run_id": run_id, "step": 30}
    )
    print_hash = base_files.find_base(source, seed).fingerprint()
    write(
        folder / "manifest.json",
        {"run_id": run_id, "config": to_dict(config), "base": {"fingerprint": print_hash}},
    )
    write(folder / "summary.json", {"run_id": run_id, "status": "completed", "selected_step": 30})
    return lora


def write(file, value):
    file.write_text(json.dumps(value))


def change(file, **values):
    write(file, json.loads(file.read_text()) | values)


@pytest.fixture
def export(repository, monkeypatch, capsys):
    """Run `tools/export.py` with these words; returns exit code, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(repository / "tools" / "export.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def base(tmp_path):
    make_checkpoint(tmp_path / "base")
    return tmp_path / "base"


class TestAdapter:
    def test_the_exported_adapter_is_the_selected_one_byte_for_byte(self, base, tmp_path, export):
        run, out = tmp_path / "run", tmp_path / "out"
        make_run(run, base, PLACEMENTS["attention_only"])
        code, printed, errors = export("--run", run, "--out", out)
        assert code == 0, errors
        assert "made-up-attention_only-seed-4, step 30" in printed
        names = {"adapter_config.json", "adapter_model.safetensors", "jaxlora.json"}
        assert {path.name for path in out.iterdir()} == names
        for name in names:
            assert (out / name).read_bytes() == (run / "selected" / name).read_bytes(), name

    def test_a_dry_run_prints_the_plan_and_writes_nothing(self, base, tmp_path, export):
        run = tmp_path / "run"
        make_run(run, base, PLACEMENTS["attention_only"])
        code, printed, _ = export(
            "--run", run, "--out", tmp_path / "a", "--merged", tmp_path / "m", "--dry-run"
        )
        assert code == 0
        assert "nothing was written" in printed
        assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}

    def test_existing_folders_are_refused_before_anything_is_written(self, base, tmp_path, export):
        run, out = tmp_path / "run", tmp_path / "out"
        make_run(run, base, PLACEMENTS["attention_only"])
        code, _, errors = export("--run", run, "--out", out, "--merged", base)
        assert (code, out.exists()) == (2, False)
        assert errors == f"error: {base}: exists already; give a new folder\n"
        assert export("--run", run, "--out", out)[0] == 0
        assert export("--run", run, "--out", out)[0] == 2
        assert export("--run", run, "--out", out, "--overwrite")[0] == 0

    @pytest.mark.parametrize(
        ("file", "values", "message"),
        [
            ("summary.json", {"status": "failed"}, "status is 'failed'; finish the run first"),
            ("summary.json", {"selected_step": 20}, "the step is 30, but the run's own record says 20"),
            ("selected/jaxlora.json", {"seed": 0}, "the seed is 0"),
            ("selected/jaxlora.json", {"run_id": "other"}, "the run id is other"),
            ("manifest.json", {"config": None}, "has no config"),
        ],
    )
    def test_a_run_that_contradicts_itself_is_refused(self, base, tmp_path, export, file, values, message):
        run = tmp_path / "run"
        make_run(run, base, PLACEMENTS["attention_only"])
        change(run / file, **values)
        code, _, errors = export("--run", run, "--out", tmp_path / "out")
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_another_placement_than_the_manifests_is_refused(self, base, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        make_run(tmp_path / "other", base, PLACEMENTS["mlp_only"])
        (tmp_path / "run" / "selected").rename(tmp_path / "gone")
        (tmp_path / "other" / "selected").rename(tmp_path / "run" / "selected")
        code, _, errors = export("--run", tmp_path / "run", "--out", tmp_path / "out")
        assert code == 2
        assert "the placement is" in errors

    def test_missing_parts_are_named(self, base, tmp_path, export):
        code, _, errors = export("--run", tmp_path / "nowhere", "--out", tmp_path / "out")
        assert (code, "no such run directory" in errors) == (2, True)
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        (tmp_path / "run" / "summary.json").unlink()
        code, _, errors = export("--run", tmp_path / "run", "--out", tmp_path / "out")
        assert (code, "summary.json" in errors) == (2, True)


class TestMerged:
    @pytest.mark.parametrize("name", ["all_layer and head", "attention_only"])
    def test_transformers_computes_the_adapted_models_logits(self, base, tmp_path, export, name):
        lora = make_run(tmp_path / "run", base, PLACEMENTS[name])
        code, _, errors = export(
            "--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged"
        )
        assert code == 0, errors
        spec, frozen = load(base, PLACEMENTS[name])
        theirs = torch_logits(Qwen3ForCausalLM.from_pretrained(tmp_path / "merged").eval())
        assert relative_error(our_logits(spec, lora, frozen), theirs) < 1e-4
        plain = torch_logits(Qwen3ForCausalLM.from_pretrained(base).eval())
        assert relative_error(plain, theirs) > 1e-2

    def test_many_shards_in_and_out(self, tmp_path, export, monkeypatch):
        make_checkpoint(tmp_path / "base", shards=3, tie_word_embeddings=True)
        lora = make_run(tmp_path / "run", tmp_path / "base", PLACEMENTS["all_layer"])
        monkeypatch.setattr(base_files, "_SHARD_BYTES", 100_000)
        code, _, errors = export(
            "--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged"
        )
        assert code == 0, errors
        shards = list((tmp_path / "merged").glob("model-*.safetensors"))
        assert len(shards) > 3
        assert max(shard.stat().st_size for shard in shards) < 110_000
        spec, frozen = load(tmp_path / "base", PLACEMENTS["all_layer"])
        theirs = torch_logits(Qwen3ForCausalLM.from_pretrained(tmp_path / "merged").eval())
        assert relative_error(our_logits(spec, lora, frozen), theirs) < 1e-4

    def test_a_bfloat16_base_is_summed_in_float32_and_rounded_once(self, tmp_path, export):
        base = tmp_path / "base"
        make_checkpoint(base, dtype=torch.bfloat16)
        lora = make_run(tmp_path / "run", base, PLACEMENTS["all_layer and head"])
        code, _, errors = export(
            "--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged"
        )
        assert code == 0, errors
        before = load_file(base / "model.safetensors")
        (file,) = (tmp_path / "merged").glob("*.safetensors")
        after = load_file(file)
        assert after.keys() == before.keys()
        assert {x.dtype for x in after.values()} == {np.dtype(ml_dtypes.bfloat16)}
        adapted, exact, naive = 0, 0, 0
        for key, weight in before.items():
            *parents, _ = key.removeprefix("model.").split(".")
            layer, path = (int(parents[1]), parents[2:]) if parents[0] == "layers" else (None, parents)
            pair = lora if layer is None else lora["layers"]
            for part in path:
                pair = pair.get(part, {})
            if not pair:
                np.testing.assert_array_equal(after[key], weight, err_msg=key)
                continue
            a, b = (np.asarray(pair[part], np.float64) for part in ("lora_a", "lora_b"))
            delta = 4 * (b @ a if layer is None else b[layer] @ a[layer])
            wanted = (weight.astype(np.float64) + delta).astype(np.float32).astype(ml_dtypes.bfloat16)
            adapted += weight.size
            exact += (after[key] == wanted).sum()
            naive += (weight + delta.astype(ml_dtypes.bfloat16) == wanted).sum()
        assert adapted == 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) + 160 * 64
        assert exact > 0.9995 * adapted  # the rest are ties of the last bit of a float32 sum
        assert naive < 0.95 * adapted  # the test would see a merge in bfloat16

    def test_the_checkpoint_is_merged_only_with_the_runs_own_base(self, base, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        make_checkpoint(tmp_path / "other", seed=9)
        words = ("--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged")
        code, _, errors = export(*words, "--base", tmp_path / "other")
        assert code == 2
        assert "not the base of this run" in errors
        assert not (tmp_path / "out").exists()
        base.rename(tmp_path / "moved")
        assert export(*words, "--base", tmp_path / "moved")[0] == 0

    def test_one_folder_cannot_be_both(self, base, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        same = ("--out", tmp_path / "x", "--merged", tmp_path / "run" / ".." / "x")
        code, _, errors = export("--run", tmp_path / "run", *same, "--overwrite")
        assert (code, "give two folders" in errors) == (2, True)
        assert not (tmp_path / "x").exists()

    def test_a_base_of_random_weights_cannot_be_merged_with(self, base, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"], random_weights=True)
        code, _, errors = export(
            "--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged"
        )
        assert code == 2
        assert "nothing to merge with" in errors
        assert export("--run", tmp_path / "run", "--out", tmp_path / "out")[0] == 0
        assert read_adapter(tmp_path / "out", load_model_config(base))[2]["seed"] == 4
