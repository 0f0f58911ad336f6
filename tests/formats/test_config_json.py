"""config.json is read as Transformers reads it, and a key that could change what is computed is refused."""

from __future__ import annotations

import json

import pytest
from helpers.adapters import TOKENS, our_logits, relative_error, torch_logits
from helpers.hf_models import make_checkpoint, our_model
from transformers import Qwen3ForCausalLM

from jaxlora.models.families import load_model_config, model_config_from_dict
from jaxlora.models.spec import check_positions
from jaxlora.runtime.errors import UserError


@pytest.fixture
def base(tmp_path):
    """A checkpoint whose heads have the size that a missing `head_dim` means."""
    make_checkpoint(tmp_path, head_dim=128, num_hidden_layers=2)
    return tmp_path


def change(folder, without=(), **values):
    file = folder / "config.json"
    raw = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps(raw | values))


def assert_as_in_transformers(folder):
    spec, frozen = our_model(folder)
    theirs = torch_logits(Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval())
    assert relative_error(our_logits(spec, {}, frozen, TOKENS), theirs) < 1e-4
    return spec.config


OLD = ("rope_parameters", "rope_theta")
READ = {
    "nothing said of rope": (OLD, {}, 10_000.0),
    "the base at the top": (OLD, {"rope_theta": 50_000.0}, 50_000.0),
    "old names, default scaling": (
        OLD,
        {"rope_theta": 50_000.0, "rope_scaling": {"rope_type": "default"}},
        50_000.0,
    ),
    "older names, default scaling": (OLD, {"rope_theta": 5e4, "rope_scaling": {"type": "default"}}, 5e4),
    "no scaling": (OLD, {"rope_theta": 50_000.0, "rope_scaling": None}, 50_000.0),
    "parameters without a base": (OLD, {"rope_parameters": {"rope_type": "default"}}, 10_000.0),
    "parameters with a base at the top": (
        OLD,
        {"rope_theta": 5e4, "rope_parameters": {"rope_type": "default"}},
        5e4,
    ),
    "both bases": (
        OLD,
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        5e4,
    ),
    "an older name in the parameters": (
        OLD,
        {"rope_parameters": {"type": "default", "rope_theta": 5e4}},
        5e4,
    ),
    "no size of heads": ((*OLD, "head_dim"), {"rope_theta": 5e4}, 5e4),
    "unused switches": ((), {"use_sliding_window": False, "sliding_window": None, "pretraining_tp": 1}, 1e6),
}


@pytest.mark.parametrize("case", READ, ids=str)
def test_what_is_read_computes_transformers_logits(base, case):
    without, values, theta = READ[case]
    change(base, without, **values)
    assert assert_as_in_transformers(base).rope_theta == theta


def test_missing_numbers_are_transformers_defaults(base):
    change(base, ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"))
    config = assert_as_in_transformers(base)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 32768)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_parameters": {"type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"a_key_of_tomorrow": "on"}, "a_key_of_tomorrow"),
    ],
    ids=str,
)
def test_what_would_change_the_computation_is_refused_by_name(base, values, named):
    change(base, **values)
    with pytest.raises(UserError, match=rf"config\.json: {named}.*(not supported|not known|not an object)"):
        load_model_config(base)


def test_texts_longer_than_the_models_positions_are_refused(base):
    config = load_model_config(base)
    check_positions(config, config.max_position_embeddings, "rows")
    with pytest.raises(UserError, match=r"^rows take 16,385 tokens, but the model has 16,384 positions$"):
        check_positions(config, config.max_position_embeddings + 1, "rows")


def test_every_id_that_ends_a_text_is_read():
    raw = {"model_type": "qwen3", "vocab_size": 9, "hidden_size": 4, "intermediate_size": 4}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    assert model_config_from_dict(raw).eos_token_ids == ()
    assert model_config_from_dict(raw | {"eos_token_id": 3}).eos_token_ids == (3,)
    assert model_config_from_dict(raw | {"eos_token_id": [3, 5]}).eos_token_ids == (3, 5)
