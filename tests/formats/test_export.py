"""A finished run is handed on: as the adapter it selected, and as a merged checkpoint; nothing else is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.adapters import PLACEMENTS, load, our_logits, relative_error, torch_logits, trained_lora
from helpers.hf_models import make_checkpoint, our_model
from safetensors.numpy import load_file
from transformers import Qwen3ForCausalLM

from jaxlora.checkpoints import base as base_files
from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import MeshConfig, ModelSource, RunConfig, to_dict
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.runtime.folders import claimed
from jaxlora.runtime.remote import embedded_path
from jaxlora.sharding import make_mesh


def make_run(folder, base, placement, seed=4, ships=True, **model):
    """What a finished run leaves behind, and its adapter."""
    source = ModelSource(path=str(base), dtype="float32", **model)
    config = RunConfig(prefix="made-up", seed=seed, lora=placement, model=source)
    spec = ModelSpec(load_model_config(base), placement, "float32")
    lora = trained_lora(spec, seed)
    run_id = config.run_id
    found = base_files.find_base(source, seed)
    manifest = {"run_id": run_id, "config": to_dict(config), "base": {"fingerprint": found.fingerprint()}}
    has_tokenizer = source.tokenizer or (base / "tokenizer_config.json").exists()
    tokenizer = found.tokenizer_folder() if has_tokenizer else None
    if tokenizer is not None:
        sha256 = base_files.tokenizer_sha256(tokenizer)
        manifest["tokenizer"] = {"path": source.tokenizer, "sha256": sha256}
    export_adapter(
        folder / "selected",
        spec,
        lora,
        str(base),
        seed=seed,
        extra={"run_id": run_id, "step": 30},
        tokenizer=tokenizer if ships else None,
        base_fingerprint=found.fingerprint(),
    )
    write(folder / "manifest.json", manifest)
    write(folder / "summary.json", {"run_id": run_id, "status": "completed", "selected_step": 30})
    return lora


def with_tokenizer(folder, more=""):
    """The shipped tokenizer, with this behind its chat template."""
    folder.mkdir(exist_ok=True)
    shutil.copy(embedded_path("base") / "tokenizer.json", folder)
    settings = json.loads((embedded_path("base") / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", settings | {"chat_template": settings["chat_template"] + more})
    return folder


def write(file, value):
    file.write_text(json.dumps(value))


def change(file, **values):
    write(file, json.loads(file.read_text()) | values)


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
        assert {path.name for path in out.iterdir()} == names | {"README.md"}
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

    def test_an_unfinished_run_is_named_as_such(self, base, tmp_path, export):
        run = tmp_path / "run"
        make_run(run, base, PLACEMENTS["attention_only"])
        (run / "summary.json").unlink()
        code, _, errors = export("--run", run, "--out", tmp_path / "out")
        assert (code, errors.count("\n")) == (2, 1)
        assert "is not finished (no summary.json); resume it with its own command" in errors

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

    def test_a_base_whose_bytes_have_changed_is_not_merged_with(self, tmp_path, export):
        base = tmp_path / "base"
        make_checkpoint(base, vocab_size=3000)
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        found = base_files.find_base(ModelSource(path=str(base)))
        found.load(ModelSpec(found.config), make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
        change(tmp_path / "run" / "summary.json", base_weights_sha256=found.weights_sha256)
        words = ("--run", tmp_path / "run", "--merged", tmp_path / "merged", "--out")
        assert export(*words, tmp_path / "first")[0] == 0
        shutil.rmtree(tmp_path / "merged")
        content = bytearray((base / "model.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (base / "model.safetensors").write_bytes(content)
        code, _, errors = export(*words, tmp_path / "second")
        assert (code, "its weights are not those of the run" in errors) == (2, True)
        assert not (tmp_path / "merged").exists()

    def test_of_the_bases_folder_only_what_belongs_to_a_model_is_copied(self, base, tmp_path, export):
        """PEFT's settings beside merged weights would have Transformers look for an adapter."""
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        write(base / "generation_config.json", {"eos_token_id": [1, 2]})
        write(base / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "elsewhere"})
        for name in (
            "README.md",
            "trainer_state.json",
            "notes.txt",
            "training_args.bin",
            "optimizer.pt",
            ".env",
        ):
            (base / name).write_text("{}")
        words = ("--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged")
        assert export(*words)[0] == 0
        weights = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
        names = {path.name for path in (tmp_path / "merged").iterdir()}
        assert names == weights | {"config.json", "generation_config.json", "README.md"}
        assert (tmp_path / "merged" / "README.md").read_text().startswith("---\nlicense")  # not the base's
        Qwen3ForCausalLM.from_pretrained(tmp_path / "merged")

    def test_a_file_of_the_base_that_is_a_link_out_of_it_is_not_copied(self, base, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        (tmp_path / "private").write_text("{}")
        (base / "generation_config.json").unlink()
        (base / "generation_config.json").symlink_to(tmp_path / "private")
        words = ("--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged")
        code, _, errors = export(*words)
        assert (code, "is a link that leads out of its folder" in errors) == (2, True)
        assert not (tmp_path / "merged").exists()

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_files_have_the_mode_that_the_users_umask_asks_for(self, base, tmp_path, export, umask, mode):
        before = os.umask(umask)
        try:
            make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
            words = ("--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged")
            assert export(*words)[0] == 0
        finally:
            os.umask(before)
        files = [path for name in ("out", "merged") for path in (tmp_path / name).iterdir()]
        assert len(files) > 5
        assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(mode)}


