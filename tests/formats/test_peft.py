"""Adapters go to PEFT and come back unchanged, and whatever would be applied in part is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.adapters import PLACEMENTS, load, our_logits, relative_error, torch_logits, trained_lora
from helpers.hf_models import make_checkpoint
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import Qwen3ForCausalLM

from jaxlora.checkpoints import peft as peft_module
from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import LoraConfig, MeshConfig, OptimConfig
from jaxlora.data.packing import pack
from jaxlora.data.render import RenderedRow
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import get_path, lora_shapes, merge_lora, set_path
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config, published_config
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import SHARD_LORA_FROM_RANK, make_mesh, place_trained
from jaxlora.train.step import Compute, init_state, make_train_step

BAR = 1e-4  # relative error of float32 logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small checkpoint with an untied head."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """Our all_layer adapter with the head, to be broken."""
    spec = ModelSpec(load_model_config(base), PLACEMENTS["all_layer and head"], "float32")
    export_adapter(tmp_path / "adapter", spec, trained_lora(spec), "base", seed=3, extra={"step": 7})
    return tmp_path / "adapter"


def change_settings(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


def assert_same_tree(ours, theirs):
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


class TestFormat:
    @pytest.mark.parametrize(
        ("condition", "size", "tensors"),
        [("attention_only", 30_709_160, 288), ("all_layer", 87_360_552, 504)],
    )
    def test_qwen3_8b_files_have_the_studys_exact_sizes(self, tmp_path, condition, size, tensors):
        spec = ModelSpec(published_config("qwen3-8b"), LoraConfig(targets=condition))
        lora: dict = {}
        for weight in spec.adapted:
            a, b = (np.zeros(shape, np.float32) for shape in lora_shapes(spec, weight))
            set_path(lora, weight.path, {"lora_a": a, "lora_b": b})
        export_adapter(tmp_path / "out", spec, lora, "Qwen/Qwen3-8B")
        file = tmp_path / "out" / "adapter_model.safetensors"
        assert file.stat().st_size == size
        with safe_open(file, framework="np") as handle:
            assert handle.metadata() is None
            assert len(handle.keys()) == tensors
            assert {handle.get_slice(key).get_dtype() for key in handle.keys()} == {"F32"}  # noqa: SIM118
            assert "base_model.model.model.layers.35.self_attn.q_proj.lora_A.weight" in handle.keys()  # noqa: SIM118

    def test_each_tensor_is_the_layers_own(self, base, adapter):
        spec = ModelSpec(load_model_config(base), PLACEMENTS["all_layer and head"], "float32")
        lora = trained_lora(spec)
        tensors = load_file(adapter / "adapter_model.safetensors")
        key = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
        np.testing.assert_array_equal(tensors.pop(key), lora["layers"]["mlp"]["down_proj"]["lora_b"][2])
        key = "base_model.model.lm_head.lora_A.weight"
        np.testing.assert_array_equal(tensors.pop(key), lora["lm_head"]["lora_a"])
        assert len(tensors) == 3 * 7 * 2 + 2 - 2

    def test_settings_and_metadata_say_what_the_adapter_is(self, adapter):
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA"
        assert settings["task_type"] == "CAUSAL_LM"
        assert settings["base_model_name_or_path"] == "base"
        assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (8, 32, "none")
        assert isinstance(settings["lora_alpha"], int)
        names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
        assert set(settings["target_modules"]) == names
        own = json.loads((adapter / "jaxlora.json").read_text())
        assert own == {
            "condition": "all_layer",
            "output_head": True,
            "seed": 3,
            "rank": 8,
            "alpha": 32,
            "step": 7,
        }

    def test_export_and_import_return_every_bit(self, base, adapter):
        config = load_model_config(base)
        lora_config, lora, metadata, _ = read_adapter(adapter, config)
        assert lora_config == PLACEMENTS["all_layer and head"]
        assert_same_tree(lora, trained_lora(ModelSpec(config, lora_config, "float32")))
        assert metadata == {
            "condition": "all_layer",
            "output_head": True,
            "seed": 3,
            "rank": 8,
            "alpha": 32,
            "step": 7,
            "base_model": "base",
        }


class TestWriting:
    def export(self, base, out, lora=None, **options):
        spec = ModelSpec(load_model_config(base), PLACEMENTS["attention_only"], "float32")
        export_adapter(out, spec, trained_lora(spec) if lora is None else lora, "base", **options)

    def test_an_adapter_spread_over_devices_is_written_whole(self, base, tmp_path):
        lora_config = LoraConfig(targets="attention_only", rank=SHARD_LORA_FROM_RANK)
        spec = ModelSpec(load_model_config(base), lora_config, "float32")
        lora = trained_lora(spec)
        spread = place_trained(make_mesh(MeshConfig(data=1, fsdp=8, tensor=1)), spec, lora)
        assert not spread["layers"]["self_attn"]["q_proj"]["lora_a"].is_fully_replicated
        export_adapter(tmp_path / "spread", spec, spread, "base")
        export_adapter(tmp_path / "whole", spec, lora, "base")
        files = [tmp_path / name / "adapter_model.safetensors" for name in ("spread", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_an_existing_folder_is_kept_unless_asked(self, base, tmp_path):
        out = tmp_path / "out"
        self.export(base, out, seed=1)
        with pytest.raises(UserError, match="exists already"):
            self.export(base, out, seed=2)
        assert json.loads((out / "jaxlora.json").read_text())["seed"] == 1
        self.export(base, out, seed=2, overwrite=True)
        assert json.loads((out / "jaxlora.json").read_text())["seed"] == 2
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_overwriting_never_deletes_a_folder_that_is_no_adapter(self, base, tmp_path):
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(UserError, match="holds no adapter"):
            self.export(base, tmp_path, overwrite=True)
        assert (tmp_path / "thesis.txt").read_text() == "precious"

    def test_a_failure_half_way_leaves_nothing_behind(self, base, tmp_path, monkeypatch):
        def full(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr(peft_module, "write_json_atomic", full)
        with pytest.raises(OSError, match="no space"):
            self.export(base, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_diverged_or_foreign_adapter_is_not_written(self, base, tmp_path):
        spec = ModelSpec(load_model_config(base), PLACEMENTS["attention_only"], "float32")
        lora = trained_lora(spec)
        lora["layers"]["self_attn"]["k_proj"]["lora_b"] *= np.nan
        with pytest.raises(UserError, match=r"k_proj.lora_b holds NaN"):
            self.export(base, tmp_path / "out", lora)
        other = ModelSpec(spec.config, PLACEMENTS["all_layer"], "float32")
        with pytest.raises(UserError, match="unexpected"):
            self.export(base, tmp_path / "out", trained_lora(other))
        assert list(tmp_path.iterdir()) == []


class TestPeftLoadsOurs:
    @pytest.mark.parametrize("name", PLACEMENTS)
    def test_no_key_is_missing_or_unexpected_and_logits_are_equal(self, base, tmp_path, name):
        spec, frozen = load(base, PLACEMENTS[name])
        lora = trained_lora(spec)
        export_adapter(tmp_path / "adapter", spec, lora, str(base))
        reference = Qwen3ForCausalLM.from_pretrained(base)
        plain = torch_logits(reference)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
            model = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        result = model.load_adapter(tmp_path / "adapter", "again")
        assert result.missing_keys == result.unexpected_keys == []
        n_lora = sum(1 for key in model.state_dict() if "lora_" in key and ".default." in key)
        assert n_lora == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
        theirs = torch_logits(model)
        assert relative_error(our_logits(spec, lora, frozen), theirs) < BAR
        assert relative_error(plain, theirs) > 100 * BAR  # the adapter does something

    def test_alpha_and_rank_reach_peft(self, base, tmp_path):
        spec, frozen = load(base, LoraConfig(targets="mlp_only", rank=3, alpha=7.5))
        lora = trained_lora(spec)
        export_adapter(tmp_path / "adapter", spec, lora, str(base))
        model = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
        assert relative_error(our_logits(spec, lora, frozen), torch_logits(model)) < BAR


def peft_adapter(base, folder, targets, **settings):
    """An adapter made, randomised and saved by PEFT; returns its logits."""
    settings = {"r": 8, "lora_alpha": 32, "init_lora_weights": False} | settings  # False: B is random too
    model = get_peft_model(
        Qwen3ForCausalLM.from_pretrained(base), PeftConfig(target_modules=targets, **settings)
    )
    model.save_pretrained(folder, save_embedding_layers=False)
    return torch_logits(model.eval())


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


class TestWeLoadPefts:
    @pytest.mark.parametrize(
        ("targets", "placement", "settings"),
        [
            (ATTENTION, LoraConfig(targets="attention_only"), {}),
            (MLP, LoraConfig(targets="mlp_only", rank=4, alpha=6.5), {"r": 4, "lora_alpha": 6.5}),
            (
                "all-linear",
                LoraConfig(targets="all_layer"),
                {"task_type": "CAUSAL_LM", "lora_dropout": 0.1},
            ),
            ([*ATTENTION, *MLP, "lm_head"], LoraConfig(targets="all_layer", output_head=True), {}),
            (r".*self_attn\.[qkvo]_proj", LoraConfig(targets="attention_only"), {}),
            (ATTENTION, LoraConfig(targets="attention_only", alpha=32 * 8**0.5), {"use_rslora": True}),
        ],
        ids=["attention", "mlp", "all-linear", "head", "pattern", "rslora"],
    )
    def test_logits_are_equal(self, base, tmp_path, targets, placement, settings):
        theirs = peft_adapter(base, tmp_path / "adapter", targets, **settings)
        lora_config, lora, metadata, _ = read_adapter(tmp_path / "adapter", load_model_config(base))
        assert lora_config == placement
        assert (metadata["condition"], metadata["seed"]) == (placement.condition, None)
        assert metadata["base_model"] == str(base)
        spec, frozen = load(base, lora_config)
        assert relative_error(our_logits(spec, lora, frozen), theirs) < BAR

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_half_precision_becomes_float32_exactly(self, base, adapter, dtype):
        change_tensors(adapter, lambda tensors: {key: array.astype(dtype) for key, array in tensors.items()})
        config = load_model_config(base)
        lora_config, lora, _, _ = read_adapter(adapter, config)
        exact = trained_lora(ModelSpec(config, lora_config, "float32"))
        rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), exact)
        assert {x.dtype for x in jax.tree.leaves(lora)} == {np.dtype("float32")}
        assert_same_tree(lora, rounded)

    @pytest.mark.parametrize("targets", [None, "all-linear"])
    @pytest.mark.parametrize("prefix", ["base_model.model.", ""])
    def test_tinkers_names_are_read(self, base, adapter, targets, prefix):
        def rename(key):
            key = key.replace("base_model.model.lm_head", "base_model.model.model.unembed_tokens")
            return prefix + key.removeprefix("base_model.model.")

        config = load_model_config(base)
        _, ours, _, _ = read_adapter(adapter, config)
        change_tensors(adapter, lambda tensors: {rename(key): array for key, array in tensors.items()})
        change_settings(adapter, target_modules=targets)
        (adapter / "jaxlora.json").unlink()
        lora_config, lora, metadata, _ = read_adapter(adapter, config)
        assert lora_config == PLACEMENTS["all_layer and head"]
        assert metadata["seed"] is None
        assert_same_tree(lora, ours)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def with_tensor(key, array):
    return lambda tensors: tensors | {key: np.asarray(array, np.float32)}


def without(part):
    return lambda tensors: {key: array for key, array in tensors.items() if part not in key}


class TestAdaptersOfAnyShape:
    """What PEFT can make of plain LoRA is read, merged, exported again and trained further."""

    CASES: ClassVar[dict[str, tuple]] = {
        "PEFT's default targets": (["q_proj", "v_proj"], {}),
        "one module": (["down_proj"], {"r": 3}),
        "a subset of layers": (ATTENTION, {"layers_to_transform": [0, 2]}),
        "one layer": (MLP, {"layers_to_transform": 1, "layers_pattern": "layers"}),
        "ranks and alphas of their own": (
            [*ATTENTION, *MLP],
            {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 12}, "alpha_pattern": {"k_proj": 5.0}},
        ),
        "rank-stabilised, ranks of their own": (
            ["q_proj", "up_proj"],
            {"use_rslora": True, "rank_pattern": {"up_proj": 2}},
        ),
        "a pattern over some layers": (r".*layers\.[01]\.self_attn\.[qv]_proj", {}),
        "all but one": ("all-linear", {"task_type": "CAUSAL_LM", "exclude_modules": ["o_proj"]}),
        "the head alone": (["lm_head"], {}),
    }

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_logits_are_equal_merged_and_exported_again(self, base, tmp_path, case):
        targets, settings = self.CASES[case]
        theirs = peft_adapter(base, tmp_path / "adapter", targets, **settings)
        adapter = read_adapter(tmp_path / "adapter", load_model_config(base))
        spec = ModelSpec(load_model_config(base), adapter.lora, "float32", shapes=adapter.shapes)
        _, frozen = load(base, adapter.lora)
        assert relative_error(our_logits(spec, adapter.tree, frozen), theirs) < BAR
        merged = merge_lora(spec, adapter.tree, frozen)
        plain = ModelSpec(spec.config, None, "float32")
        assert relative_error(our_logits(plain, {}, merged), theirs) < BAR

        export_adapter(tmp_path / "again", spec, adapter.tree, str(base))
        model = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), tmp_path / "again").eval()
        assert relative_error(torch_logits(model), theirs) < BAR
        back = read_adapter(tmp_path / "again", spec.config)
        spec = replace(spec, lora=back.lora, shapes=back.shapes)
        assert relative_error(our_logits(spec, back.tree, frozen), theirs) < BAR

    def test_what_a_layer_lacks_stays_zero_in_training(self, base, tmp_path):
        peft_adapter(base, tmp_path / "adapter", ["q_proj"], layers_to_transform=[0], rank_pattern={})
        adapter = read_adapter(tmp_path / "adapter", load_model_config(base))
        spec = ModelSpec(load_model_config(base), adapter.lora, "float32", shapes=adapter.shapes)
        _, frozen = load(base, adapter.lora)
        rng = np.random.default_rng(0)
        row = RenderedRow("a", rng.integers(0, 160, 30).astype(np.int32), np.ones(30, np.float32))
        step = make_train_step(spec, OptimConfig(), Compute())
        state = init_state(jax.tree.map(jnp.array, adapter.tree), OptimConfig())
        for _ in range(3):
            state, _ = step(state, frozen, pack([row], (32,), 32), jnp.float32(1e-2))
        before, after = (tree["layers"]["self_attn"]["q_proj"] for tree in (adapter.tree, state.trained))
        for name in ("lora_a", "lora_b"):
            assert not np.any(after[name][1:])
            assert np.all(np.any(np.asarray(before[name][0]) != np.asarray(after[name][0]), axis=-1))

    def test_copies_of_the_bases_weights_are_compared_with_it(self, base, adapter):
        config = load_model_config(base)
        embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        key = "base_model.model.model.embed_tokens.weight"
        change_tensors(adapter, with_tensor(key, embedding))
        read_adapter(adapter, config, base)
        with pytest.raises(UserError, match="save_embedding_layers=False"):
            read_adapter(adapter, config)
        change_tensors(adapter, with_tensor(key, embedding + 1))
        with pytest.raises(UserError, match="this adapter belongs to another base"):
            read_adapter(adapter, config, base)

    @pytest.mark.parametrize("pattern", ["(a+)+$", "(", "x" * 2000, r"(q|k)*_proj"])
    def test_a_pattern_that_could_take_for_ever_is_refused(self, base, adapter, pattern):
        change_settings(adapter, target_modules=pattern)
        with pytest.raises(UserError, match=r"the pattern .* cannot be used"):
            read_adapter(adapter, load_model_config(base))

    def test_a_pattern_that_means_less_than_the_tensors_is_refused(self, base, adapter):
        change_settings(adapter, target_modules=r".*layers\.0\..*_proj|lm_head")
        with pytest.raises(UserError, match=r"target_modules and the tensors of .* disagree about q_proj"):
            read_adapter(adapter, load_model_config(base))


class TestRefusals:
    @pytest.mark.parametrize(
        "settings",
        [
            {"peft_type": "LOHA"},
            {"use_dora": True},
            {"rank_pattern": {"q_proj": 4}},
            {"bias": "all"},
            {"modules_to_save": ["lm_head"]},
            {"fan_in_fan_out": True},
            {"layers_to_transform": [0, 1]},
            {"layer_replication": [[0, 2]]},
            {"trainable_token_indices": [1]},
            {"lora_bias": True},
            {"a_feature_of_tomorrow": True},
            {"init_lora_weights": "pissa"},
            {"r": 0},
            {"r": True},
            {"r": "8"},
            {"r": 10**9},
            {"r": None},
            {"lora_alpha": 0},
            {"lora_alpha": -1},
            {"lora_alpha": float("nan")},
            {"lora_alpha": float("inf")},
            {"lora_alpha": 1e300},
            {"lora_alpha": None},
            {"target_modules": ["q_proj", "v_proj"]},
        ],
        ids=str,
    )
    def test_settings_that_we_do_not_compute(self, base, adapter, settings):
        change_settings(adapter, **settings)
        (name,) = settings
        with pytest.raises(UserError, match=name) as error:
            read_adapter(adapter, load_model_config(base))
        assert "\n" not in str(error.value)
        assert str(adapter) in str(error.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (with_tensor("base_model.model.model.norm.weight", [1.0]), "do not belong to this model"),
            (with_tensor(KEY.replace("layers.1", "layers.3"), np.zeros((8, 64))), "it has 3 layers"),
            (
                with_tensor(KEY.replace("layers.1", "layers.01"), np.zeros((8, 64))),
                "do not belong to this model",
            ),
            (
                with_tensor(KEY.replace("lora_A", "lora_A.default"), np.zeros((8, 64))),
                "do not belong to this model",
            ),
            (with_tensor("base_model.model.lm_head.base_layer.weight", [1.0]), "save_embedding_layers=False"),
            (with_tensor(KEY.removeprefix("base_model.model."), np.zeros((8, 64))), "stored twice"),
            (with_tensor("model.unembed_tokens.lora_A.weight", np.zeros((8, 64))), "stored twice"),
            (without("layers.1."), "14 tensors are missing"),
            (without(KEY), "1 tensors are missing"),
            (without("v_proj"), "target_modules and the tensors of .* disagree about v_proj"),
            (without("layers"), "target_modules and the tensors of .* disagree about .*q_proj"),
            (without(""), "adapts nothing"),
            (with_tensor(KEY, np.zeros((4, 64))), r"has shape \(4, 64\).* \(8, 64\)"),
            (with_tensor(KEY, np.zeros((64, 8))), r"has shape \(64, 8\)"),
            (with_tensor(KEY, np.zeros((8, 65))), r"has shape \(8, 65\)"),
            (with_tensor(KEY, np.zeros(512)), r"has shape \(512,\)"),
            (with_tensor(KEY, np.full((8, 64), np.nan)), "holds NaN or infinity"),
            (with_tensor(KEY, np.full((8, 64), -np.inf)), "holds NaN or infinity"),
            (lambda tensors: tensors | {KEY: np.zeros((8, 64), np.int8)}, "is I8"),
        ],
    )
    def test_tensors_that_do_not_fit(self, base, adapter, change, message):
        change_tensors(adapter, change)
        with pytest.raises(UserError, match=message) as error:
            read_adapter(adapter, load_model_config(base))
        assert "\n" not in str(error.value)

    def test_another_rank_in_all_tensors(self, base, adapter):
        change_settings(adapter, r=4)
        with pytest.raises(UserError, match=r"r and config\.json ask for"):
            read_adapter(adapter, load_model_config(base))

    def test_an_adapter_of_another_base(self, adapter):
        with pytest.raises(UserError, match="tensors are missing"):
            read_adapter(adapter, published_config("qwen3-8b"))

    @pytest.mark.parametrize("metadata", [{"condition": "mlp_only"}, {"rank": 4}, {"alpha": 1}, {"seed": -1}])
    def test_metadata_that_contradicts_the_tensors(self, base, adapter, metadata):
        file = adapter / "jaxlora.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | metadata))
        with pytest.raises(UserError, match=next(iter(metadata))):
            read_adapter(adapter, load_model_config(base))

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "jaxlora.json"])
    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"\xff" * 64], ids=repr
    )
    def test_broken_files(self, base, adapter, name, content):
        (adapter / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as error:
            read_adapter(adapter, load_model_config(base))
        assert len(str(error.value)) < 500

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_missing_and_truncated_files(self, base, adapter, name):
        file = adapter / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=name):
            read_adapter(adapter, load_model_config(base))
        file.unlink()
        with pytest.raises(UserError, match=f"{name}: missing"):
            read_adapter(adapter, load_model_config(base))
        with pytest.raises(UserError, match="no such folder"):
            read_adapter(adapter / "elsewhere", load_model_config(base))


def test_import_gives_the_tree_of_the_placement_for_every_placement(base, tmp_path):
    config = load_model_config(base)
    for i, placement in enumerate(PLACEMENTS.values()):
        spec = ModelSpec(config, placement, "float32")
        lora = trained_lora(spec, seed=i)
        export_adapter(tmp_path / str(i), spec, lora, "base", seed=i)
        found, again, metadata, _ = read_adapter(tmp_path / str(i), config)
        assert (found, metadata["seed"]) == (placement, i)
        assert_same_tree(again, lora)
        assert get_path(again, spec.adapted[0].path)["lora_a"].shape == lora_shapes(spec, spec.adapted[0])[0]


class TestATiedHead:
    """An adapter on it is one of the output use alone: what PEFT makes of `lm_head` in a tied model."""

    def tied(self, folder):
        make_checkpoint(folder, num_hidden_layers=2, tie_word_embeddings=True)
        return folder

    def test_logits_are_those_of_peft_and_go_both_ways(self, tmp_path):
        base = self.tied(tmp_path / "base")
        theirs = peft_adapter(base, tmp_path / "adapter", ["q_proj", "lm_head"])
        lora_config, lora, _, _ = read_adapter(tmp_path / "adapter", load_model_config(base))
        assert lora_config.output_head
        spec, frozen = load(base, lora_config)
        assert relative_error(our_logits(spec, lora, frozen), theirs) < BAR
        export_adapter(tmp_path / "ours", spec, lora, str(base))
        model = Qwen3ForCausalLM.from_pretrained(base)
        assert relative_error(torch_logits(PeftModel.from_pretrained(model, tmp_path / "ours")), theirs) < BAR

    def test_decoding_keeps_it_beside_the_weights_and_merging_refuses(self, tmp_path):
        spec, frozen = load(self.tied(tmp_path), LoraConfig(targets="q_proj", output_head=True))
        lora = trained_lora(spec)
        form, kept, weights, _ = decode_weights(spec, lora, frozen, merge=True)
        wanted = our_logits(spec, lora, frozen)
        assert relative_error(our_logits(form, kept, weights), wanted) < BAR
        without = jax.tree.map(lambda x: x, lora)
        without["lm_head"] = jax.tree.map(jnp.zeros_like, lora["lm_head"])
        assert relative_error(our_logits(spec, without, frozen), wanted) > 0.01
        with pytest.raises(UserError, match="cannot be merged where the head is tied"):
            merge_lora(spec, lora, frozen)
