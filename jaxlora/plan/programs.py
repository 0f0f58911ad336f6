"""Compile a run's real programs for a slice without having it, and measure what they need.

    programs = Programs(config, published_config("qwen3-8b"), slice_named("v5e-8"), Workload())
    programs.train_step().memory.total     # bytes per chip

The TPU compiler comes from PyPI (`pip install 'jax[tpu]'` installs the one for this JAX) and needs no chip.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.config import RunConfig
from jaxlora.data.packing import round_up
from jaxlora.estimate import (
    BACKWARD_PASSES,
    ROW_TOKENS,
    Roofline,
    attention_flops,
    keys_seen,
    roofline,
    with_mesh,
)
from jaxlora.generate.decode import PREFILL_ROWS, WINDOW_MULTIPLE, init_decode, make_decode, make_prefill
from jaxlora.generate.weights import decode_form
from jaxlora.lora import init_lora
from jaxlora.models.attention import pick_decode_backend
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.grouped import rows_of, tile_rows
from jaxlora.models.head import CHUNK
from jaxlora.models.quantised import pick_scheme
from jaxlora.models.spec import ModelConfig
from jaxlora.plan.hlo import Work, count_work
from jaxlora.runtime.devices import Slice, out_of_memory
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import (
    abstract,
    base_shardings,
    decode_mesh,
    decode_shardings,
    device_bytes,
    named,
    replicated,
    token_multiple,
    token_shards,
    trained_shardings,
)
from jaxlora.train.job import state_on
from jaxlora.train.step import Compute, TrainState, make_eval_step, make_train_step
from jaxlora.train.step import wire as wire_machine

INSTALL = "`pip install 'jax[tpu]'`"  # the compiler version that matches this JAX
DEPTHS = (2, 4)  # depths that are compiled to extrapolate the decoding programs of a deep mixture of experts


def wire(
    config: RunConfig, model: ModelConfig, devices: list[jax.Device]
) -> tuple[jax.sharding.Mesh, ModelSpec, Compute]:
    """The mesh, the spec and the compute settings of a run on these TPU chips."""
    machine = wire_machine(config.model, config.mesh, devices)
    full = config.train.what == "full"
    lora = None if full else config.lora
    scheme = pick_scheme(config.model, devices[0], training=True)
    # The compiling machine is not the target, so nothing is left to `auto`.
    spec = ModelSpec(model, lora, config.model.dtype, machine.scan, full=full, scheme=scheme)
    spec = replace(spec, products="ragged_dot")
    return machine.mesh, spec, machine.compute()


@dataclass(frozen=True)
class Workload:
    """The size of a run in rows and tokens; the defaults are the study's."""

    train_rows: int = 25_348
    validation_rows: int = 2_818
    row_tokens: float = ROW_TOKENS  # mean
    prompt_tokens: int = 256  # longest prompt of an evaluation


@dataclass(frozen=True)
class Memory:
    """Bytes that a program needs on one chip."""

    arguments: int
    temporaries: int
    outputs: int  # beyond those that reuse a donated argument
    code: int
    missing: int = 0  # beyond the chip's memory, if the program fails to compile for that reason
    held: int = 0  # used by something else while the program runs

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code + self.held


@dataclass(frozen=True)
class Program:
    """One compiled program, and what one chip does in one run of it."""

    name: str
    tokens: int  # of one buffer or one call, over all chips, padding included
    memory: Memory
    flops: float
    work: Work
    best: Roofline
    compile_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, FLOPs and seconds of one run on one chip."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        values["best"] |= {"seconds": self.best.seconds, "likely": self.best.likely, "bound": self.best.bound}
        return values


