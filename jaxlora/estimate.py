"""Estimate the cost of a training step on a TPU slice by arithmetic alone, and pick the fastest mesh.

The GPUs of one host are connected so fast that replicating the base is fastest wherever it fits.

    best = roofline(slice_named("v5e-8"), flops=20e12, hbm_bytes=60e9, ici_bytes=27e9)
    best.seconds, best.bound        # 0.27, "interconnect"
    candidates(model, lora, slice_named("v5e-8"), tokens=2720, multiple=128)[0].mesh   # the fastest
    config = mesh_here(config, model)               # with the mesh that a run on this machine would use

Nothing is compiled here: `jaxlora.plan` compiles the few most promising choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from jaxlora.config import LoraConfig, MeshConfig, Remat, RunConfig
from jaxlora.models.decoder import ModelSpec, kept_per_token
from jaxlora.models.families import active_size, count_parameters, parameter_table
from jaxlora.models.grouped import rows_of
from jaxlora.models.head import CHUNK
from jaxlora.models.quantised import Scheme, bits_of, pick_scheme
from jaxlora.models.spec import ModelConfig, Weight
from jaxlora.runtime.devices import Slice, devices_here, memory_of, slice_of
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import SHARD_LORA_FROM_RANK

What = Literal["lora", "full"]  # train adapters on a frozen base, or every parameter

BF16, FLOAT32 = 2, 4  # bytes
REMATS: tuple[Remat, ...] = (False, "elementwise", True)
TOKEN_BLOCK = 128  # of the splash kernel: each chip's share of a buffer is a multiple of it
ROW_TOKENS = 340  # mean length of the study's rows
EQUAL = 1.05  # step times within this ratio cannot be told apart by the estimate
FULL = 0.9  # usable share of a chip's memory: the estimate is accurate to about a tenth
REACHED = 0.75  # share of peak FLOPs and memory bandwidth that well-tuned programs sustain
# Memory passes for a layer's experts besides their products, counted in programs compiled for four meshes: a
# forward pass's over all rows, and a step's over a chip's weights, to slice them out of the stacked arrays.
EXPERT_PASSES, CUTS = 12, 6
HIDDEN = 0.5  # share of the time of collectives that overlaps with products

# The splash attention's two backward kernels compute 3 + 4 products, its forward kernel 2.
BACKWARD_PASSES = 3.5


# --- The roofline -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """Seconds that one execution of a program spends on each of three resources.

    They are assumed to overlap fully, so the slowest is a lower bound on the program's time.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The lower bound; do not budget with it."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def likely(self) -> float:
        """The time at realistic rates: 75% of the peaks, and half of the collectives' time not overlapped.

        A rule of thumb, not verified by a run on a real slice.
        """
        return max(self.compute, self.memory) / REACHED + (1 - HIDDEN) * self.interconnect

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(slice_: Slice, flops: float, hbm_bytes: float, ici_bytes: float) -> Roofline:
    """The three times for one chip's work."""
    chip = slice_.chip
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_rate, ici_bytes / slice_.ici_rate)


def attention_flops(config: ModelConfig, queries: float, keys: float, passes: float) -> float:
    """FLOPs of attention: 2 products x 2 x heads x head_dim x queries x keys, in each layer and pass.

    Args:
      keys: number of keys that a query sees; about half of them under a causal mask.
      passes: 1 for the forward pass; `BACKWARD_PASSES` for the backward pass.
    """
    return (
        passes * 4 * config.num_attention_heads * config.head_dim * queries * keys * config.num_hidden_layers
    )


def keys_seen(length: int, shards: int) -> float:
    """Mean number of keys seen by a query of the slowest chip, in a buffer split over `shards` chips.

    The chip with the last tokens of the buffer sees the most keys, and the others wait for it.
    """
    return length * (1 - 0.5 / shards)


# --- Choices ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A mesh, a remat setting and a number of micro-batches, with the estimate for an optimizer step."""

    mesh: MeshConfig
    remat: Remat
    buffers: int  # micro-batches of a step (gradient accumulation)
    tokens: int  # length of each buffer
    best: Roofline
    memory: float  # bytes per chip
    resting: float  # the part of it that stays between steps: weights and optimizer state


