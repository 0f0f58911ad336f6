"""The parameter table: every weight of a model declared once.

One row gives a weight's place in our tree, its Hugging Face key, its shape, the logical axes that sharding
maps to the mesh, and the LoRA group it belongs to. Loading, sharding, adapter placement, export, merging
and parameter counts all read this table.

    for weight in parameter_table(config):
        print(weight.path, weight.hf_key, weight.shape)   # such as: norm model.norm.weight (4096,)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxlora.config import Condition
from jaxlora.models.spec import ModelConfig

GROUPS: dict[Condition, tuple[str, ...]] = {
    "attention_only": ("attention",),
    "mlp_only": ("mlp",),
    "all_layer": ("attention", "mlp"),
}


@dataclass(frozen=True)
class Weight:
    """One weight: `[out, in]` as in Hugging Face files, and for one layer when it is stacked."""

    path: str  # module path in our tree; layer weights are stacked under "layers"
    hf_key: str  # with {layer} when there is one a layer
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, one a dimension; see jaxlora.sharding
    lora_group: str | None = None  # "attention", "mlp", "output_head"; None: never adapted

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf_key

    @property
    def name(self) -> str:
        """The module's own name, such as `q_proj`."""
        return self.path.rpartition(".")[2]


# Products of one input, computed as one: fuller products, and nothing to put together again in each step.
JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def parameter_table(config: ModelConfig, joined: bool = False) -> list[Weight]:
    """All weights of a dense Qwen3, in the order of the forward pass.

    Args:
      joined: the form of `jaxlora.generate.weights`, with the matrices of `JOINED` one above the other.
    """
    hidden, vocab, ffn = config.hidden_size, config.vocab_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim

    def layer(path: str, shape, axes, group=None) -> Weight:
        return Weight(f"layers.{path}", f"model.layers.{{layer}}.{path}.weight", shape, axes, group)

    table = [
        Weight("embed_tokens", "model.embed_tokens.weight", (vocab, hidden), ("vocab", "embed")),
        layer("input_layernorm", (hidden,), (None,)),
        layer("self_attn.q_proj", (heads, hidden), ("heads", "embed"), "attention"),
        layer("self_attn.k_proj", (kv_heads, hidden), ("kv_heads", "embed"), "attention"),
        layer("self_attn.v_proj", (kv_heads, hidden), ("kv_heads", "embed"), "attention"),
        layer("self_attn.q_norm", (config.head_dim,), (None,)),
        layer("self_attn.k_norm", (config.head_dim,), (None,)),
        layer("self_attn.o_proj", (hidden, heads), ("embed", "heads"), "attention"),
        layer("post_attention_layernorm", (hidden,), (None,)),
        layer("mlp.gate_proj", (ffn, hidden), ("mlp", "embed"), "mlp"),
        layer("mlp.up_proj", (ffn, hidden), ("mlp", "embed"), "mlp"),
        layer("mlp.down_proj", (hidden, ffn), ("embed", "mlp"), "mlp"),
        Weight("norm", "model.norm.weight", (hidden,), (None,)),
    ]
    if joined:
        parts = {f"layers.{part}" for group in JOINED.values() for part in group}
        sizes = {"self_attn.qkv_proj": heads + 2 * kv_heads, "mlp.gate_up_proj": 2 * ffn}
        table = [weight for weight in table if weight.path not in parts]
        table += [layer(path, (size, hidden), (None, "embed")) for path, size in sizes.items()]
    if not config.tie_word_embeddings:
        table.append(Weight("lm_head", "lm_head.weight", (vocab, hidden), ("vocab", "embed"), "output_head"))
    return table


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the base, embeddings included, a tied head counted once."""
    return sum(_copies(w, config) * math.prod(w.shape) for w in parameter_table(config))


def count_matrix_parameters(config: ModelConfig) -> int:
    """N of "2N FLOPs a token": weights that multiply activations, with the head, without the embedding."""
    table = parameter_table(config)
    matrices = sum(_copies(w, config) * math.prod(w.shape) for w in table if w.lora_group)
    return matrices + (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)


def _copies(weight: Weight, config: ModelConfig) -> int:
    return config.num_hidden_layers if weight.stacked else 1
