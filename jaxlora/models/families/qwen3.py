"""Qwen3 (dense): RMS-normalised queries and keys, no biases, plain rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlora.models.families._common import DEFAULTS, dense_table, plain_frequencies, read_dense
from jaxlora.models.spec import ModelConfig, Weight

MODELS = "Qwen3"
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


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    """See `jaxlora.models.families._common.read_dense`."""
    return read_dense(
        raw,
        defaults=DEFAULTS | {"head_dim": 128, "max_position_embeddings": 32768},
        required={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
        harmless=("sliding_window", "max_window_layers"),
    )


def weight_table(config: ModelConfig, joined: bool) -> list[Weight]:
    """See `jaxlora.models.families.parameter_table`."""
    return dense_table(config, joined, qk_norms=True)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """See `jaxlora.models.families.rotary_frequencies`."""
    return plain_frequencies(config)