class Programs:
    """The programs of one configuration on one slice."""

    def __init__(self, config: RunConfig, model: ModelConfig, slice_: Slice, workload: Workload):
        self.config, self.slice, self.workload = with_mesh(config, model, slice_), slice_, workload
        self.model = model
        self.mesh, self.spec, self.compute = wire(self.config, model, topology_devices(slice_))

    @cached_property
    def multiple(self) -> int:
        """Buffer lengths are multiples of this."""
        return round_up(self.config.train.buffer_multiple, token_multiple(self.mesh))

    def buffer(self, tokens: float) -> int:
        """The length of a buffer that holds this many tokens."""
        return max(self.multiple, round_up(int(tokens), self.multiple))

    @property
    def kernel_passes(self) -> int:
        """1 if attention is a kernel, whose matmuls do not appear in the compiled text; else 0."""
        return int(self.compute.backend == "splash")

    @property
    def _step_tokens(self) -> float:
        return self.config.train.batch_rows * self.workload.row_tokens

    @cached_property
    def train_tokens(self) -> int:
        """Length of each buffer in a typical optimizer step."""
        return self.buffer(self._step_tokens / self.buffers)

    @cached_property
    def validation_tokens(self) -> int:
        """Length of the buffer of a typical validation batch."""
        return self.buffer(self.config.train.validation_batch_rows * self.workload.row_tokens)

    @cached_property
    def buffers(self) -> int:
        """Micro-batches of a typical optimizer step: one, unless its rows exceed the longest buffer."""
        return max(1, -(-int(self._step_tokens) // self.config.train.max_buffer_tokens))

    def train_step(self) -> Program:
        """One optimizer step of typical length."""
        mesh, spec, optim = self.mesh, self.spec, self.config.optim
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
        step = make_train_step(spec, optim, self.compute)
        arguments = (self.state, self.base, self.batch(self.buffers, self.train_tokens), rate)
        passes = self.kernel_passes * self.buffers * (1 + (self.compute.remat is True) + BACKWARD_PASSES)
        return self.compiled("train step", mesh, step, arguments, self.train_tokens, passes)

    def validation_step(self) -> Program:
        """One validation batch of typical length, in one buffer."""
        step = make_eval_step(self.spec, replace(self.compute, remat=False))
        tokens = self.validation_tokens
        arguments = (self.state.trained, self.base, self.batch(1, tokens))
        return self.compiled("validation step", self.mesh, step, arguments, tokens, self.kernel_passes)

    def prefill(self) -> Program:
        """The prefill of a batch of prompts, with the adapter in the form used for decoding."""
        return self._beside_base(self._of_depth(Programs._prefill))

    def decode_step(self) -> Program:
        """One token in each slot, with the adapter as used for decoding and the KV cache half full."""
        return self._beside_base(self._of_depth(Programs._decode_step))

    def _of_depth(self, compile_one: Callable[[Programs], Program]) -> Program:
        """A decoding program, whose layers are unrolled rather than looped over.

        For a deep mixture of experts it is extrapolated from two shallow models, because the compiler takes
        half a minute per layer.
        """
        if self.model.experts is None or self.model.num_hidden_layers <= max(DEPTHS):
            return compile_one(self)
        few, more = (compile_one(self._with_layers(depth)) for depth in DEPTHS)
        share = (self.model.num_hidden_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        return deeper(few, more, share, self.slice)

    def _with_layers(self, layers: int) -> Programs:
        model = replace(self.model, num_hidden_layers=layers)
        return Programs(self.config, model, self.slice, self.workload)

    def _prefill(self) -> Program:
        rows = min(PREFILL_ROWS, self.config.eval.batch_rows)
        state, base = self._decode_arguments()
        whole = replicated(self._decode_mesh)
        tokens = jax.ShapeDtypeStruct((rows, self.workload.prompt_tokens), jnp.int32, sharding=whole)
        vector = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=whole)
        attention = pick_decode_backend("auto", "tpu", self.spec.dtype)
        step = make_prefill(self._decode_spec, self.model.eos_token_ids, attention)
        arguments: tuple[Any, ...] = (state, self._decode_adapter, base, tokens, vector, vector, vector)
        return self.compiled("prefill", self._decode_mesh, step, arguments, tokens.size, 0)

    def _decode_step(self) -> Program:
        state, base = self._decode_arguments()
        step = make_decode(self._decode_spec, self.model.eos_token_ids, steps=1)
        window = self.workload.prompt_tokens + self.config.eval.max_new_tokens // 2
        window = round_up(window, WINDOW_MULTIPLE)
        slots = self.config.eval.batch_rows
        arguments: tuple[Any, ...] = (state, self._decode_adapter, base)
        return self.compiled("decode step", self._decode_mesh, step, arguments, slots, 0, window=window)

    def _beside_base(self, program: Program) -> Program:
        """The program next to the base in its training layout, which a study keeps for its next run."""
        held = device_bytes(self.base)
        return replace(program, memory=replace(program.memory, held=held))

    @cached_property
    def state(self) -> TrainState:
        """The trained weights and the optimizer state."""
        return state_on(self.mesh, self.spec, self.config.optim)

    @cached_property
    def base(self) -> Any:
        """The frozen weights; none if all weights are trained."""
        return (
            {} if self.spec.full else abstract(self.spec.abstract_base, base_shardings(self.mesh, self.spec))
        )

    def batch(self, buffers: int, tokens: int, lines: int = 1) -> Any:
        """A batch of `buffers` buffers, each with `lines` lines of `tokens` tokens."""
        shape = (buffers, lines, tokens)
        sharding = named(self.mesh, (None, "batch", "length"), shape)
        names = ("tokens", "targets", "positions", "segment_ids")
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name in names}
        return batch | {"weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}

    @cached_property
    def _decode_spec(self) -> ModelSpec:
        return decode_form(self.spec, self._decode_mesh, merge=True)

    @cached_property
    def _decode_mesh(self) -> jax.sharding.Mesh:
        experts = self.model.experts.num_experts if self.model.experts else 1
        return decode_mesh(self.mesh, self.model.num_key_value_heads, experts)

    @property
    def _decode_adapter(self) -> Any:
        """The adapter, if decoding keeps it separate from a quantised base."""
        if self._decode_spec.lora is None:
            return {}
        lora = jax.eval_shape(lambda: init_lora(self.spec, 0))
        return abstract(lora, trained_shardings(self._decode_mesh, self.spec, lora))

    def _decode_arguments(self) -> tuple[Any, Any]:
        mesh, spec, settings = self._decode_mesh, self._decode_spec, self.config.eval
        length = self.workload.prompt_tokens + settings.max_new_tokens
        length = round_up(length, WINDOW_MULTIPLE)
        state = jax.eval_shape(
            lambda: init_decode(spec, settings.batch_rows, length, settings.max_new_tokens)
        )
        state = abstract(state, decode_shardings(mesh, state))
        return state, abstract(spec.abstract_base, base_shardings(mesh, spec))

    def compiled(
        self, name: str, mesh, step, arguments, tokens: int, attention_passes: float, **static
    ) -> Program:
        """Compile a program and count its work; if it does not fit, only its missing bytes are known.

        Args:
          tokens: in one buffer or one call.
          attention_passes: see `attention_flops`; 0 if the compiled text contains attention's matmuls.
        """
        start = time.monotonic()
        with jax.set_mesh(mesh):
            try:
                compiled = step.lower(*arguments, **static).compile()
            except jax.errors.JaxRuntimeError as error:
                missing = out_of_memory(str(error))
                if missing is None:
                    raise
                memory = Memory(device_bytes(arguments), 0, 0, 0, missing)
                took = time.monotonic() - start
                return Program(name, tokens, memory, 0.0, Work(), Roofline(0, 0, 0), took)
        measured = compiled.memory_analysis()
        memory = Memory(
            measured.argument_size_in_bytes,
            measured.temp_size_in_bytes,
            measured.output_size_in_bytes - measured.alias_size_in_bytes,
            measured.generated_code_size_in_bytes,
        )
        shards = token_shards(mesh)
        trips = max(1, -(-tokens // shards // CHUNK))
        work = count_work(_text_of(compiled), trips, _rows_used(self.model, mesh, tokens))
        attention = attention_flops(self.model, tokens / shards, keys_seen(tokens, shards), attention_passes)
        chip = self.slice.chip
        flops = (
            work.flops + attention / mesh.shape["tensor"] - work.flops8 * (1 - chip.flops / chip.int8_flops)
        )
        best = roofline(self.slice, flops, work.hbm_bytes, work.ici_bytes)
        return Program(name, tokens, memory, flops, work, best, time.monotonic() - start)


def _text_of(compiled: Any) -> str:
    """The compiled program's text; `UserError` if this JAX cannot read what the compiler wrote."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        raise UserError(f"the installed TPU compiler does not match this JAX; run {INSTALL}") from None


def _rows_used(model: ModelConfig, mesh: Any, tokens: int) -> float:
    """The share of a chip's expert rows that are used if every expert is chosen equally often."""
    if model.experts is None or not tokens:  # an optimizer step has none
        return 1.0
    ways, own = mesh.shape.get("expert", 1), math.ceil(tokens / token_shards(mesh))
    choices = own * model.experts.num_experts_per_tok
    half_tiles = tile_rows(ways * choices, model.experts.num_experts) * model.experts.num_experts / ways / 2
    return min(1.0, (choices + half_tiles) / rows_of(model.experts, own, ways))


def deeper(few: Program, more: Program, share: float, slice_: Slice) -> Program:
    """The program of a deeper model, extrapolated linearly from those of two depths.

    Args:
      share: the extra depth over the first model, relative to the difference between the two.
    """

    def line(a: Any, b: Any) -> Any:
        if isinstance(a, dict):
            return {name: line(a.get(name, 0), b.get(name, 0)) for name in {**a, **b}}
        value = a + share * (b - a)
        return round(value) if isinstance(a, int) and isinstance(b, int) else value

    memory = Memory(**line(asdict(few.memory), asdict(more.memory)))
    work = Work(**line(asdict(few.work), asdict(more.work)))
    flops = line(few.flops, more.flops)
    best = roofline(slice_, flops, work.hbm_bytes, work.ici_bytes)
    seconds = few.compile_seconds + more.compile_seconds
    return replace(few, memory=memory, flops=flops, work=work, best=best, compile_seconds=seconds)


def topology_devices(slice_: Slice) -> list[jax.Device]:
    """The slice's chips, as devices to compile for.

    Raises:
      UserError: the TPU compiler is not installed.
    """
    # Without these, libtpu spends minutes querying the cloud's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")  # any will do: only the topology below counts
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # so that several plans can run at once
    for name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ.setdefault(name, "3")  # otherwise it warns that this machine has no TPU
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(f"the TPU compiler is not installed; run {INSTALL}") from None
    from jax.experimental import topologies

    bounds = (2, 2, 1) if slice_.n_chips > 1 else (1, 1, 1)
    options: dict[str, Any] = {"num_slices": 1, "chips_per_host_bounds": bounds}
    if slice_.chip.name in ("v4", "v5p"):  # both cores of a chip act as one device, as in the cloud
        options["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(platform="tpu", topology_name=slice_.topology, **options).devices
