"""Ranks meshes and remat choices by arithmetic alone, so that only the best need compiling.

for choice in candidates(model, lora, slice_named("v5e-8"), tokens=2720): ...   # fastest first
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxlora.config import LoraConfig, MeshConfig, Remat, RunConfig
from jaxlora.models.config import ModelConfig
from jaxlora.models.parameters import count_parameters, parameter_table
from jaxlora.models.qwen3 import is_adapted, kept_per_token
from jaxlora.plan.chips import Slice
from jaxlora.plan.roofline import BACKWARD_PASSES, Roofline, attention_flops, keys_seen, roofline
from jaxlora.train.loss import CHUNK

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

    The base is bfloat16. Weights are gathered over `fsdp` in the forward and the backward pass. Activations
    are summed over `tensor` after o_proj and down_proj, and in the backward pass for each of the five
    projections that read the residual stream. Keys and values are gathered over the token shards.
    """
    shards = mesh.data * mesh.fsdp
    block = math.lcm(TOKEN_BLOCK * shards, multiple)
    length = math.ceil(tokens / buffers / block) * block
    local = members * length / shards
    again = remat is True  # products and attention are computed once more
    table = parameter_table(model)
    layers = model.num_hidden_layers
    layer_weights = layers * sum(math.prod(w.shape) for w in table if w.stacked and len(w.shape) == 2)
    head_weights = model.vocab_size * model.hidden_size
    adapter = members * sum(
        lora.rank * sum(w.shape) * (layers if w.stacked else 1) for w in table if is_adapted(w, lora)
    )
    kv_width = 2 * model.num_key_value_heads * model.head_dim // mesh.tensor

    products = (2 + again) * 2 * layer_weights + 2 * 2 * head_weights
    flops = local * products / mesh.tensor
    passes = 1 + again + BACKWARD_PASSES
    flops += attention_flops(model, local, keys_seen(length, members, shards), passes) / mesh.tensor

    def gather(size: float, ways: int) -> float:
        return size * (ways - 1) / ways

    weights = BF16 * (2 * layer_weights + head_weights) / mesh.tensor
    stream = BF16 * local * model.hidden_size
    sums = (2 + 2 * again + 5) * layers
    ici = gather(weights, mesh.fsdp)
    ici += sums * 2 * gather(stream, mesh.tensor)
    keys_and_values = gather(BF16 * members * length * kv_width, shards) if members % shards else 0
    ici += (3 + again) * layers * keys_and_values  # of whole lines a chip has its own
    ici += 2 * gather(BF16 * adapter, shards)

    kept, saved = _kept_bytes(model, False, mesh.tensor), _kept_bytes(model, remat, mesh.tensor)
    activations = local * layers * saved
    # A gathered weight is written and read; each kept activation is written once and read once.
    hbm = (
        weights * (2 if mesh.fsdp > 1 else 1)
        + 2 * activations
        + 2 * local * layers * kept
        + 7 * FLOAT32 * adapter
    )
    head_chunk = 2 * FLOAT32 * min(local, CHUNK) * model.vocab_size / mesh.tensor
    memory = BF16 * count_parameters(model) / (mesh.fsdp * mesh.tensor) + 4 * FLOAT32 * adapter
    memory += activations + head_chunk + BF16 * head_weights / mesh.tensor + local * kept
    memory += keys_and_values * (1 if again else layers)  # kept for the backward pass as they were gathered
    memory += BF16 * head_weights / mesh.tensor if mesh.fsdp > 1 else 0  # the embedding is gathered, too
    best = roofline(slice_, buffers * flops, buffers * hbm, buffers * ici)
    return Choice(mesh, remat, buffers, length, best, memory)


def _kept_bytes(model: ModelConfig, remat: Remat, tensor: int) -> float:
    """Bytes that one chip keeps of one token in one layer."""
    whole, split = kept_per_token(model, remat)
    return BF16 * (whole + split / tensor)
