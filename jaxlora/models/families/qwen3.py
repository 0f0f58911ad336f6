"""Qwen3 (dense): RMS-normalised queries and keys, no biases, plain rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlora.models.spec import ModelConfig, Weight
from jaxlora.runtime.errors import UserError

# Shapes of the published models, for planning and benchmarks with random weights.
PUBLISHED = {
    name: ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        eos_token_ids=(151645,),
    )
    for name, hidden, intermediate, layers, heads, tied in (
        ("qwen3-0.6b", 1024, 3072, 28, 16, True),
        ("qwen3-1.7b", 2048, 6144, 28, 16, True),
        ("qwen3-4b", 2560, 9728, 36, 32, True),
        ("qwen3-8b", 4096, 12288, 36, 32, False),
        ("qwen3-14b", 5120, 17408, 40, 40, False),
        ("qwen3-32b", 5120, 25600, 64, 64, False),
    )
}
# What a missing key means, as Transformers' Qwen3Config has it.
_DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_READ = tuple(name for name in ModelConfig.__pydantic_fields__ if name not in ("eos_token_ids", "model_type"))  # type: ignore[attr-defined]
# Keys that change nothing in what is computed here.
_HARMLESS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"),
    *("initializer_range", "attention_dropout", "use_cache", "return_dict", "torchscript", "pretraining_tp"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "max_window_layers"),
    *("id2label", "label2id", "problem_type", "num_labels", "auto_map", "tokenizer_class", "use_bfloat16"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("_attn_implementation", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version"),
    *("sliding_window", "is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder"),
    *("finetuning_task", "task_specific_params", "prefix", "pruned_heads", "rope_parameters", "rope_scaling"),
}
# Keys that would change it, with the one value (or none, or a missing key) that does not.
_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
_SWITCHES = ("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder")


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `ModelConfig` from the decoded `config.json`.

    Raises:
      UserError: a key that this package does not know or support; names it.
    """
    for key, value in raw.items():
        known = key in _HARMLESS or key in _READ or key in _REQUIRED or key == "layer_types"
        if not known and value not in (None, False, [], {}):
            raise UserError(f"{key} = {value!r:.100} is not known, so it could change what is computed")
        if key in _REQUIRED and value not in (None, _REQUIRED[key]):
            raise UserError(f"{key} = {value!r:.100} is not supported")
        if key in _SWITCHES and value:
            raise UserError(f"{key} = {value!r:.100} is not supported")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"layer_types = {kinds!r:.100} is not supported; only full_attention is")
    values = _DEFAULTS | {key: raw[key] for key in _READ if key in raw} | _rope(raw)
    if values["head_dim"] is None and raw.get("hidden_size") and raw.get("num_attention_heads"):
        values["head_dim"] = _quotient(raw["hidden_size"], raw["num_attention_heads"])
    eos = raw.get("eos_token_id")
    values["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return values


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """The rotary base. Transformers 5 keeps it in `rope_parameters`, older files at the top level."""
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{name} is not an object")
        # Older files say `type`; Transformers reads both.
        kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
        odd = sorted(rope.keys() - {"rope_type", "type", "rope_theta"})
        if any(kind != "default" for kind in kinds) or odd:
            raise UserError(f"{name} = {rope!r:.100} is not supported; only rope_type default is")
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"]
    return found


def _quotient(hidden_size: Any, heads: Any) -> int:
    try:
        return int(hidden_size) // int(heads)
    except (TypeError, ValueError, ArithmeticError):
        raise UserError("hidden_size and num_attention_heads must be positive whole numbers") from None


def weight_table(config: ModelConfig, joined: bool) -> list[Weight]:
    """See `jaxlora.models.families.parameter_table`."""
    hidden, vocab, ffn = config.hidden_size, config.vocab_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim

    def layer(path: str, shape, axes, group=None) -> Weight:
        return Weight(f"layers.{path}", f"model.layers.{{layer}}.{path}.weight", shape, axes, group)

    if joined:
        qkv = [layer("self_attn.qkv_proj", (heads + 2 * kv_heads, hidden), (None, "embed"))]
        gate_up = [layer("mlp.gate_up_proj", (2 * ffn, hidden), (None, "embed"))]
    else:
        qkv = [
            layer("self_attn.q_proj", (heads, hidden), ("heads", "embed"), "attention"),
            layer("self_attn.k_proj", (kv_heads, hidden), ("kv_heads", "embed"), "attention"),
            layer("self_attn.v_proj", (kv_heads, hidden), ("kv_heads", "embed"), "attention"),
        ]
        gate_up = [
            layer("mlp.gate_proj", (ffn, hidden), ("mlp", "embed"), "mlp"),
            layer("mlp.up_proj", (ffn, hidden), ("mlp", "embed"), "mlp"),
        ]
    head = Weight("lm_head", "lm_head.weight", (vocab, hidden), ("vocab", "embed"), "output_head")
    return [
        Weight("embed_tokens", "model.embed_tokens.weight", (vocab, hidden), ("vocab", "embed")),
        layer("input_layernorm", (hidden,), (None,)),
        *qkv,
        layer("self_attn.q_norm", (config.head_dim,), (None,)),
        layer("self_attn.k_norm", (config.head_dim,), (None,)),
        layer("self_attn.o_proj", (hidden, heads), ("embed", "heads"), "attention"),
        layer("post_attention_layernorm", (hidden,), (None,)),
        *gate_up,
        layer("mlp.down_proj", (hidden, ffn), ("embed", "mlp"), "mlp"),
        Weight("norm", "model.norm.weight", (hidden,), (None,)),
        *([] if config.tie_word_embeddings else [head]),
    ]


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """1 / theta^(2i / head_dim), see `jaxlora.models.families.rotary_frequencies`."""
    # Rounded on the host, in the order of Hugging Face: at position 10,000 one differing last bit of a
    # frequency turns its pair by a milliradian, and a compiled power differs in the last bit.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = np.power(np.float64(config.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power
