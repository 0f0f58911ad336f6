"""What a training step costs on a TPU slice, by arithmetic alone, and which mesh should make it fastest.

GPUs of one host are joined so closely that copies of the base are fastest wherever they fit.

    best = roofline(slice_named("v5e-8"), flops=20e12, hbm_bytes=60e9, ici_bytes=27e9)
    best.seconds, best.bound        # 0.27, "interconnect"
    candidates(model, lora, slice_named("v5e-8"), tokens=2720, multiple=128)[0].mesh   # the fastest
    config = mesh_here(config, model)               # with the mesh that a run trains on, on this machine

Nothing is compiled here: `jaxlora.plan` compiles the few choices that look best.
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

What = Literal["lora", "full"]  # is trained: adapters on a frozen base, or every parameter

BF16, FLOAT32 = 2, 4  # bytes
REMATS: tuple[Remat, ...] = (False, "elementwise", True)
TOKEN_BLOCK = 128  # the splash kernel's: each chip's share of a buffer is a multiple of it
ROW_TOKENS = 340  # mean of the study's rows
EQUAL = 1.05  # the estimate cannot tell step times apart whose ratio is no greater
FULL = 0.9  # usable share of a chip's memory: the estimate is good to about a tenth
REACHED = 0.75  # of the peak rates of products and of memory: what well-tuned programs sustain
# Of a layer's experts, as counted in programs compiled for four meshes: how often a forward pass goes over
# all rows, and a step over the weights on a chip, beside the products: it cuts them out of the stacked ones.
EXPERT_PASSES, CUTS = 12, 6
HIDDEN = 0.5  # of the time of collectives lies behind products

# The splash kernel's two backward kernels take 3 + 4 products where the forward pass takes 2.
BACKWARD_PASSES = 3.5


# --- The roofline -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """Seconds that one run of a program spends on each of three resources.

    They are taken to overlap fully, so the slowest of them is a lower bound on the program's time.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """At best: a bound, not to be budgeted with."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def likely(self) -> float:
        """At rates that are reached: 75% of the peaks, and half of the collectives waited for.

        A rule of thumb. No run on a real slice stands behind it.
        """
        return max(self.compute, self.memory) / REACHED + (1 - HIDDEN) * self.interconnect

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(slice_: Slice, flops: float, hbm_bytes: float, ici_bytes: float) -> Roofline:
    """The three times of one chip's work."""
    chip = slice_.chip
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_rate, ici_bytes / slice_.ici_rate)


def attention_flops(config: ModelConfig, queries: float, keys: float, passes: float) -> float:
    """FLOPs of attention: 2 products x 2 x heads x head_dim x queries x keys, in each layer and pass.

    Args:
      keys: how many keys a query sees; about half of them under a causal mask.
      passes: 1 for the forward pass; `BACKWARD_PASSES` for the backward pass.
    """
    return (
        passes * 4 * config.num_attention_heads * config.head_dim * queries * keys * config.num_hidden_layers
    )


def keys_seen(length: int, shards: int) -> float:
    """How many keys a query of the slowest chip sees on average, in a buffer split over `shards` chips.

    The chip with the last tokens of the buffer sees the most keys, and the others wait for it.
    """
    return length * (1 - 0.5 / shards)


# --- Choices ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A mesh, a remat setting and a number of micro-batches, with the estimate of an optimizer step."""

    mesh: MeshConfig
    remat: Remat
    buffers: int  # micro-batches of a step, whose gradients are accumulated
    tokens: int  # length of each buffer
    best: Roofline
    memory: float  # bytes per chip
    resting: float  # of them what stays between steps: weights and optimizer's state


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
      lora: the adapters; ignored where every parameter is trained.
      tokens: real tokens of an optimizer step.
      multiple: buffer lengths are multiples of this as well as of what the mesh requires.
      what: which parameters are trained.
      scheme: of a quantised base.
      longest: most tokens of a line of a buffer; more micro-batches are taken where a step has more.
      row_tokens: mean tokens of a row, where every chip has lines of its own (GPUs), whose kernels attend
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
    """Numbers of micro-batches to try for a step with so many tokens in a line."""
    least = 1 if longest is None else math.ceil(line_tokens / longest)
    return [least, 2 * least, 4 * least]


