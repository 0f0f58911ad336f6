"""Every family computes what Transformers computes: logits, answers, adapters; shapes are as published."""

from __future__ import annotations

import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.adapters import PLACEMENTS, load, our_logits, relative_error, torch_logits, trained_lora
from helpers.hf_models import FAMILY_SHAPES, OTHERS, make_checkpoint, torch_greedy
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import Base, find_base, random_base, save_model
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import LoraConfig, MeshConfig, ModelSource
from jaxlora.data.render import load_tokenizer, render_batch, render_chat, render_prompts
from jaxlora.evals.gsm8k import load_problems
from jaxlora.generate.decode import generate
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import merge_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import (
    FAMILIES,
    count_parameters,
    load_model_config,
    model_config_from_dict,
    published_config,
    rotary_frequencies,
)
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import base_shardings, make_mesh

CASES = [(family, name) for family, shapes in OTHERS.items() for name in shapes]
NEW = sorted(OTHERS)
TOKENS = np.random.default_rng(1).integers(0, 160, (2, 64))


def one_device():
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_logits_and_32_greedy_tokens_equal_transformers(tmp_path, family, name):
    reference = make_checkpoint(tmp_path, family=family, seed=len(name), **OTHERS[family][name])
    spec, frozen = load(tmp_path, scan=len(name) % 2 == 0)  # stacked and unrolled layers
    assert relative_error(our_logits(spec, {}, frozen, TOKENS), torch_logits(reference, TOKENS)) < 2e-5
    prompts = [row[:length].tolist() for row, length in zip(TOKENS, (37, 5), strict=True)]
    form, lora, weights, mesh = decode_weights(spec, {}, frozen)
    assert form.joined
    with jax.set_mesh(mesh):
        ours = generate(form, lora, weights, prompts, stop_ids=(), max_new_tokens=32, slots=2)
    for prompt, answer in zip(prompts, ours, strict=True):
        assert answer.tokens == torch_greedy(reference, prompt, 32)


@pytest.mark.parametrize("family", NEW)
def test_positions_beyond_8k_equal_transformers(tmp_path, family):
    """Scaled positions too: of Llama's own scaling, which begins to turn slower at 2,048."""
    rope = OTHERS["llama"]["scaled by 32, tied, wide heads"]["rope"] if family == "llama" else {}
    reference = make_checkpoint(tmp_path, family=family, rope_theta=500_000.0, rope=rope, head_dim=64)
    config = load_model_config(tmp_path)
    positions = np.arange(9_000, 9_064)[None].repeat(2, 0)
    positions[:, 24:] += 6_000  # a constant shift of all positions cancels out in attention
    spec, frozen = load(tmp_path)
    assert (config.rope_scaling is not None) == (family == "llama")
    ours = our_logits(spec, {}, frozen, TOKENS, positions)
    with torch.no_grad():
        theirs = reference(torch.tensor(TOKENS), position_ids=torch.tensor(positions)).logits.numpy()
    assert relative_error(ours, theirs) < 2e-5


# Indices and values, and the sum of all, worked out in float64 from the published formula.
FREQUENCIES = {
    "llama-3.1-8b": (
        {
            28: 3.211445995e-3,
            29: 2.166570764e-3,
            30: 1.371893568e-3,
            32: 5.248461610e-4,
            34: 1.785078128e-4,
            35: 9.556212354e-5,
            63: 3.068925989e-7,
        },
        5.386058201,
    ),
    "llama-3.2-1b": (
        {14: 3.211445995e-3, 15: 1.290547928e-3, 16: 4.295567966e-4, 17: 9.708287803e-5, 31: 9.418306725e-8},
        2.968202298,
    ),
    "llama-3.2-3b": ({29: 2.118406997e-3, 32: 4.295567966e-4, 35: 2.389053088e-5}, 5.385182234),
}


@pytest.mark.parametrize("name", FREQUENCIES)
def test_rotary_frequencies_of_llama_3_are_the_published_ones(name):
    values, total = FREQUENCIES[name]
    found = rotary_frequencies(published_config(name))
    assert found.dtype == np.float32
    for index, value in values.items():
        assert found[index] == pytest.approx(value, rel=1e-6), index
    assert found.sum(dtype=np.float64) == pytest.approx(total, rel=1e-7)


PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_shapes_have_the_published_numbers_of_parameters(name):
    assert count_parameters(published_config(name)) == PARAMETERS[name]


