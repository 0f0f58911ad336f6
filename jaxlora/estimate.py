"""Ranks meshes and remat choices by arithmetic alone, so that only the best need compiling.

for choice in candidates(model, lora, slice_named("v5e-8"), tokens=2720): ...   # fastest first
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from jaxlora.config import LoraConfig, MeshConfig, Remat, RunConfig
from jaxlora.models.decoder import is_adapted, kept_per_token
from jaxlora.models.families import count_parameters, parameter_table
from jaxlora.models.head import CHUNK
from jaxlora.models.spec import ModelConfig
from jaxlora.roofline import BACKWARD_PASSES, Roofline, attention_flops, keys_seen, roofline
from jaxlora.runtime.chips import Slice

BF16, FLOAT32 = 2, 4
REMATS: tuple[Remat, ...] = (False, "elementwise", True)
TOKEN_BLOCK = 128
ROW_TOKENS = 340  # mean of the study's rows
EQUAL = 1.05  # step times of no greater ratio: the estimate cannot tell them apart
FULL = 0.9  # of a chip's memory: the estimate is good to about a tenth


@dataclass(frozen=True)
class Choice:
    """A mesh, a remat choice and a split over buffers, with the estimate of an optimizer step."""

    mesh: MeshConfig
    remat: Remat
    buffers: int  # of a step, one after another
    tokens: int  # length of a buffer
    best: Roofline
    memory: float  # bytes a chip


def candidates(
    model: ModelConfig, lora: LoraConfig, slice_: Slice, tokens: float, multiple: int, members: int = 1
) -> list[Choice]:
    """Every mesh of the slice, every kind of remat, whole and split buffers, fastest first.

    Args:
      tokens: real tokens of an optimizer step of one run.
      multiple: buffer lengths are multiples of this as well as of what the mesh asks.
      members: how many runs are trained together.
    """
    choices = [
        estimate(model, lora, slice_, MeshConfig(*mesh), remat, buffers, tokens, multiple, members)
        for mesh in factors(slice_.n_chips)
        if model.num_key_value_heads % mesh[2] == 0
        for remat in REMATS
        for buffers in (1, 2, 4)
    ]
    return _ranked(choices)


def _ranked(choices: list[Choice]) -> list[Choice]:
    """Fastest first; of those within a twentieth of the first that is left, the simpler, then the smaller."""
    left = sorted(choices, key=lambda choice: choice.best.seconds)
    ranked: list[Choice] = []
    while left:
        equal = [c for c in left if c.best.seconds <= EQUAL * left[0].best.seconds]
        ranked += sorted(equal, key=lambda c: (c.buffers, REMATS.index(c.remat), c.memory))
        left = left[len(equal) :]
    return ranked


def with_mesh(config: RunConfig, model: ModelConfig, slice_: Slice | None) -> RunConfig:
    """The configuration with a mesh in it: as given, or the one that should be fastest on this slice.

    The choice follows from the configuration alone, so that all runs of a study and all hosts make the same.
    Rows are taken to be as long as the study's.

    Args:
      slice_: None: no TPU slice of the table; the mesh stays as it is, and fsdp takes all devices.
    """
    if slice_ is None or config.mesh != MeshConfig():
        return config
    tokens = config.train.batch_rows * ROW_TOKENS
    for choice in candidates(model, config.lora, slice_, tokens, config.train.buffer_multiple):
        fits = choice.memory < FULL * slice_.chip.hbm_bytes
        if fits and choice.remat == config.model.remat and choice.buffers == 1:
            return replace(config, mesh=choice.mesh)
    return config


def factors(n: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) whose product is n."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [(n // f // t, f, t) for f in divisors for t in divisors if n % (f * t) == 0]


def estimate(
    model: ModelConfig,
    lora: LoraConfig,
    slice_: Slice,
    mesh: MeshConfig,
    remat: Remat,
    buffers: int,
    tokens: float,
    multiple: int,
    members: int = 1,
) -> Choice:
    """Work and memory of one optimizer step on one chip, counted from the shapes.

    The base is bfloat16.
    """
    block = math.lcm(TOKEN_BLOCK * mesh.data * mesh.fsdp, multiple)
    length = math.ceil(tokens / buffers / block) * block
    share = _Share(model, lora, mesh, remat, members, length)
    best = roofline(
        slice_, buffers * _flops(share), buffers * _hbm_bytes(share), buffers * _interconnect_bytes(share)
    )
    return Choice(mesh, remat, buffers, length, best, _memory(share))


@dataclass(frozen=True)
class _Share:
    """One chip's share of the work on one buffer. Weights are counted on all chips together."""

    model: ModelConfig
    lora: LoraConfig
    mesh: MeshConfig
    remat: Remat
    members: int
    length: int  # tokens of the buffer

    @property
    def shards(self) -> int:
        """Over how many chips tokens are split."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def tokens(self) -> float:
        return self.members * self.length / self.shards

    @property
    def again(self) -> bool:
        """Whether products and attention are computed once more."""
        return self.remat is True

    @cached_property
    def layer_weights(self) -> int:
        matrices = [w for w in parameter_table(self.model) if w.stacked and len(w.shape) == 2]
        return self.model.num_hidden_layers * sum(math.prod(w.shape) for w in matrices)

    @property
    def head_weights(self) -> int:
        return self.model.vocab_size * self.model.hidden_size

    @cached_property
    def adapter_weights(self) -> int:
        layers = self.model.num_hidden_layers
        adapted = [w for w in parameter_table(self.model) if is_adapted(w, self.lora)]
        return self.members * sum(
            self.lora.rank * sum(w.shape) * (layers if w.stacked else 1) for w in adapted
        )

    @property
    def gathered_keys(self) -> float:
        """Bytes of keys and values that a layer gathers from the other token shards; none of whole lines."""
        width = 2 * self.model.num_key_value_heads * self.model.head_dim // self.mesh.tensor
        size = BF16 * self.members * self.length * width
        return _gathered(size, self.shards) if self.members % self.shards else 0

    def kept(self, remat: Remat) -> float:
        """Bytes that one chip keeps of one token in one layer."""
        whole, split = kept_per_token(self.model, remat)
        return BF16 * (whole + split / self.mesh.tensor)

    @property
    def activations(self) -> float:
        """Bytes of what the backward pass finds kept."""
        return self.tokens * self.model.num_hidden_layers * self.kept(self.remat)


def _gathered(size: float, ways: int) -> float:
    """Bytes that a chip receives to gather `size` bytes which lie on so many chips."""
    return size * (ways - 1) / ways


def _flops(share: _Share) -> float:
    """Products: layers forward, backward and perhaps again, the head forward and backward; attention."""
    products = (2 + share.again) * 2 * share.layer_weights + 2 * 2 * share.head_weights
    passes = 1 + share.again + BACKWARD_PASSES
    keys = keys_seen(share.length, share.members, share.shards)
    attention = attention_flops(share.model, share.tokens, keys, passes)
    return share.tokens * products / share.mesh.tensor + attention / share.mesh.tensor


def _read_weights(share: _Share) -> float:
    """Bytes of the weights that one chip multiplies with: layers twice, the head once."""
    return BF16 * (2 * share.layer_weights + share.head_weights) / share.mesh.tensor


def _interconnect_bytes(share: _Share) -> float:
    """What one chip exchanges.

    Weights are gathered over `fsdp` in the forward and the backward pass. Activations are summed over
    `tensor` after o_proj and down_proj, and in the backward pass for each of the five projections that read
    the residual stream. Keys and values are gathered over the token shards, the adapters' gradients summed.
    """
    stream = BF16 * share.tokens * share.model.hidden_size
    sums = (2 + 2 * share.again + 5) * share.model.num_hidden_layers
    size = _gathered(_read_weights(share), share.mesh.fsdp)
    size += sums * 2 * _gathered(stream, share.mesh.tensor)
    size += (3 + share.again) * share.model.num_hidden_layers * share.gathered_keys
    return size + 2 * _gathered(BF16 * share.adapter_weights, share.shards)


def _hbm_bytes(share: _Share) -> float:
    """What one chip reads and writes: a gathered weight and each kept activation are written and read."""
    kept = share.tokens * share.model.num_hidden_layers * share.kept(False)
    weights = _read_weights(share) * (2 if share.mesh.fsdp > 1 else 1)
    return weights + 2 * share.activations + 2 * kept + 7 * FLOAT32 * share.adapter_weights


def _memory(share: _Share) -> float:
    """Bytes on one chip at the peak, the backward pass."""
    model, mesh = share.model, share.mesh
    head = BF16 * share.head_weights / mesh.tensor
    size = BF16 * count_parameters(model) / (mesh.fsdp * mesh.tensor)
    size += 4 * FLOAT32 * share.adapter_weights  # weights, gradients and two moments
    size += share.activations
    size += 2 * FLOAT32 * min(share.tokens, CHUNK) * model.vocab_size / mesh.tensor  # logits and gradient
    size += head + share.tokens * share.kept(False)  # the head, and one layer whole
    # Gathered keys and values are kept for the backward pass.
    size += share.gathered_keys * (1 if share.again else model.num_hidden_layers)
    return size + (head if mesh.fsdp > 1 else 0)  # the embedding is gathered, too
