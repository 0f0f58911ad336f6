"""Small random checkpoints made by Transformers: the reference that the tests compare with."""

from __future__ import annotations

from pathlib import Path

import jax
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

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


def llama3(factor: float, original: int = 64) -> dict:
    """Rotary scaling as in Llama 3, of a model with few positions before it."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


# Of each other family: heads of a size of their own or not, grouped or not, tied or not, bases, scaling.
OTHERS = {
    "llama": {
        "plain": {},
        "head_dim not given, tied": {"head_dim": None, "tie_word_embeddings": True},
        "no grouping, theta 10000": {"num_key_value_heads": 4, "rope_theta": 10_000.0},
        "scaled": {"rope": llama3(8.0), "rope_theta": 500_000.0},
        "scaled by 32, tied, wide heads": {
            "rope": llama3(32.0, 8192),
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        },
        "one key-value head, three shards": {"num_key_value_heads": 1, "shards": 3, "rope_theta": 1e5},
        "9 heads on 3, one layer": {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": None,
            "num_hidden_layers": 1,
        },
    },
    "qwen2": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "no grouping": {"num_key_value_heads": 4},
        "one key-value head, theta 10000": {"num_key_value_heads": 1, "rope_theta": 10_000.0},
        "wide heads, tied, three shards": {"head_dim": 32, "tie_word_embeddings": True, "shards": 3},
        "6 heads on 2": {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "head_dim": None,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-5,
        },
    },
}
# Mixtures of experts: shares that add up to one or not, one expert a token, all of them, fused tensors.
MIXTURES = {
    "plain": {"norm_topk_prob": True},
    "shares as they are, tied, three shards": {
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "shards": 3,
    },
    "one expert a token, one layer, 16 experts": {
        "norm_topk_prob": False,
        "num_experts": 16,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
    },
    "all experts, no grouping, theta 10000": {
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 4,
        "rope_theta": 10_000.0,
    },
}
# One of each family, with everything that the family has and the others lack.
FAMILY_SHAPES = {
    "qwen3": {},
    "llama": OTHERS["llama"]["scaled"] | {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3_moe": MIXTURES["plain"],
}


def make_checkpoint(
    folder: Path, *, family: str = "qwen3", seed: int = 0, shards: int = 1, dtype=torch.float32, **shape
) -> PreTrainedModel:
    """Write a random checkpoint and return the PyTorch model (eval mode, eager attention).

    Args:
      shape: keys of `config.json`; `rope` is the scaling of its rotary positions.
    """
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
    if family == "qwen3_moe":
        defaults |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    values = defaults | shape
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")} | values.pop("rope", {})
    if values["head_dim"] is None:
        del values["head_dim"]
    config = CONFIG_MAPPING[family](**values, rope_parameters=rope)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # norms away from one and biases from zero, so that a missing or swapped one shows
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "10GB")
    return model


def torch_greedy(model: PreTrainedModel, prompt: list[int], count: int = 32) -> list[int]:
    """The most likely tokens after a prompt, so many whatever they are."""
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return answer[0, len(prompt) :].tolist()


def our_model(folder, dtype="float32", scan=True, lora=None):
    """Its spec and base as this package reads them, on one device."""
    spec = ModelSpec(load_model_config(folder), lora, dtype, scan)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    return spec, load_base(folder, spec, mesh)
