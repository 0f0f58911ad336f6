"""Adapters of odd shapes, as PEFT's options make them: PEFT's logits, or one line that names the option."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from helpers.adapters import load, our_logits, relative_error, torch_logits, trained_lora
from helpers.hf_models import make_checkpoint
from peft import EvaConfig, PeftModel, get_peft_model
from peft import LoraConfig as PeftConfig
from safetensors.numpy import load_file
from transformers import Qwen3ForCausalLM

import jaxlora
from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import find_base, fingerprint
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import LoraConfig, ModelSource, RunConfig
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.runtime.errors import UserError
from jaxlora.train.job import trained_spec

BAR = 1e-4  # relative error of float32 logits
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# What Unsloth writes as target_modules.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder)
    return folder


def save(base, folder, targets, dtype=torch.float32, **settings):
    """An adapter of PEFT's with random A and B in `folder`; returns its logits with the float32 base."""
    settings = {"r": 8, "lora_alpha": 32, "init_lora_weights": False} | settings
    torch.manual_seed(0)
    model = get_peft_model(
        Qwen3ForCausalLM.from_pretrained(base, dtype=dtype),
        PeftConfig(target_modules=targets, **settings),
        autocast_adapter_dtype=False,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), folder)
    return torch_logits(again.eval())


CASES = {
    "dropout": (ATTENTION, {"lora_dropout": 0.3}),
    "layers under several names": (
        ATTENTION,
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    ),
    "no layer chosen means all": (["q_proj"], {"layers_to_transform": []}),
    "a layer excluded by a pattern": ([*ATTENTION, *MLP], {"exclude_modules": r".*layers\.2\..*"}),
    "modules excluded by a pattern": (
        "all-linear",
        {"task_type": "CAUSAL_LM", "exclude_modules": ".*(?:q|k)_proj"},
    ),
    "one module excluded": (ATTENTION, {"exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "groups that capture nothing": (
        r"model\.layers\.(?:0|2)\.(?:self_attn\.(?:q|o)_proj|mlp\.down_proj)",
        {},
    ),
    "a lookahead": (r"(?!.*layers\.0).*q_proj", {}),
    "a lookbehind": (r".*(?<!k)_proj", {}),
    "Unsloth's pattern": (UNSLOTH, {}),
    "a pattern without case": (r"(?i).*Q_PROJ", {}),
    "orthogonal": (ATTENTION, {"init_lora_weights": "orthogonal"}),
    "gaussian": (ATTENTION, {"init_lora_weights": "gaussian"}),
    "EVA": (
        ATTENTION,
        {"init_lora_weights": "eva", "eva_config": EvaConfig(), "rank_pattern": {"v_proj": 3}},
    ),
    "whole names": (["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"], {}),
    "a name that begins with a number": (["0.self_attn.q_proj"], {}),
    "a rank from the beginning of names": (ATTENTION, {"rank_pattern": {r"^model\.layers\.0\..*": 3}}),
    "a rank that no name has": (ATTENTION, {"rank_pattern": {"nothing": 3}}),
    "alternatives in the patterns": (
        ATTENTION,
        {"rank_pattern": {"q_proj|k_proj": 2}, "alpha_pattern": {r"layers.[01].self_attn.(q|v)_proj": 3}},
    ),
    "rank-stabilised with alphas of their own": (
        ATTENTION,
        {"use_rslora": True, "alpha_pattern": {"q_proj": 7}, "rank_pattern": {"v_proj": 5}},
    ),
    "a rank above the model's width": (ATTENTION, {"rank_pattern": {"q_proj": 80}}),
    "the head by a pattern": (r".*\.q_proj|lm_head", {}),
    "stored as bfloat16": ([*ATTENTION, *MLP], {"dtype": torch.bfloat16}),
    "an alpha of two million": (["q_proj"], {"lora_alpha": 2_000_000}),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_pefts(base, tmp_path, case):
    targets, settings = CASES[case]
    theirs = save(base, tmp_path, targets, **settings)
    adapter = read_adapter(tmp_path, load_model_config(base), base)
    spec, frozen = load(base, adapter.lora)
    spec = replace(spec, shapes=adapter.shapes)
    assert relative_error(our_logits(spec, adapter.tree, frozen), theirs) < BAR
    plain = torch_logits(Qwen3ForCausalLM.from_pretrained(base))
    assert relative_error(plain, theirs) > 100 * BAR  # it does something


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        (ATTENTION, {"bias": "all"}, "bias = "),
        (ATTENTION, {"bias": "lora_only"}, "bias = "),
        (ATTENTION, {"lora_bias": True}, "lora_bias = true"),
        (ATTENTION, {"use_dora": True}, "use_dora = true"),
        (["q_proj", "embed_tokens"], {}, "adapts embed_tokens, which is not supported"),
        (ATTENTION, {"modules_to_save": ["norm"]}, "modules_to_save = "),
        (ATTENTION, {"trainable_token_indices": [1, 2]}, "trainable_token_indices = "),
        (ATTENTION, {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base"),
        (ATTENTION, {"init_lora_weights": "olora"}, "init_lora_weights = 'olora' changes the base"),
    ],
    ids=str,
)
def test_what_is_more_than_lora_is_named(base, tmp_path, targets, settings, message):
    save(base, tmp_path, targets, **settings)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path, load_model_config(base), base)


@pytest.mark.parametrize(
    "pattern", [".*" * 40 + "x", ".*[a-z._]" * 25 + "x", r"(?=(a+)+$).*", r"(?P<a>q)_proj(?P=a)"]
)
def test_no_pattern_takes_long(base, tmp_path, pattern):
    save(base, tmp_path, ["q_proj"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": pattern}))
    start = time.process_time()
    with pytest.raises(UserError, match=r"pattern.* cannot be used"):
        read_adapter(tmp_path, load_model_config(base))
    assert time.process_time() - start < 15


def test_many_slow_patterns_are_stopped(base, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.checkpoints.adapters._PATTERN_SECONDS", 0.5)
    save(base, tmp_path, ["q_proj"])
    file = tmp_path / "adapter_config.json"
    slow = {".*[a-z._]" * 8 + f"x{i}": 4 for i in range(5000)}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": slow}))
    with pytest.raises(UserError, match="its patterns cannot be used: it took more than"):
        read_adapter(tmp_path, load_model_config(base))


def test_an_alpha_that_can_be_trained_can_be_read(base, tmp_path):
    lora = LoraConfig(targets="q_proj,v_proj", alpha=2e6)
    spec = ModelSpec(load_model_config(base), lora, "float32")
    export_adapter(tmp_path / "adapter", spec, trained_lora(spec), "base")
    assert read_adapter(tmp_path / "adapter", spec.config).lora == lora
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def test_an_adapter_of_another_base_is_neither_trained_further_nor_opened(base, tmp_path):
    make_checkpoint(tmp_path / "other", seed=1)
    spec = ModelSpec(load_model_config(base), LoraConfig(), "float32")
    folder = tmp_path / "adapter"
    theirs = fingerprint(tmp_path / "other")
    export_adapter(folder, spec, trained_lora(spec), "other", base_fingerprint=theirs)
    source = ModelSource(path=str(base))
    config = RunConfig(model=source, lora=LoraConfig(start=str(folder)))
    with pytest.raises(UserError, match=r"config.lora.start: .*adapter: was trained on a different base"):
        trained_spec(config, find_base(source))
    with pytest.raises(UserError, match=r"adapter: was trained on a different base .*; load that base first"):
        jaxlora.load(base).open(folder)