class TestAdapters:
    @pytest.mark.parametrize("family", NEW)
    def test_peft_loads_ours_and_we_load_pefts(self, tmp_path, family):
        make_checkpoint(tmp_path / "base", family=family, **FAMILY_SHAPES[family])
        spec, frozen = load(tmp_path / "base", PLACEMENTS["all_layer"])
        lora = trained_lora(spec)
        export_adapter(tmp_path / "ours", spec, lora, str(tmp_path / "base"))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
            model = PeftModel.from_pretrained(self.torch_base(tmp_path), tmp_path / "ours").eval()
        assert relative_error(our_logits(spec, lora, frozen), torch_logits(model)) < 2e-5

        settings = PeftConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        theirs = get_peft_model(self.torch_base(tmp_path), settings)
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        adapter = read_adapter(tmp_path / "theirs", spec.config)
        assert adapter.lora.modules == ("q_proj", "v_proj")  # each once, though both have a bias as well
        spec, frozen = load(tmp_path / "base", adapter.lora)
        assert relative_error(our_logits(spec, adapter.tree, frozen), torch_logits(theirs.eval())) < 2e-5

    @staticmethod
    def torch_base(folder):
        return AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")

    @pytest.mark.parametrize("family", NEW)
    def test_a_merged_checkpoint_has_the_adapted_models_logits_and_the_bases_biases(self, tmp_path, family):
        make_checkpoint(tmp_path / "base", family=family, **FAMILY_SHAPES[family])
        spec, frozen = load(tmp_path / "base", PLACEMENTS["all_layer"])
        lora = trained_lora(spec)
        save_model(tmp_path / "merged", spec, merge_lora(spec, lora, frozen), tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        ours = our_logits(spec, lora, frozen)
        assert relative_error(ours, torch_logits(model)) < 2e-5
        before = load_file(tmp_path / "base" / "model.safetensors")
        (file,) = (tmp_path / "merged").glob("*.safetensors")
        after = load_file(file)
        assert set(after) == set(before)  # a tied head is not written a second time
        biases = [key for key in before if key.endswith(".bias")]
        assert len(biases) == (9 if family == "qwen2" else 0)
        assert all(torch.equal(before[key], after[key]) for key in biases)

        form, _, weights, mesh = decode_weights(spec, lora, frozen)
        with jax.set_mesh(mesh):
            (answer,) = generate(form, {}, weights, [[5, 6, 7]], stop_ids=(), max_new_tokens=16, slots=1)
        assert answer.tokens == torch_greedy(model, [5, 6, 7], 16)

    def test_biases_are_no_targets(self):
        spec = ModelSpec(published_config("qwen2.5-0.5b"), LoraConfig(targets="all_layer"))
        assert [weight.name for weight in spec.adapted] == [
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        ]


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 1, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("family", NEW)
def test_logits_on_a_mesh_are_those_of_one_device(family, shape):
    raw = {"model_type": family, "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = model_config_from_dict(raw)
    spec = ModelSpec(config, PLACEMENTS["attention_only"], "float32")
    base = random_base(spec, 0, one_device(), std=0.15)
    lora = trained_lora(spec)
    expected = our_logits(spec, lora, base)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    spread = jax.tree.map(jax.device_put, jax.tree.map(np.asarray, base), base_shardings(mesh, spec))
    if family == "qwen2":
        bias = spread["layers"]["self_attn"]["q_proj"]["bias"]
        assert bias.shape == (2, 64)
        assert {s.data.shape for s in bias.addressable_shards} == {(2, 64 // shape[2])}
    with jax.set_mesh(mesh):
        found = our_logits(spec, jax.tree.map(np.asarray, lora), spread)
        assert relative_error(found, expected) < 2e-5
        form, _, weights, decoding = decode_weights(spec, jax.tree.map(jnp.asarray, lora), spread)
    with jax.set_mesh(decoding):
        prompts = [[5, 6, 7], [9, 2]]
        answers = generate(form, {}, weights, prompts, stop_ids=(), max_new_tokens=8, slots=8)
    form, _, weights, decoding = decode_weights(spec, lora, base)
    with jax.set_mesh(decoding):
        alone = generate(form, {}, weights, prompts, stop_ids=(), max_new_tokens=8, slots=8)
    assert [a.tokens for a in answers] == [a.tokens for a in alone]


# --- What config.json may say -------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As the files of the published models have them.
FILES = {
    "Llama 3.1": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "eos_token_id": [128001, 128008, 128009],
    },
    "Llama 3.2": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "rope_parameters": LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "SmolLM2": {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Qwen2.5": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 21,
        "rope_theta": 1000000.0,
    },
    "Qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1000000},
    "Qwen3-MoE": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1000000.0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "max_window_layers": 48,
        "sliding_window": None,
        "use_sliding_window": False,
    },
}


def llama(**values):
    return SHAPE | {"model_type": "llama"} | values


def qwen2(**values):
    return SHAPE | FILES["Qwen2.5"] | values


def without(key):
    return {name: value for name, value in LLAMA3.items() if name != key}


def mixture(**values):
    return SHAPE | FILES["Qwen3-MoE"] | values


REFUSED = [
    (mixture(norm_topk_prob=None), "norm_topk_prob is missing"),
    (mixture(norm_topk_prob=1), "norm_topk_prob"),
    (mixture(num_experts=None), r"experts.num_experts: Field required"),
    (mixture(num_local_experts=64), "num_experts and num_local_experts differ"),
    (mixture(num_experts_per_tok=129), "num_experts_per_tok must not be above"),
    (mixture(mlp_only_layers=[3]), "mlp_only_layers"),
    (mixture(decoder_sparse_step=2), "decoder_sparse_step"),
    (mixture(output_router_logits=True), "output_router_logits"),
    (mixture(shared_expert_intermediate_size=64), "shared_expert_intermediate_size"),
    (mixture(experts={"num_experts": 2}), r"experts = .* is not known"),
    (llama(attention_bias=True), "attention_bias"),
    (llama(mlp_bias=True), "mlp_bias"),
    (llama(sliding_window=4096), "sliding_window"),
    (llama(rope_interleaved=True), "rope_interleaved"),
    (llama(hidden_act="gelu"), "hidden_act"),
    *(
        (llama(**{name: {key: kind, "factor": 4.0}}), rf"{name}.*only rope_type default and llama3 is")
        for name, key in (("rope_scaling", "type"), ("rope_parameters", "rope_type"))
        for kind in ("yarn", "linear", "dynamic", "longrope")
    ),
    *((llama(rope_scaling=without(key)), rf"rope_scaling\.{key}") for key in LLAMA3 if key != "rope_type"),
    (llama(rope_scaling=LLAMA3 | {"factor": "8"}), "factor"),
    (llama(rope_scaling=LLAMA3 | {"factor": 0.5}), "factor"),
    (llama(rope_scaling=LLAMA3 | {"low_freq_factor": 4.0}), "high_freq_factor must be above"),
    (llama(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 0}), "original_max"),
    (llama(rope_scaling=LLAMA3 | {"attention_factor": 1.0}), "attention_factor"),
    (llama(rope_scaling=LLAMA3, rope_parameters=LLAMA3 | {"factor": 32.0}), "rope_parameters differ"),
    (llama(rope_scaling=LLAMA3, rope_parameters={"rope_theta": 1e4}), "rope_parameters differ"),
    (llama(quantization_config={"quant_method": "awq"}), "quantization_config.*was not quantised"),
    (qwen2(use_sliding_window=True), "use_sliding_window"),
    (qwen2(attention_bias=True), "attention_bias"),
    (qwen2(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling"),
    (qwen2(rope_scaling=LLAMA3), "rope_scaling"),
    *(
        (SHAPE | {"model_type": kind}, rf"'{kind}'.*the nearest is '{nearest}'")
        for kind, nearest in {
            "gemma2": "qwen3",
            "gemma3_text": "qwen3",
            "mistral": "llama",
            "mixtral": "llama",
            "smollm3": "llama",
            "qwen2_moe": "qwen2",
            "qwen3_next": "qwen3",
            "phi3": "qwen3",
        }.items()
    ),
    ({"model_type": "qwen2_5_vl", "text_config": SHAPE}, r"wrapper .*\(text_config\).*nearest is 'qwen2'"),
    ({"model_type": "llava", "text_config": SHAPE}, r"wrapper .*\(text_config\)"),
]


@pytest.mark.parametrize("name", FILES)
def test_a_config_of_each_listed_family_is_read(name):
    config = model_config_from_dict(SHAPE | FILES[name])
    assert config.head_dim == 16
    assert config.num_key_value_heads == (4 if name == "SmolLM2" else 2)
    assert config.tie_word_embeddings == (name == "Llama 3.2")
    assert (
        config.rope_theta
        == {"Llama": 5e5, "SmolLM2": 1e5, "Qwen2.5": 1e6, "Qwen3": 1e6}[re.split("[ -]", name)[0]]
    )
    if name.startswith("Llama"):
        assert config.rope_scaling.factor == (8.0 if name == "Llama 3.1" else 32.0)
        assert config.rope_scaling.original_max_position_embeddings == 8192
    else:
        assert config.rope_scaling is None
    assert config.eos_token_ids == ((128001, 128008, 128009) if name == "Llama 3.1" else ())


@pytest.mark.parametrize(("raw", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_supported_is_refused_by_name(raw, words):
    with pytest.raises(UserError, match=words):
        model_config_from_dict(raw)


def test_missing_numbers_are_transformers_defaults(tmp_path):
    """Of Llama: 2,048 positions, theta 10,000, as many key-value heads as heads."""
    reference = make_checkpoint(tmp_path, family="llama", head_dim=None)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    for key in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_dim"):
        raw.pop(key)
    file.write_text(json.dumps(raw))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert relative_error(torch_logits(again), torch_logits(reference)) > 1e-3
    spec, frozen = load(tmp_path)
    assert relative_error(our_logits(spec, {}, frozen), torch_logits(again)) < 2e-5
    assert spec.config.max_position_embeddings == again.config.max_position_embeddings == 2048


def test_the_page_lists_every_family(repository):
    page = (repository / "README.md").read_text()
    for name, family in FAMILIES.items():
        assert f"| {family.MODELS} | `{name}` |" in page


def test_the_name_of_a_drawn_base_without_scaling_is_what_it_was():
    """Runs on random weights recorded it."""
    config = ModelConfig(160, 64, 96, 2, 4, 2, 16)
    drawn = Base(ModelSource(path="x"), None, config, 0).fingerprint()
    assert drawn == "random-0-5a9547fe90b8719a"


# --- A real model -------------------------------------------------------------------------------------------

QUESTIONS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    " How many clips did Natalia sell altogether in April and May?",
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting."
    " How much did she earn?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber."
    " How many bolts in total does it take?",
]


class TestSmolLM2:
    @pytest.fixture(scope="class")
    def reference(self, smollm2):
        return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()

    def test_its_shape_is_the_published_one(self, smollm2):
        assert load_model_config(smollm2) == published_config("smollm2-135m")

    def test_logits_and_greedy_answers_equal_transformers(self, smollm2, reference):
        spec, frozen = load(smollm2, scan=False)
        prompts = render_prompts(load_tokenizer(smollm2), QUESTIONS)
        tokens = np.asarray([prompts[0]])
        theirs = torch_logits(reference, tokens)
        assert relative_error(our_logits(spec, {}, frozen, tokens), theirs) < 2e-5
        form, _, weights, mesh = decode_weights(spec, {}, frozen)
        with jax.set_mesh(mesh):
            ours = generate(form, {}, weights, prompts, stop_ids=(), max_new_tokens=32, slots=len(prompts))
        for prompt, answer in zip(prompts, ours, strict=True):
            assert answer.tokens == torch_greedy(reference, prompt, 32)

    @pytest.mark.slow
    def test_whole_answers_to_fifty_questions_of_gsm8k_equal_transformers(self, smollm2, reference, shared):
        tokenizer = load_tokenizer(smollm2)
        (stop,) = stops = find_base(ModelSource(path=str(smollm2))).stop_ids(tokenizer)
        problems = load_problems(str(shared / "data" / "gsm8k" / "test.jsonl"), 50)
        prompts = render_prompts(tokenizer, [problem.question for problem in problems])
        spec, frozen = load(smollm2, scan=False)
        form, _, weights, mesh = decode_weights(spec, {}, frozen)
        with jax.set_mesh(mesh):
            ours = generate(form, {}, weights, prompts, stop_ids=stops, max_new_tokens=256, slots=50)
        for prompt, answer in zip(prompts, ours, strict=True):
            assert len(answer.tokens) == 256 or answer.tokens[-1] == stop
            with torch.no_grad():  # the token that Transformers would take after each beginning of the answer
                logits = reference(torch.tensor([prompt + answer.tokens[:-1]])).logits[0, len(prompt) - 1 :]
            assert logits.argmax(-1).tolist() == answer.tokens

    def test_pad_is_the_token_that_ends_an_answer_and_carries_loss(self, smollm2):
        tokenizer = load_tokenizer(smollm2)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
        messages = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "It is 5."}]
        (row,) = render_batch(tokenizer, [("a", messages)])
        assert tokenizer.decode(row.tokens[row.weights > 0]) == "It is 5.<|im_end|>\n"
        assert tokenizer.bos_token_id == 1
        assert row.tokens.tolist().count(1) == 3  # one a turn: its template's <|im_start|>, none added
        assert find_base(ModelSource(path=str(smollm2))).stop_ids(tokenizer) == (2,)

    def test_prompts_are_those_of_its_own_template(self, smollm2):
        tokenizer = load_tokenizer(smollm2)
        messages = [{"role": "user", "content": "What is 2 + 3?"}]
        text = tokenizer.decode(render_chat(tokenizer, messages))
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert text.endswith("<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n")