def candidates(
    model: ModelConfig,
    lora: LoraConfig,
    slice_: Slice,
    tokens: float,
    multiple: int,
    what: What = "lora",
    scheme: Scheme | None = None,
    longest: int | None = None,
    row_tokens: float | None = None,
) -> list[Choice]:
    """Every mesh of the slice with every remat setting and 1, 2 or 4 micro-batches, fastest first.

    Args:
      lora: the adapters; ignored if every parameter is trained.
      tokens: real tokens of an optimizer step.
      multiple: buffer lengths are multiples of this and of what the mesh requires.
      what: which parameters are trained.
      scheme: the quantisation of the base, if any.
      longest: most tokens in a line of a buffer; a step with more is split into more micro-batches.
      row_tokens: mean tokens of a row, if every chip has its own lines (GPUs), where attention kernels work
        within rows.
    """
    choices = [
        estimate(model, lora, slice_, mesh, remat, buffers, tokens, multiple, what, scheme, row_tokens)
        for mesh in meshes(model, slice_.n_chips)
        if model.num_key_value_heads % mesh.tensor == 0
        for remat in REMATS
        for buffers in _micro_batches(tokens / (1 if row_tokens is None else mesh.data * mesh.fsdp), longest)
    ]
    return _ranked(choices)


def _micro_batches(line_tokens: float, longest: int | None) -> list[int]:
    """Numbers of micro-batches to try for a step with this many tokens in a line."""
    least = 1 if longest is None else math.ceil(line_tokens / longest)
    return [least, 2 * least, 4 * least]


def _ranked(choices: list[Choice]) -> list[Choice]:
    """Sort fastest first. Choices that the estimate cannot tell apart from the fastest remaining one are
    sorted by simplicity, then by memory.
    """
    left = sorted(choices, key=lambda choice: choice.best.likely)
    ranked: list[Choice] = []
    while left:
        equal = [c for c in left if c.best.likely <= EQUAL * left[0].best.likely]
        ranked += sorted(equal, key=lambda c: (c.buffers, REMATS.index(c.remat), c.memory))
        left = left[len(equal) :]
    return ranked


def with_mesh(config: RunConfig, model: ModelConfig, slice_: Slice | None) -> RunConfig:
    """The configuration with its mesh filled in: the one it names, or the one estimated to be fastest.

    The choice depends only on the configuration and the slice, so all runs of a study and all hosts make the
    same one. Rows are assumed to be as long as the study's.

    Args:
      slice_: None if the devices are not a known TPU slice; the mesh is then left unchanged, and fsdp takes
        all devices.
    """
    if slice_ is None or config.mesh != MeshConfig():
        return config
    train = config.train
    tokens = train.batch_rows * ROW_TOKENS
    scheme = pick_scheme(config.model, slice_.chip, training=True)
    for choice in candidates(model, config.lora, slice_, tokens, train.buffer_multiple, train.what, scheme):
        fits = choice.memory < FULL * slice_.chip.hbm_bytes
        if fits and choice.remat == config.model.remat and choice.buffers == 1:
            return replace(config, mesh=choice.mesh)
    return config


def mesh_here(config: RunConfig, model: ModelConfig) -> RunConfig:
    """The configuration with its mesh filled in for this machine's devices.

    On TPUs as in `with_mesh`; on several GPUs, copies of the base, each split over as few GPUs as hold it.

    Raises:
      UserError: experts are to be split, but the model has none.
    """
    if config.mesh.expert not in (0, 1) and model.experts is None:
        raise UserError(
            f"config.mesh.expert: {config.mesh.expert}, but this model has no experts; give mesh.data instead"
        )
    devices = devices_here()
    if devices[0].platform != "gpu":
        return with_mesh(config, model, slice_of(devices))
    if len(devices) == 1 or config.mesh != MeshConfig():
        return config
    return replace(config, mesh=mesh_of_gpus(config, model, len(devices), memory_of(devices[0]) or 0))


