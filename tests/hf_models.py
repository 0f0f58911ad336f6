"""Small random Qwen3 checkpoints made by Transformers: the reference that the tests compare with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.set_num_threads(1)  # tiny matrices: more threads only wait for one another


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