def _ranked(choices: list[Choice]) -> list[Choice]:
    """Fastest first. Of choices too close to the fastest one left to tell apart, the simplest comes first,
    then the one that needs the least memory.
    """
    left = sorted(choices, key=lambda choice: choice.best.likely)
    ranked: list[Choice] = []
    while left:
        equal = [c for c in left if c.best.likely <= EQUAL * left[0].best.likely]
        ranked += sorted(equal, key=lambda c: (c.buffers, REMATS.index(c.remat), c.memory))
        left = left[len(equal) :]
    return ranked


def with_mesh(config: RunConfig, model: ModelConfig, slice_: Slice | None) -> RunConfig:
    """The configuration with its mesh filled in: the one it names, or the one that should be fastest.

    The choice depends on nothing but the configuration and the slice, so all runs of a study and all hosts
    make the same one. Rows are assumed to be as long as the study's.

    Args:
      slice_: None if the devices are no known TPU slice; the mesh is then left as it is, and fsdp takes all
        devices.
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

    On TPUs as `with_mesh`; on several GPUs copies of the base, each split over as few as hold it.

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
    """The mesh of n GPUs with so many bytes each: the smallest `fsdp` whose step should fit, and copies."""
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
    """Every mesh of n chips; of a model with experts also those that split them over copies of the rest."""
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

    Products are computed in bfloat16. With LoRA the base is kept in bfloat16 alone, or its layers quantised,
    and adapters, their gradients and moments in float32. Of products of 8-bit numbers each counts as the
    share of one in bfloat16 that it takes; weights that are turned back for a product are written and read
    once more. In full fine-tuning every parameter has a float32 master weight, a
    gradient and two moments (16 bytes), and a bfloat16 copy for computing (2 bytes).

    Args:
      lora: the adapters; ignored where every parameter is trained.
      buffers: micro-batches of the step.
      tokens: real tokens of the step; each buffer is padded to a multiple of `multiple` and of what the mesh
        requires.
      what: which parameters are trained.
      scheme: of a quantised base.
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
    """One chip's share of the work on one buffer. Weights are counted over all chips together."""

    model: ModelConfig
    lora: LoraConfig
    what: What
    mesh: MeshConfig
    remat: Remat
    buffers: int  # micro-batches of the step
    length: int  # tokens of the buffer
    scheme: Scheme | None  # of a quantised base
    rate: float  # of products with the layers, relative to those in bfloat16
    row_tokens: float | None = None  # of rows that are attended each by itself; None: over the buffer

    @property
    def shards(self) -> int:
        """How many chips the tokens are split over."""
        return self.mesh.data * self.mesh.fsdp * self.ways

    @property
    def ways(self) -> int:
        """Over how many chips the experts are split."""
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
        """Parameters that one chip holds: they are split over `fsdp` and `tensor`, and copied over `data`.

        Those of experts are split over `expert` as well, and the others copied over it.
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
        """Of matrices; of all experts."""
        return self.model.num_hidden_layers * sum(math.prod(w.shape) for w in self._matrices)

    @cached_property
    def active_weights(self) -> int:
        """Of the layers' matrices those that one token multiplies with."""
        return self.model.num_hidden_layers * sum(active_size(w, self.model) for w in self._matrices)

    @property
    def _matrices(self) -> list[Weight]:
        """Those of a layer."""
        return [w for w in parameter_table(self.model) if w.stacked and len(w.shape) > 1]

    @property
    def saved(self) -> float:
        """Bytes that all chips together save because the layers' weights are quantised."""
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
        """Of the adapters' weights those of experts."""
        return 0 if self.full else sum(self._spec.adapter_size(w) for w in self._spec.adapted if w.experts)

    @cached_property
    def _spec(self) -> ModelSpec:
        return ModelSpec(self.model, self.lora)

    @property
    def own_adapters(self) -> float:
        """Weights of adapters that one chip holds: all but those of other chips' experts, and from
        `SHARD_LORA_FROM_RANK` on its part over `fsdp` of the others."""
        dense = self.adapter_weights - self.expert_adapters
        return dense / (self.mesh.fsdp if self.splits_adapters else 1) + self.expert_adapters / self.ways

    @property
    def splits_adapters(self) -> bool:
        return not self.full and self.lora.rank >= SHARD_LORA_FROM_RANK

    @cached_property
    def active_adapters(self) -> float:
        """Of the adapters' weights those that one token multiplies with."""
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
        """Bytes that one chip keeps of one token in one layer."""
        whole, split = kept_per_token(self.model, remat, math.ceil(self.tokens), self.ways)
        return BF16 * (whole + split / self.mesh.tensor)

    @property
    def one_layer(self) -> float:
        """Bytes of one layer's weights as a chip multiplies with them, gathered over `fsdp`."""
        return BF16 * (self.layer_weights - self.elsewhere) / self.model.num_hidden_layers / self.mesh.tensor

    @property
    def activations(self) -> float:
        """Bytes of activations kept for the backward pass."""
        return self.tokens * self.model.num_hidden_layers * self.kept(self.remat)


