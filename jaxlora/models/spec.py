"""A model without its arrays: its shape and its table of weights.

A family (`jaxlora.models.families`) reads a Hugging Face `config.json` into a `ModelConfig` and declares each
weight once as a `Weight`. Loading, sharding, adapter placement, export, merging and parameter counts all use
that table; a weight that it does not name is an error.

    for weight in parameter_table(config):
        print(weight.path, weight.hf_key, weight.shape)   # such as: norm model.norm.weight (4096,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic.dataclasses
from pydantic import ConfigDict, Field

from jaxlora.config import Condition
from jaxlora.runtime.errors import UserError

Size = Annotated[int, Field(gt=0, le=1 << 24, strict=True)]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Llama3Scaling:
    """Llama 3's scaling of rotary frequencies, with the names of Hugging Face's `rope_scaling`."""

    factor: Annotated[float, Field(ge=1, strict=True)]
    low_freq_factor: Annotated[float, Field(gt=0, strict=True)]
    high_freq_factor: Annotated[float, Field(gt=0, strict=True)]
    original_max_position_embeddings: Size

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Experts:
    """The MLP of a mixture of experts: every token goes to a few of them. Names as in Hugging Face files."""

    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size  # hidden units of one expert
    norm_topk_prob: Annotated[bool, Field(strict=True)]  # whether a token's shares sum to one

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError("num_experts_per_tok must not be above num_experts")


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ModelConfig:
    """The shape of a decoder, with the names of Hugging Face's `config.json`."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=1024, strict=True)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    rope_theta: Annotated[float, Field(gt=1)] = 1_000_000.0
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    max_position_embeddings: Size = 40960
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    model_type: str = "qwen3"  # the family's name
    rope_scaling: Llama3Scaling | None = None
    experts: Experts | None = None  # None: every layer has one MLP

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even, because rotary embedding turns pairs")


def check_positions(config: ModelConfig, longest: int, what: str) -> None:
    """Refuse texts with more tokens than the model has positions: it was never trained beyond them.

    Args:
      longest: tokens of the longest text, including everything that will be added to it.
      what: begins the error message: names the text and the setting that shortens it.

    Raises:
      UserError: it does not fit.
    """
    if longest > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise UserError(f"{what} take {longest:,} tokens, but the model has {most:,} positions")


# Implementations of experts' products, see `models.grouped`.
How = Literal["auto", "loop", "ragged_dot", "triton", "mosaic"]
PRODUCT = "product"  # checkpoint name of products' results, which a remat policy can keep

# The groups of weights that each named placement adapts.
GROUPS: dict[Condition, tuple[str, ...]] = {
    "attention_only": ("attention",),
    "mlp_only": ("mlp",),
    "all_layer": ("attention", "mlp"),
}


@dataclass(frozen=True)
class Weight:
    """One weight, `[out, in]` as in Hugging Face files; the shape is per layer if it is stacked.

    A bias `[out]` is a separate entry, with the path of its module and `array="bias"`. An experts' weight is
    `[experts, out, in]`, stored in files as one tensor per expert.
    """

    path: str  # module path in our tree; layer weights are stacked under "layers"
    hf_key: str  # with {layer} if there is one per layer, and {expert} if one per expert
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, one per dimension; see jaxlora.sharding
    lora_group: str | None = None  # "attention", "mlp", "output_head"; None: never adapted
    array: str = "weight"  # its name in the module, "weight" or "bias"

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf_key

    @property
    def experts(self) -> int:
        """Number of experts that have this weight; 0: not an experts' weight."""
        return self.shape[0] if len(self.shape) == 3 else 0

    def keys(self, layer: int | None = None) -> list[str]:
        """Its names in Hugging Face files: one, or one per expert."""
        numbers = range(self.experts) if self.experts else (None,)
        return [self.hf_key.format(layer=layer, expert=number) for number in numbers]

    @property
    def name(self) -> str:
        """The module's own name, such as `q_proj`."""
        return self.path.rpartition(".")[2]

    @property
    def place(self) -> str:
        """The path of the array itself, such as `layers.self_attn.q_proj.bias`."""
        return f"{self.path}.{self.array}"


def tied_head(config: ModelConfig) -> Weight:
    """The weight that an adapter of a tied output head belongs to: the embedding in its use as the head.

    It is not a separate weight, so it is not in the table; the embedding lookup has no adapter.
    """
    shape = config.vocab_size, config.hidden_size
    return Weight("lm_head", "lm_head.weight", shape, ("vocab", "embed"), "output_head")


# Projections of the same input, fused for decoding: larger products, and nothing to concatenate.
JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class AdapterShape:
    """Rank and scale of one weight's adapter in each layer, when they vary.

    The arrays have the largest rank; in layers of lower rank the rest is zero in both A and B, so its
    gradient is exactly zero and it stays zero in training.
    """

    path: str  # of the weight
    ranks: tuple[int, ...]  # one per layer (or one, for a weight outside the layers); 0: no adapter there
    scales: tuple[float, ...]  # alpha / rank of each, or alpha / sqrt(rank) for a rank-stabilised adapter
