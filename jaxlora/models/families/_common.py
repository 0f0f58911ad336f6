"""Shared by the families: reading `config.json`, the dense table of weights, rotary frequencies.

A family specifies what differs: defaults, keys that must have a certain value, and whether queries and keys
are normalised and have biases.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxlora.models.spec import ModelConfig, Weight
from jaxlora.runtime.errors import UserError

# The default of a missing key in all families, as in Transformers.
DEFAULTS: dict[str, Any] = {
    "head_dim": None,  # hidden_size / num_attention_heads
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# Fields of a `ModelConfig` that are derived below, not read under their own names.
_WORKED_OUT = ("eos_token_ids", "model_type", "rope_scaling", "experts")
_READ = tuple(name for name in ModelConfig.__pydantic_fields__ if name not in _WORKED_OUT)  # type: ignore[attr-defined]
# Keys that have no effect on what is computed here.
_HARMLESS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"),
    *("initializer_range", "attention_dropout", "use_cache", "return_dict", "torchscript", "pretraining_tp"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "num_labels", "auto_map", "tokenizer_class", "use_bfloat16"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("_attn_implementation", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version"),
    *("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder"),
    *("finetuning_task", "task_specific_params", "prefix", "pruned_heads", "rope_parameters", "rope_scaling"),
}
_SWITCHES = ("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_dense(
    raw: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
    required: Mapping[str, Any],
    harmless: Collection[str] = (),
    rope_types: Collection[str] = ("default",),
) -> dict[str, Any]:
    """The fields of a `ModelConfig` from the decoded `config.json`.

    Args:
      defaults: values of missing keys.
      required: keys that would change the computation, with the only value supported (besides null or a
        missing key).
      harmless: keys of this family that have no effect.
      rope_types: supported kinds of rotary positions.

    Raises:
      UserError: a key is unknown or unsupported; the message names it.
    """
    _check_keys(raw, required, harmless)
    values = {**defaults, **{key: raw[key] for key in _READ if key in raw}, **_rope(raw, rope_types)}
    if values["head_dim"] is None and raw.get("hidden_size") and raw.get("num_attention_heads"):
        values["head_dim"] = _quotient(raw["hidden_size"], raw["num_attention_heads"])
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = raw.get("num_attention_heads")
    eos = raw.get("eos_token_id")
    values["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return values


def _check_keys(raw: Mapping[str, Any], required: Mapping[str, Any], harmless: Collection[str]) -> None:
    if raw.get("quantization_config") not in (None, {}):
        given = f"{raw['quantization_config']!r:.100}"
        raise UserError(
            f"quantization_config = {given} is not supported; give the checkpoint that was not quantised"
        )
    for key, value in raw.items():
        known = key in _HARMLESS or key in _READ or key in required or key in harmless
        if not known and key != "layer_types" and value not in (None, False, [], {}):
            raise UserError(f"{key} = {value!r:.100} is not known, so it could change what is computed")
        if key in required and value not in (None, required[key]):
            raise UserError(f"{key} = {value!r:.100} is not supported; only {required[key]!r} is")
        if key in _SWITCHES and value:
            raise UserError(f"{key} = {value!r:.100} is not supported")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"layer_types = {kinds!r:.100} is not supported; only full_attention is")


def _rope(raw: Mapping[str, Any], rope_types: Collection[str]) -> dict[str, Any]:
    """RoPE base and scaling. Transformers 5 keeps both in `rope_parameters`; older files have the base at the
    top level and the rest in `rope_scaling`."""
    found: dict[str, Any] = {}
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{name} is not an object")
        # Older files say `type`; Transformers reads both.
        kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None] or ["default"]
        if any(kind not in rope_types or kind != kinds[0] for kind in kinds):
            known = " and ".join(rope_types)
            raise UserError(f"{name} = {rope!r:.100} is not supported; only rope_type {known} is")
        fields = _LLAMA3 if kinds[0] == "llama3" else ()
        if odd := sorted(map(str, rope.keys() - {"rope_type", "type", "rope_theta", *fields})):
            raise UserError(f"{name} with {', '.join(odd)[:100]} is not supported for rope_type {kinds[0]}")
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"]
        scalings.append({field: rope[field] for field in fields if field in rope} if fields else None)
    if scalings and any(scaling != scalings[0] for scaling in scalings):
        raise UserError("rope_scaling and rope_parameters differ, so this is not supported; give one of them")
    return found | {"rope_scaling": scalings[0] if scalings else None}


def _quotient(hidden_size: Any, heads: Any) -> int:
    try:
        return int(hidden_size) // int(heads)
    except (TypeError, ValueError, ArithmeticError):
        raise UserError("hidden_size and num_attention_heads must be positive whole numbers") from None


def dense_table(
    config: ModelConfig, joined: bool, *, qk_norms: bool = False, qkv_biases: bool = False
) -> list[Weight]:
    """See `jaxlora.models.families.parameter_table`.

    Args:
      qk_norms: an RMS norm is applied to each head of the queries and keys.
      qkv_biases: the query, key and value projections have biases.
    """
    hidden, vocab, ffn = config.hidden_size, config.vocab_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim

    def layer(path: str, shape, axes, group=None, array="weight") -> Weight:
        return Weight(f"layers.{path}", f"model.layers.{{layer}}.{path}.{array}", shape, axes, group, array)

    def projection(name: str, size: int, axis: str | None, group: str | None) -> list[Weight]:
        """The matrix `[size, hidden]` of q, k, v or all three joined, and its bias `[size]` if it has one."""
        path = f"self_attn.{name}"
        bias = [layer(path, (size,), (axis,), array="bias")] if qkv_biases else []
        return [layer(path, (size, hidden), (axis, "embed"), group), *bias]

    if joined:
        qkv = projection("qkv_proj", heads + 2 * kv_heads, None, "attention")
        gate_up = [layer("mlp.gate_up_proj", (2 * ffn, hidden), (None, "embed"), "mlp")]
    else:
        qkv = [
            *projection("q_proj", heads, "heads", "attention"),
            *projection("k_proj", kv_heads, "kv_heads", "attention"),
            *projection("v_proj", kv_heads, "kv_heads", "attention"),
        ]
        gate_up = [
            layer("mlp.gate_proj", (ffn, hidden), ("mlp", "embed"), "mlp"),
            layer("mlp.up_proj", (ffn, hidden), ("mlp", "embed"), "mlp"),
        ]
    norms = [layer(f"self_attn.{name}", (config.head_dim,), (None,)) for name in ("q_norm", "k_norm")]
    head = Weight("lm_head", "lm_head.weight", (vocab, hidden), ("logits", "embed"), "output_head")
    return [
        Weight("embed_tokens", "model.embed_tokens.weight", (vocab, hidden), ("vocab", "embed")),
        layer("input_layernorm", (hidden,), (None,)),
        *qkv,
        *(norms if qk_norms else []),
        layer("self_attn.o_proj", (hidden, heads), ("embed", "heads"), "attention"),
        layer("post_attention_layernorm", (hidden,), (None,)),
        *gate_up,
        layer("mlp.down_proj", (hidden, ffn), ("embed", "mlp"), "mlp"),
        Weight("norm", "model.norm.weight", (hidden,), (None,)),
        *([] if config.tie_word_embeddings else [head]),
    ]


def plain_frequencies(config: ModelConfig) -> np.ndarray:
    """1 / theta^(2i / head_dim), see `jaxlora.models.families.rotary_frequencies`."""
    # Computed on the host, in Hugging Face's order of operations: a compiled power differs in the last bit of
    # a frequency, which at position 10,000 rotates its pair by a milliradian.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = np.power(np.float64(config.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power
