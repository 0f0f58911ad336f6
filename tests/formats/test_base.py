"""The base: which of its files are loaded, what tells it from another, and its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.adapters import our_logits, relative_error, torch_logits
from helpers.hf_models import make_checkpoint, our_model
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from jaxlora.checkpoints.base import find_base, fingerprint, save_model, tokenizer_sha256
from jaxlora.config import MeshConfig, ModelSource
from jaxlora.data.render import load_tokenizer
from jaxlora.models.decoder import ModelSpec
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console
from jaxlora.runtime.remote import embedded_path
from jaxlora.sharding import make_mesh

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def of(folder, **source):
    return find_base(ModelSource(path=str(folder), dtype="float32", **source))


def loaded(folder, mesh=None, **options):
    base = of(folder)
    mesh = mesh or make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    base.load(ModelSpec(base.config, None, "float32"), mesh, **options)
    return base


class TestFiles:
    def assert_as_transformers(self, folder):
        spec, frozen = our_model(folder)
        theirs = torch_logits(Qwen3ForCausalLM.from_pretrained(folder).eval())
        assert relative_error(our_logits(spec, {}, frozen), theirs) < 1e-4

    def test_a_single_file_wins_over_an_index_as_in_transformers(self, tmp_path):
        """Old shards lie beside a newer single file."""
        make_checkpoint(tmp_path / "a", seed=1, shards=3)
        make_checkpoint(tmp_path / "b", seed=2)
        shutil.copy(tmp_path / "b" / SINGLE, tmp_path / "a" / SINGLE)
        with console.capture() as said:
            self.assert_as_transformers(tmp_path / "a")
        assert f"loading {SINGLE}; ignoring {INDEX} beside it" in " ".join(said.get().split())
        assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")  # of what is loaded

    def test_an_index_whose_files_are_gone_does_no_harm_beside_a_single_file(self, tmp_path):
        make_checkpoint(tmp_path, seed=1)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
        self.assert_as_transformers(tmp_path)

    def test_an_index_alone_names_the_missing_file(self, tmp_path):
        make_checkpoint(tmp_path, shards=3)
        gone = min(tmp_path.glob("model-*.safetensors"))
        gone.unlink()
        with pytest.raises(UserError, match=rf"{gone.name}: missing"):
            our_model(tmp_path)

    def test_a_tied_model_that_stores_only_its_head_loads(self, tmp_path):
        make_checkpoint(tmp_path / "whole", tie_word_embeddings=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "head")
        tensors = load_file(tmp_path / "head" / SINGLE)
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, tmp_path / "head" / SINGLE, metadata={"format": "pt"})
        spec, whole = our_model(tmp_path / "whole")
        _, head = our_model(tmp_path / "head")
        np.testing.assert_array_equal(our_logits(spec, {}, whole), our_logits(spec, {}, head))
        self.assert_as_transformers(tmp_path / "whole")

    def test_links_to_a_folder_that_the_machine_trusts_are_followed(self, tmp_path, monkeypatch):
        make_checkpoint(tmp_path / "store")
        base = tmp_path / "base"
        base.mkdir()
        for file in (tmp_path / "store").iterdir():
            (base / file.name).symlink_to(file)
        with pytest.raises(UserError, match=r"JAXLORA_TRUSTED_FOLDERS"):
            our_model(base)
        monkeypatch.setenv("JAXLORA_TRUSTED_FOLDERS", f"/nowhere:{tmp_path / 'store'}")
        our_model(base)
        monkeypatch.setenv("JAXLORA_TRUSTED_FOLDERS", "")
        with pytest.raises(UserError, match="is a link that leads out of its folder"):
            our_model(base)


class TestHashes:
    def test_two_flipped_bits_in_the_middle_of_a_file_are_seen_when_it_is_loaded(self, tmp_path):
        make_checkpoint(tmp_path, vocab_size=3000)
        before, base = fingerprint(tmp_path), loaded(tmp_path)
        content = bytearray((tmp_path / SINGLE).read_bytes())
        content[len(content) // 2] ^= 0b11
        (tmp_path / SINGLE).write_bytes(content)
        assert fingerprint(tmp_path) == before  # which looks at headers and ends only
        changed = loaded(tmp_path)
        assert changed.weights_sha256 != base.weights_sha256
        with pytest.raises(UserError, match=r"its weights are not those of the run .* fetch them again"):
            loaded(tmp_path, expected=base.weights_sha256)
        loaded(tmp_path, expected=changed.weights_sha256)

    def test_the_hash_is_the_weights_own(self, tmp_path):
        """Neither files nor devices nor the form of the layers make a difference to it."""
        make_checkpoint(tmp_path / "one")
        make_checkpoint(tmp_path / "many", shards=4)
        base = loaded(tmp_path / "one")
        assert len(base.weights_sha256) == 64
        found = {base.weights_sha256, loaded(tmp_path / "many").weights_sha256}
        for sizes in ((1, 8, 1), (2, 2, 2), (8, 1, 1)):
            mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))
            found.add(loaded(tmp_path / "many", mesh).weights_sha256)
        spec = ModelSpec(base.config, None, "bfloat16", scan=False)
        again = of(tmp_path / "one")
        again.load(spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
        assert found | {again.weights_sha256} == {base.weights_sha256}
        make_checkpoint(tmp_path / "other", seed=1)
        assert loaded(tmp_path / "other").weights_sha256 not in found

    def test_rows_read_in_parts_have_the_hash_of_the_whole(self, tmp_path, monkeypatch):
        make_checkpoint(tmp_path)
        expected = loaded(tmp_path).weights_sha256
        monkeypatch.setattr("jaxlora.checkpoints.tensors.WHOLE_BYTES", 1000)
        assert loaded(tmp_path, make_mesh(MeshConfig(fsdp=8))).weights_sha256 == expected

    def test_a_file_that_ends_early_is_an_error_and_no_endless_wait(self, tmp_path, monkeypatch):
        make_checkpoint(tmp_path)
        monkeypatch.setattr("jaxlora.checkpoints.tensors.WHOLE_BYTES", 1000)
        base = of(tmp_path)
        rows = "jaxlora.checkpoints.tensors.StoredTensor.rows"
        from jaxlora.checkpoints.tensors import StoredTensor

        read = StoredTensor.rows

        def fail(self, start, stop):
            if start:
                raise UserError(f"{self.file}: ends early")
            return read(self, start, stop)

        monkeypatch.setattr(rows, fail)
        with pytest.raises(UserError, match="ends early"):
            base.load(ModelSpec(base.config, None, "float32"), make_mesh(MeshConfig(fsdp=8)))

    def test_a_drawn_base_has_none(self, tmp_path):
        make_checkpoint(tmp_path)
        base = of(tmp_path, random_weights=True)
        base.load(ModelSpec(base.config, None, "float32"), make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
        assert base.weights_sha256 is None


def with_tokenizer(folder: Path, **settings) -> Path:
    """The shipped tokenizer, with these changes of its settings."""
    folder.mkdir(exist_ok=True, parents=True)
    shutil.copy(embedded_path("base") / "tokenizer.json", folder)
    values = json.loads((embedded_path("base") / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | settings))
    return folder


def template() -> str:
    return json.loads((embedded_path("base") / "tokenizer_config.json").read_text())["chat_template"]


class TestTokenizers:
    def test_a_copy_has_the_same_hash_however_it_is_written(self, tmp_path):
        ours = tokenizer_sha256("embedded:base")
        copy = with_tokenizer(tmp_path / "copy")
        assert tokenizer_sha256(copy) == tokenizer_sha256(load_tokenizer(copy)) == ours
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "chat_template.jinja").write_text(settings.pop("chat_template"))
        backwards = dict(reversed(settings.items()))
        (copy / "tokenizer_config.json").write_text(json.dumps(backwards, indent=7))
        assert tokenizer_sha256(copy) == ours

    @pytest.mark.parametrize("change", ["template", "settings", "tokens"])
    def test_whatever_renders_otherwise_has_another_hash(self, tmp_path, change):
        settings = {
            "template": {"chat_template": template() + " "},
            "settings": {"eos_token": "<|endoftext|>"},
        }
        other = with_tokenizer(tmp_path, **settings.get(change, {}))
        if change == "tokens":
            values = json.loads((other / "tokenizer.json").read_text())
            values["normalizer"] = {"type": "NFC"} if values["normalizer"] is None else None
            (other / "tokenizer.json").write_text(json.dumps(values))
        assert tokenizer_sha256(other) != tokenizer_sha256("embedded:base")

    def test_the_largest_id_counts_and_not_the_number_of_tokens(self, tmp_path):
        known = len(AutoTokenizer.from_pretrained(embedded_path("base")))
        make_checkpoint(tmp_path / "base", vocab_size=known, num_hidden_layers=1)
        folder = with_tokenizer(tmp_path / "tokenizer")
        of(tmp_path / "base", tokenizer=str(folder)).tokenizer()
        values = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = values["model"]["vocab"]
        special = {token["content"] for token in values["added_tokens"]}
        name = next(token for token in reversed(vocabulary) if token not in special)
        vocabulary[name] = known + 5  # the number of tokens stays
        (folder / "tokenizer.json").write_text(json.dumps(values))
        assert len(load_tokenizer(folder)) == known
        with pytest.raises(UserError, match=rf"ids up to {known + 5}, but the model has only {known} tokens"):
            of(tmp_path / "base", tokenizer=str(folder)).tokenizer()

    @pytest.mark.parametrize("name", ["embedded:base", "folder"])
    def test_a_full_checkpoint_ships_the_tokenizer_that_trained_it(self, tmp_path, name):
        make_checkpoint(tmp_path / "base", num_hidden_layers=1)
        with_tokenizer(tmp_path / "base", chat_template="the base's")
        with_tokenizer(tmp_path / "folder", chat_template=template() + " ")
        name = name if name == "embedded:base" else str(tmp_path / name)
        spec, frozen = our_model(tmp_path / "base", scan=False)
        save_model(tmp_path / "out", spec, frozen, tmp_path / "base", name)
        assert tokenizer_sha256(tmp_path / "out") == tokenizer_sha256(name)


class TestStopIds:
    """Whatever the model, its files or the template call the end of an answer ends one."""

    @pytest.fixture
    def base(self, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(embedded_path("base"))
        make_checkpoint(tmp_path, vocab_size=len(tokenizer) + 8, num_hidden_layers=1, eos_token_id=None)
        return with_tokenizer(tmp_path)

    def stops(self, folder):
        base = of(folder)
        return set(base.stop_ids(base.tokenizer()))

    def test_the_templates_end_of_turn_stops_whatever_the_tokenizer_says(self, base):
        """As base models have it: answers end with `<|im_end|>`, and the tokenizer's own end is another."""
        ids = AutoTokenizer.from_pretrained(embedded_path("base")).convert_tokens_to_ids
        end, text_end = ids("<|im_end|>"), ids("<|endoftext|>")
        with_tokenizer(base, eos_token="<|im_end|>")
        assert self.stops(base) == {end}
        with_tokenizer(base, eos_token="<|endoftext|>")
        assert self.stops(base) == {end, text_end}
        assert of(base).stop_ids(of(base).tokenizer())[0] == end

    def test_every_id_of_both_configurations_stops(self, base):
        before = self.stops(base)
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
        raw = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(raw | {"eos_token_id": [11, 13]}))
        assert self.stops(base) == before | {7, 9, 11, 13}
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 8}))
        assert self.stops(base) == before | {8, 11, 13}

    @pytest.mark.parametrize("eos", [10**6, -1, "7", [3, None, True], 1.5])
    def test_an_id_that_is_no_token_is_refused(self, base, eos):
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        with pytest.raises(UserError, match=r"eos_token_id .* is not a token of the model"):
            self.stops(base)
