"""Adapters and checkpoints of mixtures go to PEFT and Transformers and come back."""

from __future__ import annotations

import json
import warnings

import jax
import numpy as np
import pytest
import torch
from helpers.adapters import load, our_logits, relative_error, torch_logits, trained_lora
from helpers.hf_models import MIXTURES, make_checkpoint
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import load_hashed, save_model
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import LoraConfig, MeshConfig
from jaxlora.lora import merge_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh

TARGETS = ["all_layer", "mlp_only", "down_proj", "q_proj,gate_proj,up_proj"]


@pytest.fixture
def base(tmp_path):
    make_checkpoint(tmp_path / "base", family="qwen3_moe", num_hidden_layers=2, **MIXTURES["plain"])
    return tmp_path / "base"


def torch_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_computes_what_we_compute_with_our_adapter_and_we_read_it_back(tmp_path, base, targets):
    """Every expert and rank has numbers of its own, so that any other order of them shows."""
    spec, frozen = load(base, LoraConfig(targets=targets, rank=6, alpha=16))
    lora = trained_lora(spec)
    export_adapter(tmp_path / "ours", spec, lora, str(base))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        model = PeftModel.from_pretrained(torch_base(base), tmp_path / "ours").eval()
    ours = our_logits(spec, lora, frozen)
    assert relative_error(ours, torch_logits(model)) < 2e-5
    assert relative_error(ours, our_logits(ModelSpec(spec.config, None, "float32"), {}, frozen)) > 1e-2
    again = read_adapter(tmp_path / "ours", spec.config)
    assert (again.lora, again.shapes) == (spec.lora, ())
    jax.tree.map(np.testing.assert_array_equal, again.tree, lora)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_compute_what_peft_computes_with_its_adapter(tmp_path, base, rslora):
    """Its gate and up share A, and its rank is the same for attention and experts."""
    settings = PeftConfig(
        r=3,
        lora_alpha=8,
        init_lora_weights=False,
        use_rslora=rslora,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(torch_base(base), settings)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "theirs", load_model_config(base))
    spec, frozen = load(base)
    spec = ModelSpec(spec.config, adapter.lora, "float32", shapes=adapter.shapes)
    assert relative_error(our_logits(spec, adapter.tree, frozen), torch_logits(model.eval())) < 2e-5

    export_adapter(tmp_path / "again", spec, adapter.tree, str(base))
    again = PeftModel.from_pretrained(torch_base(base), tmp_path / "again").eval()
    assert relative_error(torch_logits(again), torch_logits(model)) < 2e-5