class TestKilled:
    """What a dead process left beside a product is removed by the next one, and never in the way."""

    @pytest.mark.parametrize("left", [".merged.4321.partial", ".merged.replaced", ".merged.lock"])
    def test_the_command_works_again_and_nothing_is_left(self, base, tmp_path, export, left):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        if left.endswith(".lock"):
            (tmp_path / left).touch()
        else:
            (tmp_path / left).mkdir()
            (tmp_path / left / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
        words = ("--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged")
        code, _, errors = export(*words)
        if left.endswith(".replaced"):  # an older product, moved aside and not yet replaced: it is put back
            assert (code, "exists already" in errors) == (2, True)
            assert [path.name for path in (tmp_path / "merged").iterdir()] == [
                "model-00001-of-00002.safetensors"
            ]
        else:
            assert code == 0, errors
            Qwen3ForCausalLM.from_pretrained(tmp_path / "merged")
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_a_process_killed_while_it_writes_leaves_nothing_for_good(self, base, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        words = ("--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged")
        child = os.fork()
        if not child:  # killed as soon as the first shard is on the disk
            save_file = base_files.save_file

            def save_and_die(*arguments, **options):
                save_file(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            base_files.save_file = save_and_die
            try:
                spec, frozen = our_model(base, scan=False)
                base_files.save_model(tmp_path / "merged", spec, frozen, base)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert list(tmp_path.glob(".merged.*.partial/*.safetensors"))
        code, _, errors = export(*words)
        assert code == 0, errors
        assert {path.name for path in tmp_path.iterdir()} == {"base", "run", "out", "merged"}

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, base, tmp_path, export, monkeypatch):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])

        def full(tensors, path, **options):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(base_files, "save_file", full)
        words = ("--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged")
        code, _, errors = export(*words)
        assert code == 1
        last = errors.splitlines()[-1]
        assert last == f"error: {tmp_path / 'merged'}: no space left on the disk; free some and start again"
        assert "Traceback" not in errors
        assert {path.name for path in tmp_path.iterdir()} == {"base", "run", "out"}

    def test_of_two_at_once_the_second_is_refused(self, base, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        with claimed(tmp_path / "out"):
            (tmp_path / ".out.77.partial").mkdir()  # the first one's work
            code, _, errors = export("--run", tmp_path / "run", "--out", tmp_path / "out")
            assert (code, "another process is writing it" in errors) == (2, True)
            assert (tmp_path / ".out.77.partial").is_dir()
        assert not (tmp_path / "out").exists()


class TestTokenizer:
    """An export ships the tokenizer and template that rendered the run's rows, and no other."""

    @pytest.fixture
    def base(self, tmp_path):
        make_checkpoint(tmp_path / "base", vocab_size=1024)
        return with_tokenizer(tmp_path / "base")

    @pytest.fixture
    def other(self, tmp_path):
        return with_tokenizer(tmp_path / "other", " ")

    @pytest.mark.parametrize("ships", [True, False])
    def test_adapter_and_merged_model_ship_the_runs_tokenizer(self, base, other, tmp_path, export, ships):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"], ships=ships, tokenizer=str(other))
        if ships:
            shutil.rmtree(other)  # the run has kept its own copy
        words = ("--run", tmp_path / "run", "--out", tmp_path / "out", "--merged", tmp_path / "merged")
        code, printed, errors = export(*words)
        assert code == 0, errors
        expected = json.loads((tmp_path / "run" / "manifest.json").read_text())["tokenizer"]["sha256"]
        for folder in (tmp_path / "out", tmp_path / "merged"):
            assert base_files.tokenizer_sha256(folder) == expected != base_files.tokenizer_sha256(base)
        assert json.loads((tmp_path / "out" / "jaxlora.json").read_text())["tokenizer_sha256"] == expected
        assert "tokenizer " in printed

    def test_the_bases_own_tokenizer_is_shipped_where_it_rendered_the_rows(self, base, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"])
        assert export("--run", tmp_path / "run", "--out", tmp_path / "out")[0] == 0
        assert base_files.tokenizer_sha256(tmp_path / "out") == base_files.tokenizer_sha256(base)

    def test_another_template_than_the_runs_is_not_shipped(self, base, other, tmp_path, export):
        make_run(tmp_path / "run", base, PLACEMENTS["attention_only"], ships=False, tokenizer=str(other))
        kept = shutil.copytree(other, tmp_path / "kept")
        with_tokenizer(other, "  ")
        words = ("--run", tmp_path / "run", "--out", tmp_path / "out")
        code, _, errors = export(*words)
        assert code == 2
        assert "rendered with a different tokenizer or chat template than" in errors
        assert "give --tokenizer" in errors
        assert not (tmp_path / "out").exists()
        assert export(*words, "--tokenizer", kept)[0] == 0
