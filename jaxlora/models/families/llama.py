"""Llama 3.1, Llama 3.2 and SmolLM2: no biases, no query or key norms, optionally scaled positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxlora.models.families._common import DEFAULTS, dense_table, plain_frequencies, read_dense
from jaxlora.models.spec import Llama3Scaling, ModelConfig, Weight

MODELS = "Llama 3.1, Llama 3.2, SmolLM2"


def _llama(hidden: int, ffn: int, layers: int, heads: int, factor: float, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=hidden // heads,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        tie_word_embeddings=tied,
        eos_token_ids=(128001, 128008, 128009),
        model_type="llama",
        rope_scaling=Llama3Scaling(factor, 1.0, 4.0, 8192),
    )


def _smollm2(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, theta: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_ids=(2,),
        model_type="llama",
    )


# Shapes of the published models (Instruct), for planning and benchmarks with random weights.
PUBLISHED = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8.0, False),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 32.0, True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 32.0, True),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 100_000.0),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 100_000.0),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 130_000.0),
}


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    """See `jaxlora.models.families._common.read_dense`."""
    return read_dense(
        {"num_key_value_heads": None} | raw,
        defaults=DEFAULTS | {"max_position_embeddings": 2048},
        # SmolLM2's files set `rope_interleaved` to false, which no implementation reads.
        required={
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_interleaved": False,
        },
        harmless=("is_llama_config", "transformers.js_config"),
        rope_types=("default", "llama3"),
    )


def weight_table(config: ModelConfig, joined: bool) -> list[Weight]:
    """See `jaxlora.models.families.parameter_table`."""
    return dense_table(config, joined)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Plain frequencies or those of Llama 3's scaling, see `jaxlora.models.families.rotary_frequencies`.

    With `factor` f, frequencies of wavelengths shorter than original / high are kept, those longer than
    original / low are divided by f, and in between the two are blended. This applies at every text length.
    """
    plain, scaling = plain_frequencies(config), config.rope_scaling
    if scaling is None:
        return plain
    low, high, original = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    # In float32 and in the order of Hugging Face, see `plain_frequencies`.
    waves = np.float32(2 * math.pi) / plain
    slow = plain / np.float32(scaling.factor)
    share = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - share) * slow + share * plain
    return np.where(waves > original / low, slow, np.where(waves < original / high, plain, blended))