def test_a_merged_checkpoint_has_the_adapted_models_logits(tmp_path, base):
    spec, frozen = load(base, LoraConfig(rank=4))
    lora = trained_lora(spec)
    save_model(tmp_path / "merged", spec, merge_lora(spec, lora, frozen), base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(our_logits(spec, lora, frozen), torch_logits(model)) < 2e-5
    (before,), (after,) = (
        (load_file(f) for f in d.glob("*.safetensors")) for d in (base, tmp_path / "merged")
    )
    assert set(before) == set(after)
    key = "model.layers.{}.mlp.gate.weight"
    assert all(torch.equal(before[key.format(i)], after[key.format(i)]) for i in range(2))


# --- Bad adapters -------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path, base):
    spec, _ = load(base, LoraConfig(targets="mlp_only", rank=2))
    export_adapter(tmp_path / "ours", spec, trained_lora(spec), "base")
    return tmp_path / "ours", spec.config


def change(folder, tensors=lambda x: x, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    weights = folder / "adapter_model.safetensors"
    save_file(tensors(load_file(weights)), weights)


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_parameters": None}, "do not belong to this model"),
        ({"target_parameters": PARAMETERS[1:]}, "do not belong to this model|has shape"),
        ({"target_parameters": ["mlp.experts.up_proj"]}, "this model has no parameter"),
        ({"target_parameters": "mlp.experts.down_proj"}, "must be a list"),
        ({"rank_pattern": {}}, "has shape .*r and rank_pattern, for 8 experts"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_settings_that_do_not_fit_the_tensors_are_refused(exported, settings, words):
    folder, config = exported
    change(folder, **settings)
    with pytest.raises(UserError, match=words):
        read_adapter(folder, config)


def test_an_adapter_that_matches_no_expert_is_refused(exported):
    folder, config = exported
    change(folder, lambda x: {key: value for key, value in x.items() if ".layers.1." not in key})
    with pytest.raises(
        UserError, match=r"target_parameters asks for mlp.experts.\w+, but .*layers.1.* missing"
    ):
        read_adapter(folder, config)


def test_the_first_parameter_gives_the_alpha_where_they_differ(exported):
    """Whatever their order in the file or in a process' hashes: what is written of it must be read again."""
    folder, config = exported
    (folder / "jaxlora.json").unlink()
    patterns = {f"mlp.experts.{name}": alpha for name, alpha in (("gate_up_proj", 8), ("down_proj", 3))}
    for parameters in (PARAMETERS, PARAMETERS[::-1]):
        change(folder, alpha_pattern=patterns, target_parameters=parameters)
        assert read_adapter(folder, config).lora.alpha == 4  # gate and up are fused at twice the rank


def test_an_adapter_of_experts_is_not_one_of_a_dense_model(tmp_path, exported):
    folder, _ = exported
    make_checkpoint(tmp_path / "dense", num_hidden_layers=2)
    with pytest.raises(UserError, match="this model has no parameter"):
        read_adapter(folder, load_model_config(tmp_path / "dense"))


# --- Checkpoints --------------------------------------------------------------------------------------------


def fused(tensors, n_experts=8):
    """The same tensors as Transformers 5 has them in memory."""
    found = {key: x for key, x in tensors.items() if ".experts." not in key}
    for i in range(2):
        place = f"model.layers.{i}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors[f"{place}{e}.{name}.weight"] for e in range(n_experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        found |= {place + "gate_up_proj": torch.cat([gate, up], 1), place + "down_proj": down}
    return found


class TestLayouts:
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])

    def hashed(self, folder):
        return load_hashed(folder, ModelSpec(load_model_config(folder), None, "float32"), self.mesh)

    def rewrite(self, folder, function):
        file = folder / "model.safetensors"
        save_file(function(load_file(file)), file)

    def test_fused_tensors_are_the_same_base(self, base):
        one, digest = self.hashed(base)
        self.rewrite(base, fused)
        other, again = self.hashed(base)
        jax.tree.map(np.testing.assert_array_equal, one, other)
        assert digest == again

    def test_either_spelling_of_the_configuration_is_the_same_shape(self, base):
        file = base / "config.json"
        raw = json.loads(file.read_text())
        shape = load_model_config(base)
        assert "num_local_experts" in raw
        assert "rope_parameters" in raw
        raw["num_experts"] = raw.pop("num_local_experts")
        raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
        file.write_text(json.dumps(raw))
        assert load_model_config(base) == shape

    def test_a_mix_is_refused(self, base):
        self.rewrite(base, lambda x: x | {k: v for k, v in fused(x).items() if "layers.1." in k})
        with pytest.raises(UserError, match=r"experts both separately \(.*\) and fused"):
            self.hashed(base)

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            (
                lambda x: {k: v for k, v in x.items() if "experts.7.up_proj" not in k},
                "no tensor .*experts.7.up",
            ),
            (
                lambda x: {k: v for k, v in x.items() if "mlp.gate.w" not in k},
                r"no tensor .*mlp\.gate\.weight",
            ),
            (
                lambda x: x | {"model.layers.0.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)},
                "do not belong to this model",
            ),
            (
                lambda x: {k: v[:-1].clone() if "experts.3.down" in k else v for k, v in x.items()},
                "others of its layer",
            ),
            (
                lambda x: {k: v[:, :-1].clone() if "gate_up" in k else v for k, v in fused(x).items()},
                r"has shape \(8, 63, 64\)",
            ),
        ],
        ids=["an expert", "the router", "one too many", "one smaller", "an odd half"],
    )
    def test_what_does_not_fit_is_refused(self, base, function, words):
        self.rewrite(base, function)
        with pytest.raises(UserError, match=words):
            self.hashed(base)