def mesh_of_gpus(config: RunConfig, model: ModelConfig, n: int, memory: float) -> MeshConfig:
    """The mesh of n GPUs with `memory` bytes each: the smallest `fsdp` that should fit, and copies of it."""
    train = config.train
    tokens = math.ceil(max(1, train.batch_rows / n) * ROW_TOKENS) * n
    scheme = pick_scheme(config.model, training=True)
    for fsdp in range(1, n):
        if n % fsdp == 0:
            mesh = MeshConfig(n // fsdp, fsdp, 1)
            share = _Share(model, config.lora, train.what, mesh, config.model.remat, 1, tokens, scheme, 1.0)
            if _memory(share) < FULL * memory:
                return mesh
    return MeshConfig(1, n, 1)


def factors(n: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) whose product is n."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [(n // f // t, f, t) for f in divisors for t in divisors if n % (f * t) == 0]


def meshes(model: ModelConfig, n: int) -> list[MeshConfig]:
    """Every mesh of n chips; for a model with experts also those that split them over copies of the rest."""
    found = [MeshConfig(*sizes) for sizes in factors(n)]
    if model.experts is None:
        return found
    split = []
    for mesh in found:
        for ways in range(2, mesh.data + 1):
            if mesh.data % ways == 0 and model.experts.num_experts % ways == 0:
                split.append(replace(mesh, data=mesh.data // ways, expert=ways))
    return found + split


# --- Work and memory of a step ------------------------------------------------------------------------------


def estimate(
    model: ModelConfig,
    lora: LoraConfig,
    slice_: Slice,
    mesh: MeshConfig,
    remat: Remat,
    buffers: int,
    tokens: float,
    multiple: int,
    what: What = "lora",
    scheme: Scheme | None = None,
    row_tokens: float | None = None,
) -> Choice:
    """Work and memory of one optimizer step on one chip, counted from the shapes.

    Products are computed in bfloat16. With LoRA the base is kept only in bfloat16, or with quantised layers;
    adapters, their gradients and moments are float32. An 8-bit product counts as the fraction of a bfloat16
    product that its time amounts to; weights dequantised for a product are written and read once more. In
    full fine-tuning every parameter has a float32 master weight, gradient and two moments (16 bytes), and a
    bfloat16 copy for computation (2 bytes).

    Args:
      lora: the adapters; ignored if every parameter is trained.
      buffers: micro-batches of the step.
      tokens: real tokens of the step; each buffer is padded to a multiple of `multiple` and of what the mesh
        requires.
      what: which parameters are trained.
      scheme: the quantisation of the base, if any.
      row_tokens: as in `candidates`.
    """
    block = math.lcm(TOKEN_BLOCK * mesh.data * mesh.fsdp * (mesh.expert or 1), multiple)
    length = math.ceil(tokens / buffers / block) * block
    rate = slice_.chip.int8_flops / slice_.chip.flops if scheme is not None and scheme.activations else 1.0
    share = _Share(model, lora, what, mesh, remat, buffers, length, scheme, rate, row_tokens)
    best = roofline(
        slice_,
        buffers * _flops(share),
        buffers * _hbm_bytes(share) + _update_bytes(share),
        buffers * _interconnect_bytes(share),
    )
    return Choice(mesh, remat, buffers, length, best, _memory(share), _resting(share))


@dataclass(frozen=True)
class _Share:
    """One chip's share of the work on one buffer. Unless noted, weights are totals over all chips."""

    model: ModelConfig
    lora: LoraConfig
    what: What
    mesh: MeshConfig
    remat: Remat
    buffers: int  # micro-batches of the step
    length: int  # tokens of the buffer
    scheme: Scheme | None  # of a quantised base
    rate: float  # speed of products with the layers, relative to bfloat16
    row_tokens: float | None = None  # mean length of rows if attention is per row; None: over the buffer

    @property
    def shards(self) -> int:
        """Number of chips that the tokens are split over."""
        return self.mesh.data * self.mesh.fsdp * self.ways

    @property
    def ways(self) -> int:
        """Number of chips that the experts are split over."""
        return self.mesh.expert or 1

    @property
    def tokens(self) -> float:
        return self.length / self.shards

    @property
    def again(self) -> bool:
        """Whether the backward pass recomputes products and attention."""
        return self.remat is True

    @property
    def full(self) -> bool:
        """Whether every parameter is trained."""
        return self.what == "full"

    @cached_property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @property
    def own_parameters(self) -> float:
        """Parameters that one chip holds: split over `fsdp` and `tensor`, replicated over `data`.

        Experts' parameters are also split over `expert`; the others are replicated over it.
        """
        return (self.parameters - self.elsewhere) / (self.mesh.fsdp * self.mesh.tensor)

    @cached_property
    def expert_weights(self) -> int:
        experts = [w for w in parameter_table(self.model) if w.experts]
        return self.model.num_hidden_layers * sum(math.prod(w.shape) for w in experts)

    @property
    def elsewhere(self) -> float:
        """Parameters of the experts of other chips."""
        return self.expert_weights * (1 - 1 / self.ways)

    @cached_property
    def layer_weights(self) -> int:
        """Weights in the layers' matrices, including all experts."""
        return self.model.num_hidden_layers * sum(math.prod(w.shape) for w in self._matrices)

    @cached_property
    def active_weights(self) -> int:
        """Weights in the layers' matrices that one token is multiplied with."""
        return self.model.num_hidden_layers * sum(active_size(w, self.model) for w in self._matrices)

    @property
    def _matrices(self) -> list[Weight]:
        """The matrices of a layer."""
        return [w for w in parameter_table(self.model) if w.stacked and len(w.shape) > 1]

    @property
    def saved(self) -> float:
        """Bytes that quantising the layers' weights saves, over all chips."""
        return 0.0 if self.scheme is None else self.layer_weights * (BF16 - bits_of(self.scheme) / 8)

    @property
    def head_weights(self) -> int:
        return self.model.vocab_size * self.model.hidden_size

    @cached_property
    def adapter_weights(self) -> int:
        if self.full:
            return 0
        return sum(map(self._spec.adapter_size, self._spec.adapted))

    @cached_property
    def expert_adapters(self) -> int:
        """Weights in the experts' adapters."""
        return 0 if self.full else sum(self._spec.adapter_size(w) for w in self._spec.adapted if w.experts)

    @cached_property
    def _spec(self) -> ModelSpec:
        return ModelSpec(self.model, self.lora)

    @property
    def own_adapters(self) -> float:
        """Adapter weights that one chip holds: all except those of other chips' experts; from rank
        `SHARD_LORA_FROM_RANK` on, the others are split over `fsdp`."""
        dense = self.adapter_weights - self.expert_adapters
        return dense / (self.mesh.fsdp if self.splits_adapters else 1) + self.expert_adapters / self.ways

    @property
    def splits_adapters(self) -> bool:
        return not self.full and self.lora.rank >= SHARD_LORA_FROM_RANK

    @cached_property
    def active_adapters(self) -> float:
        """Adapter weights that one token is multiplied with."""
        if not self.expert_adapters or self.model.experts is None:
            return self.adapter_weights
        share = self.model.experts.num_experts_per_tok / self.model.experts.num_experts
        return self.adapter_weights - self.expert_adapters * (1 - share)

    @property
    def gathered_keys(self) -> float:
        """Bytes of keys and values that a layer gathers from the other chips that share the buffer."""
        if self.row_tokens is not None:
            return 0.0
        width = 2 * self.model.num_key_value_heads * self.model.head_dim // self.mesh.tensor
        return _gathered(BF16 * self.length * width, self.shards)

    def kept(self, remat: Remat) -> float:
        """Bytes that one chip keeps per token and layer."""
        whole, split = kept_per_token(self.model, remat, math.ceil(self.tokens), self.ways)
        return BF16 * (whole + split / self.mesh.tensor)

    @property
    def one_layer(self) -> float:
        """Bytes of one layer's weights as used by a chip, gathered over `fsdp`."""
        return BF16 * (self.layer_weights - self.elsewhere) / self.model.num_hidden_layers / self.mesh.tensor

    @property
    def activations(self) -> float:
        """Bytes of activations kept for the backward pass."""
        return self.tokens * self.model.num_hidden_layers * self.kept(self.remat)


def _gathered(size: float, ways: int) -> float:
    """Bytes that a chip receives in an all-gather of `size` bytes split over `ways` chips."""
    return size * (ways - 1) / ways


def _flops(share: _Share) -> float:
    """FLOPs of products and attention: per token 4N with LoRA plus 6 per adapter weight, or 6N in full
    fine-tuning.

    For N weights in matrices these are 2N in the forward pass, 2N for the gradients of activations and, if
    the weights are trained, 2N for theirs. Remat repeats the layers' 2N of the forward pass. N counts only
    the experts that a token is routed to.
    """
    products = (2 + share.again + share.full) * 2 * share.active_weights / share.rate
    products += (2 + share.full) * 2 * share.head_weights + (3 + share.again) * 2 * share.active_adapters
    passes = 1 + share.again + BACKWARD_PASSES
    # With rows of mixed lengths, a token sees about as many keys as a mean row has tokens, not half as many.
    keys = keys_seen(share.length, share.shards) if share.row_tokens is None else share.row_tokens
    attention = attention_flops(share.model, share.tokens, keys, passes)
    return share.tokens * products / share.mesh.tensor + attention / share.mesh.tensor


def _read_weights(share: _Share) -> float:
    """Bytes of weights read by one chip's products: the layers twice, the head once."""
    layers = share.layer_weights - share.elsewhere
    return (BF16 * (2 * layers + share.head_weights) - 2 * share.saved) / share.mesh.tensor


def _interconnect_bytes(share: _Share) -> float:
    """Bytes that one chip receives for one buffer.

    FSDP gathers weights in both the forward and the backward pass. Tensor parallelism all-reduces activations
    after o_proj and down_proj, and in the backward pass the gradients of the inputs of q, k, v and of gate,
    up, locally summed over the projections of an input (with 8-bit products, separately for each of the
    five). Keys and values are gathered from all chips that share a buffer, and adapter gradients are summed
    over these chips. Gradients of fully trained weights are summed in bfloat16, the dtype of their products:
    a reduce-scatter over `fsdp`, then an all-reduce of each chip's part over `data`. Chips that split the
    experts gather their tokens and reduce-scatter the sums, in both passes.
    """
    stream = BF16 * share.tokens * share.model.hidden_size
    each = share.scheme is not None and share.scheme.activations
    sums = (2 + 2 * share.again + (5 if each else 2)) * share.model.num_hidden_layers
    size = _gathered(_read_weights(share), share.mesh.fsdp)
    size += sums * 2 * _gathered(stream, share.mesh.tensor)
    size += (3 + share.again) * share.model.num_hidden_layers * share.gathered_keys
    moves = (4 + 2 * share.again) * share.model.num_hidden_layers
    size += moves * _gathered(share.ways * stream, share.ways)
    if share.full:
        size += _gathered(BF16 * (share.parameters - share.elsewhere) / share.mesh.tensor, share.mesh.fsdp)
        size += 2 * _gathered(BF16 * share.own_parameters, share.mesh.data)
    dense = share.adapter_weights - share.expert_adapters
    if share.splits_adapters:
        size += 2 * _gathered(FLOAT32 * dense, share.mesh.fsdp)
    size += 2 * _gathered(BF16 * share.expert_adapters / share.ways, share.mesh.data * share.mesh.fsdp)
    return size + 2 * _gathered(BF16 * dense, share.shards)


def _hbm_bytes(share: _Share) -> float:
    """Bytes that one chip reads and writes for one buffer.

    Gathered weights, kept activations and gradients of fully trained weights are written, then read. The
    experts make many passes over arrays of the maximum number of rows, twice as many in the backward pass.
    """
    kept = share.tokens * share.model.num_hidden_layers * share.kept(False)
    weights = _read_weights(share) * (2 if share.mesh.fsdp > 1 else 1)
    if share.full:
        weights += 2 * BF16 * (share.parameters - share.elsewhere) / share.mesh.tensor
    if share.model.experts is not None:
        experts = share.model.experts
        rows = rows_of(experts, math.ceil(share.tokens), share.ways)
        width = share.model.hidden_size + experts.moe_intermediate_size / share.mesh.tensor
        kept += EXPERT_PASSES * (3 + share.again) / 2 * BF16 * share.model.num_hidden_layers * rows * width
        weights += CUTS * share.one_layer * share.model.num_hidden_layers / share.mesh.fsdp
    if share.scheme is not None and not share.scheme.activations:
        weights += 2 * 2 * BF16 * share.layer_weights / share.mesh.tensor
    return weights + 2 * share.activations + 2 * kept + 7 * FLOAT32 * share.own_adapters


def _update_bytes(share: _Share) -> float:
    """Bytes that one chip reads and writes per step to update fully trained weights.

    It reads gradient, weight and two moments in float32, and writes all but the gradient, and the bfloat16
    copy. (Adapters are so small that `_hbm_bytes` counts their update with every buffer.)
    """
    return (7 * FLOAT32 + BF16) * share.own_parameters if share.full else 0


def _resting(share: _Share) -> float:
    """Bytes on one chip that are allocated both during and between steps.

    In full fine-tuning each of the chip's own parameters takes 16 bytes in float32 besides its bfloat16 copy,
    and 4 more if gradients are accumulated over several micro-batches.
    """
    size = BF16 * share.own_parameters - share.saved / (share.mesh.fsdp * share.mesh.tensor)
    if share.full:
        size += (5 if share.buffers > 1 else 4) * FLOAT32 * share.own_parameters
    return size + 4 * FLOAT32 * share.own_adapters  # weights, gradients and two moments


def _memory(share: _Share) -> float:
    """Peak bytes on one chip, in the backward pass.

    In full fine-tuning the head's gradient is accumulated in float32 over chunks of positions before it is
    split over `fsdp`.
    """
    model, mesh = share.model, share.mesh
    head = BF16 * share.head_weights / mesh.tensor
    size = _resting(share) + share.activations
    if share.full:
        size += FLOAT32 * share.head_weights / mesh.tensor
    size += 2 * FLOAT32 * min(share.tokens, CHUNK) * model.vocab_size / mesh.tensor  # logits and gradient
    size += head + share.tokens * share.kept(False)  # the head, and all activations of one layer
    # Gathered keys and values are kept for the backward pass.
    size += share.gathered_keys * (1 if share.again else model.num_hidden_layers)
    if model.experts is not None:  # kernels need whole matrices: a layer's are sliced out and copied once
        size += 2 * share.one_layer
    return size + (head if mesh.fsdp > 1 else 0)  # the embedding is gathered as well
