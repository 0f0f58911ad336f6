"""Small random Qwen3 checkpoints made by Transformers: the reference that the tests compare with."""

from __future__ import annotations

from pathlib import Path

import jax
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from jaxlora.checkpoints.base import load_base
from jaxlora.config import MeshConfig
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.sharding import make_mesh

torch.set_num_threads(1)  # tiny matrices: more threads only wait for one another

CONFIGURATIONS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "no grouping": {"num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32, "num_attention_heads": 4},
    "narrow heads, tied": {"head_dim": 8, "num_attention_heads": 4, "tie_word_embeddings": True},
    "theta 10000": {"rope_theta": 10_000.0},
    "theta 5e6, three shards": {"rope_theta": 5e6, "shards": 3},
    "three shards, tied, 6 heads": {
        "shards": 3,
        "tie_word_embeddings": True,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "one layer": {"num_hidden_layers": 1, "rms_norm_eps": 1e-5},
}


def make_checkpoint(
    folder: Path, *, seed: int = 0, shards: int = 1, dtype=torch.float32, **shape
) -> Qwen3ForCausalLM:
    """Write a random Qwen3 checkpoint and return the PyTorch model (eval mode, eager attention)."""
    defaults = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 16384,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    values = defaults | shape
    theta = values.pop("rope_theta")
    config = Qwen3Config(**values, rope_parameters={"rope_type": "default", "rope_theta": theta})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():  # norms away from one, so that a missing or swapped norm shows
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "10GB")
    return model


def our_model(folder, dtype="float32", scan=True, lora=None):
    """Its spec and base as this package reads them, on one device."""
    spec = ModelSpec(load_model_config(folder), lora, dtype, scan)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    return spec, load_base(folder, spec, mesh)
