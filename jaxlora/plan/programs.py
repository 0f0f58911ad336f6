"""Compiles the real programs of a run for a slice that is not there, and measures what they take.

    programs = Programs(config, published_config("qwen3-8b"), slice_named("v5e-8"), Workload())
    programs.train_step().memory.total     # bytes a chip
    programs.train_step(members=4)         # four runs in one program

The TPU compiler comes from PyPI (`pip install libtpu`) and needs no chip.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.config import RunConfig
from jaxlora.data.packing import round_up
from jaxlora.estimate import ROW_TOKENS, with_mesh
from jaxlora.generate.decode import PREFILL_ROWS, WINDOW_MULTIPLE, init_decode, make_decode, make_prefill
from jaxlora.lora import init_lora
from jaxlora.models.attention import pick_backend, pick_decode_backend
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.head import CHUNK
from jaxlora.models.spec import ModelConfig
from jaxlora.plan.hlo import Work, count_work
from jaxlora.roofline import BACKWARD_PASSES, Roofline, attention_flops, keys_seen, roofline
from jaxlora.runtime.chips import Slice
from jaxlora.runtime.devices import scan_layers
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import (
    base_shardings,
    decode_mesh,
    decode_shardings,
    make_mesh,
    named,
    replicated,
    token_multiple,
    token_shards,
    trained_shardings,
)
from jaxlora.train.fused import group_spec
from jaxlora.train.step import Compute, TrainState, init_state, make_eval_step, make_train_step


@dataclass(frozen=True)
class Workload:
    """How many rows and tokens there are; the defaults are the study's."""

    train_rows: int = 25_348
    validation_rows: int = 2_818
    row_tokens: float = ROW_TOKENS  # mean
    prompt_tokens: int = 256  # longest prompt of an evaluation


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip."""

    arguments: int
    temporaries: int
    outputs: int  # that do not take an argument's place
    code: int
    missing: int = 0  # what the compiler could not place
    held: int = 0  # of others, that stay in memory meanwhile

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code + self.held


@dataclass(frozen=True)
class Program:
    """One compiled program, measured a chip and a run."""

    name: str
    tokens: int  # of one buffer or one call, all chips together, padding included
    memory: Memory
    flops: float
    work: Work
    best: Roofline
    compile_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, FLOPs and seconds of one chip and one run."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        values["best"] |= {"seconds": self.best.seconds, "bound": self.best.bound}
        return values


class Programs:
    """The programs of one configuration on one slice."""

    def __init__(self, config: RunConfig, model: ModelConfig, slice_: Slice, workload: Workload):
        self.config, self.slice, self.workload = with_mesh(config, model, slice_), slice_, workload
        self.model = model
        self.devices = topology_devices(slice_)
        self.mesh = make_mesh(self.config.mesh, self.devices)
        self.spec = ModelSpec(model, config.lora, config.model.dtype, scan_layers(config.model.layers, "tpu"))
        self.attention = pick_backend(config.model.attention, "tpu", config.model.dtype, self.mesh.size)

    @cached_property
    def multiple(self) -> int:
        """Buffer lengths are multiples of this."""
        return round_up(self.config.train.buffer_multiple, token_multiple(self.mesh))

    def buffer(self, tokens: float) -> int:
        """The buffer length that holds so many tokens."""
        return max(self.multiple, round_up(int(tokens), self.multiple))

    @property
    def _kernel_passes(self) -> int:
        """1 where attention is a kernel, whose products the compiled text does not show; else 0."""
        return int(self.attention == "splash")

    @property
    def _step_tokens(self) -> float:
        return self.config.train.batch_rows * self.workload.row_tokens

    @cached_property
    def train_tokens(self) -> int:
        """Length of each of its buffers."""
        return self.buffer(self._step_tokens / self.buffers)

    @cached_property
    def validation_tokens(self) -> int:
        """Buffer of a typical validation batch."""
        return self.buffer(self.config.train.validation_batch_rows * self.workload.row_tokens)

    @cached_property
    def buffers(self) -> int:
        """Buffers of a typical optimizer step: its rows are split where they exceed the longest buffer."""
        return max(1, -(-int(self._step_tokens) // self.config.train.max_buffer_tokens))

    def train_step(self, members: int = 1) -> Program:
        """One optimizer step of typical length, of one run or of several trained together."""
        mesh, spec, optim, remat = self.mesh, self.spec, self.config.optim, self.config.model.remat
        state = jax.eval_shape(lambda: init_state(init_lora(spec, 0), optim))
        rates: tuple[int, ...] = ()
        if members > 1:
            state, spec, rates = _of_members(state, members), group_spec([spec] * members), (members,)
        state = _abstract(state, trained_shardings(mesh, spec, state))
        rate = jax.ShapeDtypeStruct(rates, jnp.float32, sharding=replicated(mesh))
        step = make_train_step(spec, optim, Compute(self.attention, remat))
        batch = self._batch(self.buffers, self.train_tokens, members)
        passes = self._kernel_passes * self.buffers * (1 + (remat is True) + BACKWARD_PASSES)
        arguments = (state, self._base, batch, rate)
        return self._compile("train step", mesh, step, arguments, self.train_tokens, passes, members)

    def validation_step(self) -> Program:
        """One validation batch of typical length, in one buffer."""
        lora = jax.eval_shape(lambda: init_lora(self.spec, 0))
        lora = _abstract(lora, trained_shardings(self.mesh, self.spec, lora))
        step = make_eval_step(self.spec, Compute(self.attention))
        tokens = self.validation_tokens
        arguments = (lora, self._base, self._batch(1, tokens))
        return self._compile("validation step", self.mesh, step, arguments, tokens, self._kernel_passes)

    def prefill(self) -> Program:
        """Reading a batch of prompts, with the adapter merged into the base."""
        rows = min(PREFILL_ROWS, self.config.eval.batch_rows)
        state, base = self._decode_arguments()
        whole = replicated(self._decode_mesh)
        tokens = jax.ShapeDtypeStruct((rows, self.workload.prompt_tokens), jnp.int32, sharding=whole)
        vector = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=whole)
        attention = pick_decode_backend("auto", "tpu", self.spec.dtype, self.mesh.size)
        step = make_prefill(self._decode_spec, self.model.eos_token_ids, attention)
        arguments: tuple[Any, ...] = (state, {}, base, tokens, vector, vector, vector)
        return self._beside_base(self._compile("prefill", self._decode_mesh, step, arguments, tokens.size, 0))

    def decode_step(self) -> Program:
        """One token for each slot, with the adapter merged into the base and half the cache filled."""
        state, base = self._decode_arguments()
        step = make_decode(self._decode_spec, self.model.eos_token_ids, steps=1)
        window = self.workload.prompt_tokens + self.config.eval.max_new_tokens // 2
        window = round_up(window, WINDOW_MULTIPLE)
        slots = self.config.eval.batch_rows
        arguments: tuple[Any, ...] = (state, {}, base)
        return self._beside_base(
            self._compile("decode step", self._decode_mesh, step, arguments, slots, 0, window=window)
        )

    def _beside_base(self, program: Program) -> Program:
        """The program with the base that a study keeps for its next run, in the layout of training."""
        held = sum(map(_chip_bytes, jax.tree.leaves(self._base)))
        return replace(program, memory=replace(program.memory, held=held))

    @cached_property
    def _base(self) -> Any:
        return _abstract(self.spec.abstract_base, base_shardings(self.mesh, self.spec))

    def _batch(self, buffers: int, tokens: int, lines: int = 1) -> Any:
        shape = (buffers, lines, tokens)
        sharding = named(self.mesh, (None, "batch", "length"), shape)
        names = ("tokens", "targets", "positions", "segment_ids")
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name in names}
        return batch | {"weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}

    @cached_property
    def _decode_spec(self) -> ModelSpec:
        joined = self._decode_mesh.shape["tensor"] == 1
        return replace(self.spec, lora=None, scan=False, joined=joined)

    @cached_property
    def _decode_mesh(self) -> jax.sharding.Mesh:
        return decode_mesh(self.mesh, self.model)

    def _decode_arguments(self) -> tuple[Any, Any]:
        mesh, spec, settings = self._decode_mesh, self._decode_spec, self.config.eval
        length = self.workload.prompt_tokens + settings.max_new_tokens
        length = round_up(length, WINDOW_MULTIPLE)
        state = jax.eval_shape(
            lambda: init_decode(spec, settings.batch_rows, length, settings.max_new_tokens)
        )
        state = _abstract(state, decode_shardings(mesh, state))
        return state, _abstract(spec.abstract_base, base_shardings(mesh, spec))

    def _compile(
        self,
        name: str,
        mesh,
        step,
        arguments,
        tokens: int,
        attention_passes: float,
        lines: int = 1,
        **static,
    ) -> Program:
        start = time.monotonic()
        with jax.set_mesh(mesh):
            try:
                compiled = step.lower(*arguments, **static).compile()
            except jax.errors.JaxRuntimeError as error:
                missing = out_of_memory(str(error))
                if missing is None:
                    raise
                memory = Memory(sum(map(_chip_bytes, jax.tree.leaves(arguments))), 0, 0, 0, missing)
                took = time.monotonic() - start
                return Program(name, lines * tokens, memory, 0.0, Work(), Roofline(0, 0, 0), took)
        measured = compiled.memory_analysis()
        memory = Memory(
            measured.argument_size_in_bytes,
            measured.temp_size_in_bytes,
            measured.output_size_in_bytes - measured.alias_size_in_bytes,
            measured.generated_code_size_in_bytes,
        )
        shards = token_shards(mesh)
        work = count_work(compiled.as_text(), dynamic_trips=max(1, -(-lines * tokens // shards // CHUNK)))
        queries, keys = lines * tokens / shards, keys_seen(tokens, lines, shards)
        flops = (
            work.flops + attention_flops(self.model, queries, keys, attention_passes) / mesh.shape["tensor"]
        )
        best = roofline(self.slice, flops, work.hbm_bytes, work.ici_bytes)
        return Program(name, lines * tokens, memory, flops, work, best, time.monotonic() - start)


def topology_devices(slice_: Slice) -> list[jax.Device]:
    """The slice's chips as devices to compile for.

    Raises:
      UserError: the TPU compiler is not installed.
    """
    # Without these libtpu asks the cloud's metadata server for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")  # any; the topology below is what counts
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans at once
    for name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ.setdefault(name, "3")  # it would warn that this is no TPU machine
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("the TPU compiler is not installed; run `pip install libtpu`") from None
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": 1, "chips_per_host_bounds": (2, 2, 1)}
    if slice_.chip.name in ("v4", "v5p"):  # both cores of a chip as one device, as in the cloud
        options["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(platform="tpu", topology_name=slice_.topology, **options).devices


def out_of_memory(message: str) -> int | None:
    """Bytes over the chip's memory, from the compiler's error; None: it is another error.

    The compiler says `Used 20.95G of 15.75G hbm. Exceeded hbm capacity by 5.20G.`, or `the total memory
    required for HLO temporaries (16.24G) exceeds available HBM (15.75G)`.
    """
    if match := re.search(r"Exceeded hbm capacity by ([\d.]+)([KMG]?)", message):
        return _bytes(*match.groups())
    if match := re.search(r"\(([\d.]+)([KMG]?)\) exceeds available HBM \(([\d.]+)([KMG]?)\)", message):
        return _bytes(*match.groups()[:2]) - _bytes(*match.groups()[2:])
    return None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])


def _of_members(state: TrainState, members: int) -> TrainState:
    """The state of so many equal members, as `jaxlora.train.fused.stack_members` makes it."""
    grow = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype))
    adam = state.adam._replace(mu=grow(state.adam.mu), nu=grow(state.adam.nu))
    return TrainState(grow(state.lora), adam)


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _chip_bytes(x: jax.ShapeDtypeStruct) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    size = x.dtype.itemsize
    for n in shape:
        size *= n
    return size
