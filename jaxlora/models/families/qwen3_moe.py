"""Qwen3-MoE: Qwen3's attention, and in every layer a router over many small MLPs, the experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlora.models.families._common import DEFAULTS, dense_table, plain_frequencies, read_dense
from jaxlora.models.spec import Experts, ModelConfig, Weight
from jaxlora.runtime.errors import UserError

MODELS = "Qwen3-MoE"


def _published(hidden: int, layers: int, heads: int, ffn: int, dense_ffn: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=dense_ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=128,
        eos_token_ids=(151645,),
        model_type="qwen3_moe",
        experts=Experts(128, 8, ffn, True),
    )


# Shapes of the published models, for planning and benchmarks with random weights.
PUBLISHED = {
    "qwen3-30b-a3b": _published(2048, 48, 32, 768, 6144),
    "qwen3-235b-a22b": _published(4096, 94, 64, 1536, 12288),
}
# Transformers 5 writes the second name.
_COUNTS = ("num_experts", "num_local_experts")
_FIELDS = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    """See `jaxlora.models.families._common.read_dense`; layers without experts are refused."""
    values = read_dense(
        raw,
        defaults=DEFAULTS | {"max_position_embeddings": 32768},
        required={
            "hidden_act": "silu",
            "attention_bias": False,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
        },
        harmless=("sliding_window", "max_window_layers", "router_aux_loss_coef", *_COUNTS, *_FIELDS),
    )
    return values | {"experts": _experts(raw)}


def _experts(raw: dict[str, Any]) -> dict[str, Any]:
    counts = [raw[name] for name in _COUNTS if raw.get(name) is not None]
    if any(count != counts[0] for count in counts):
        raise UserError("num_experts and num_local_experts differ; give one of them")
    if raw.get("norm_topk_prob") is None:
        raise UserError(
            "norm_topk_prob is missing; it decides what is computed, and Transformers' default is not that of"
            " the published models: give true or false"
        )
    given = {name: raw[name] for name in _FIELDS if name in raw}
    return given | ({"num_experts": counts[0]} if counts else {})


def weight_table(config: ModelConfig, joined: bool) -> list[Weight]:
    """See `jaxlora.models.families.parameter_table`; the experts are never joined."""
    dense = dense_table(config, joined, qk_norms=True)
    first = next(i for i, weight in enumerate(dense) if weight.path.startswith("layers.mlp."))
    rest = [weight for weight in dense if not weight.path.startswith("layers.mlp.")]
    return [*rest[:first], *_expert_table(config), *rest[first:]]


def _expert_table(config: ModelConfig) -> list[Weight]:
    assert config.experts is not None
    hidden, n, ffn = config.hidden_size, config.experts.num_experts, config.experts.moe_intermediate_size

    def expert(name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Weight:
        key = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight"
        return Weight(f"layers.mlp.experts.{name}", key, (n, *shape), ("expert", *axes), "mlp")

    return [
        Weight("layers.mlp.gate", "model.layers.{layer}.mlp.gate.weight", (n, hidden), (None, "embed")),
        expert("gate_proj", (ffn, hidden), ("mlp", "embed")),
        expert("up_proj", (ffn, hidden), ("mlp", "embed")),
        expert("down_proj", (hidden, ffn), ("embed", "mlp")),
    ]


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """See `jaxlora.models.families.rotary_frequencies`."""
    return plain_frequencies(config)