def _gathered(size: float, ways: int) -> float:
    """Bytes that a chip receives when it gathers `size` bytes that are split over `ways` chips."""
    return size * (ways - 1) / ways


def _flops(share: _Share) -> float:
    """Products and attention: 4N FLOPs per token with LoRA, and 6 for each weight of adapters; 6N in full
    fine-tuning.

    For N weights of matrices these are 2N forward, 2N for the gradients of activations and, where the weights
    are trained, 2N for theirs. Remat computes the layers' 2N forward once more. Of the experts, N counts
    those that a token goes to.
    """
    products = (2 + share.again + share.full) * 2 * share.active_weights / share.rate
    products += (2 + share.full) * 2 * share.head_weights + (3 + share.again) * 2 * share.active_adapters
    passes = 1 + share.again + BACKWARD_PASSES
    # Of rows of mixed lengths a token sees about as many keys as a mean row has tokens, not half as many.
    keys = keys_seen(share.length, share.shards) if share.row_tokens is None else share.row_tokens
    attention = attention_flops(share.model, share.tokens, keys, passes)
    return share.tokens * products / share.mesh.tensor + attention / share.mesh.tensor


def _read_weights(share: _Share) -> float:
    """Bytes of the weights that one chip multiplies with: layers twice, the head once."""
    layers = share.layer_weights - share.elsewhere
    return (BF16 * (2 * layers + share.head_weights) - 2 * share.saved) / share.mesh.tensor


def _interconnect_bytes(share: _Share) -> float:
    """Bytes that one chip receives.

    FSDP gathers weights in the forward and in the backward pass. Tensor parallelism sums activations after
    o_proj and down_proj, and in the backward pass the gradients of what q, k and v read and of what gate and
    up read, each added up first (with products of 8-bit factors, of each of the five). Keys and values are
    gathered from all chips that share a buffer, and the adapters' gradients are summed over them. The
    gradients of whole weights are summed in bfloat16, the dtype of their products: a reduce-scatter over
    `fsdp`, and an all-reduce of what is then left on a chip over `data`. Chips that split the experts gather
    their tokens and scatter the sums, in both passes.
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

    Gathered weights, kept activations and the gradients of whole weights are written, then read. Of experts,
    arrays as long as the rows that there is room for are passed over many times, twice as often backward.
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
    """Bytes that one chip reads and writes for the update of whole weights, once per step.

    In float32 it reads gradient, weight and two moments, and writes all but the gradient; it writes the
    bfloat16 copy. (Adapters are so small that `_hbm_bytes` counts theirs with every buffer.)
    """
    return (7 * FLOAT32 + BF16) * share.own_parameters if share.full else 0


def _resting(share: _Share) -> float:
    """Bytes on one chip that are there during and between steps.

    In full fine-tuning each of the chip's own parameters takes 16 bytes in float32 beside its bfloat16, and 4
    more where gradients are accumulated over several micro-batches.
    """
    size = BF16 * share.own_parameters - share.saved / (share.mesh.fsdp * share.mesh.tensor)
    if share.full:
        size += (5 if share.buffers > 1 else 4) * FLOAT32 * share.own_parameters
    return size + 4 * FLOAT32 * share.own_adapters  # weights, gradients and two moments


def _memory(share: _Share) -> float:
    """Bytes on one chip at the peak, in the backward pass.

    In full fine-tuning the head's gradient is summed in float32 over chunks of answers before it is split
    over `fsdp`.
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
    if model.experts is not None:  # their kernels take whole matrices: a layer's are cut out, and copied once
        size += 2 * share.one_layer
    return size + (head if mesh.fsdp > 1 else 0)  # the embedding is gathered as well
