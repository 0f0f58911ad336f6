"""Qwen2.5: biases on queries, keys and values, no query or key norms, plain rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlora.models.families._common import DEFAULTS, dense_table, plain_frequencies, read_dense
from jaxlora.models.spec import ModelConfig, Weight

MODELS = "Qwen2.5"
# Shapes of the published models (Instruct), for planning and benchmarks with random weights.
PUBLISHED = {
    name: ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        eos_token_ids=(151645,),
        model_type="qwen2",
    )
    for name, vocab, hidden, intermediate, layers, heads, kv_heads, tied in (
        ("qwen2.5-0.5b", 151936, 896, 4864, 24, 14, 2, True),
        ("qwen2.5-1.5b", 151936, 1536, 8960, 28, 12, 2, True),
        ("qwen2.5-3b", 151936, 2048, 11008, 36, 16, 2, True),
        ("qwen2.5-7b", 152064, 3584, 18944, 28, 28, 4, False),
    )
}


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    """See `jaxlora.models.families._common.read_dense`."""
    return read_dense(
        raw,
        defaults=DEFAULTS | {"max_position_embeddings": 32768},
        required={"hidden_act": "silu", "use_sliding_window": False},
        harmless=("sliding_window", "max_window_layers"),
    )


def weight_table(config: ModelConfig, joined: bool) -> list[Weight]:
    """See `jaxlora.models.families.parameter_table`."""
    return dense_table(config, joined, qkv_biases=True)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """See `jaxlora.models.families.rotary_frequencies`."""
    return plain_frequencies(config)
