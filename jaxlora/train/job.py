"""Check and compute everything about a run that can be known before a model is loaded.

job = prepare(config)          # reads config.json, tokenizer and rows; UserError if anything is wrong
print(describe(job))           # the plan: parameters, steps, tokens, memory
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Protocol

import jax
import jax.numpy as jnp
from rich.markup import escape
from rich.table import Table

from jaxlora.checkpoints.adapters import other_base, read_adapter
from jaxlora.checkpoints.base import Base, find_base, tokenizer_sha256
from jaxlora.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from jaxlora.data.batches import Layout, Stages, choose_layout, ranges, split_validation
from jaxlora.data.cache import RowCache, default_folder
from jaxlora.data.gates import GateStatus, require_gates
from jaxlora.data.render import RenderedRow, Tokenizer
from jaxlora.data.rows import RowOptions, RowReport, load_rendered_rows
from jaxlora.estimate import mesh_here
from jaxlora.lora import check_lora, check_targets, count_trainable, init_lora
from jaxlora.models.decoder import ModelSpec, Tree, kept_per_token
from jaxlora.models.families import count_matrix_parameters, count_parameters
from jaxlora.models.head import CHUNK
from jaxlora.models.quantised import described, pick_scheme
from jaxlora.models.spec import check_positions
from jaxlora.runtime.ahead import compiles_ahead
from jaxlora.runtime.devices import memory_of
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import (
    abstract,
    base_shardings,
    place_trained,
    token_multiple,
    token_shards,
    trained_shardings,
)
from jaxlora.train.rates import rate_warning
from jaxlora.train.schedule import RunPlan, plan_run
from jaxlora.train.step import Compute, Machine, TrainState, init_state, wire
from jaxlora.train.tracking import check_tracking

SURE = 0.8  # share of a device's memory that surely fits: the estimate is accurate to about a fifth
MOST_LENGTHS = 16  # of buffers: with more, padding falls only from 2.6% to 2%
FLOPS_A_LENGTH = 2.5e16  # a minute of an H100; per this much work, one more length repays its compile time
EARLY = (1e16, 1), (2.5e16, 8)  # (FLOPs, n): until a device has done these FLOPs, only n lengths are used


class Prepared(Protocol):
    """What is known about a run of any kind before its weights are loaded."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def base(self) -> Base: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def mesh(self) -> jax.sharding.Mesh: ...


@dataclass(frozen=True)
class Job:
    """A checked run: configuration, model shape, rows and plan. No weights."""

    config: RunConfig
    base: Base
    spec: ModelSpec
    machine: Machine
    tokenizer: Tokenizer
    train_rows: list[RenderedRow]
    validation_rows: list[RenderedRow]
    reports: tuple[RowReport, RowReport]
    gates: GateStatus
    plan: RunPlan
    train_layout: Layout
    validation_layout: Layout

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.machine.mesh

    def compute(self, layout: Layout) -> Compute:
        """How to compute steps over buffers of this layout."""
        return self.machine.compute(layout.rows_a_line, layout.longest_row)


def prepare(
    config: RunConfig, with_weights: bool = True, like: Job | None = None, gates: GateStatus | None = None
) -> Job:
    """Check and compute everything; nothing is written and no weights are loaded.

    Args:
      with_weights: fetch the weights of a Hub model; otherwise only its shape (for plans).
      like: another job; if it has the same rows and tokenizer, they are not read again.
      gates: the state to assume for the data's gates; None: look it up.

    Raises:
      UserError: anything that would stop the run, in one line that says what to do.
    """
    data, train = config.data, config.train
    check_tracking(config)
    if gates is None:
        gates = _look_at_gates(config)
    base = find_base(config.model, config.seed, with_weights)
    if like is not None and (like.config.model, like.config.data) != (config.model, config.data):
        like = None
    tokenizer = like.tokenizer if like else base.tokenizer(chat=False)  # rows of text need no chat
    if like is not None:
        train_rows, validation_rows, reports = like.train_rows, like.validation_rows, like.reports
    else:
        train_rows, validation_rows, reports = _load_rows(data, tokenizer, config.seed)
    if train.batch_rows > len(train_rows):
        raise UserError(
            f"config.train.batch_rows: {train.batch_rows} rows, but {data.train_path} leaves"
            f" {len(train_rows)} to train on; give at most {len(train_rows)}"
        )
    longest = max(row.n_tokens for row in (*train_rows, *validation_rows))
    check_positions(base.config, longest, "config.data.max_length: the longest rows")
    config, spec = trained_spec(config, base)
    config = mesh_here(config, base.config)
    machine = wire(config.model, config.mesh)
    spec = replace(spec, scan=machine.scan)
    plan = plan_run(config.optim, train, len(train_rows), config.seed if data.shuffle else None)
    distinct = plan.total_steps if data.shuffle else min(plan.total_steps, plan.steps_per_epoch)
    steps = [plan.rows_of_step(step) for step in range(1, distinct + 1)]
    rows_a_time = min(train.validation_batch_rows, len(validation_rows))
    checks = ranges(len(validation_rows), rows_a_time)
    split = token_multiple(machine.mesh), machine.lines
    tokens = token_count(train_rows) * plan.total_steps / plan.steps_per_epoch
    lengths, stages = buffer_lengths(train, spec, machine.mesh, tokens, plan.total_steps)
    return Job(
        config=config,
        base=base,
        spec=spec,
        machine=machine,
        tokenizer=tokenizer,
        train_rows=train_rows,
        validation_rows=validation_rows,
        reports=reports,
        gates=gates,
        plan=plan,
        train_layout=choose_layout(train_rows, steps, train.batch_rows, lengths, *split, stages),
        validation_layout=choose_layout(validation_rows, checks, rows_a_time, train, *split),
    )


def buffer_lengths(
    train: TrainConfig, spec: ModelSpec, mesh: jax.sharding.Mesh, tokens: float, steps: int
) -> tuple[TrainConfig, Stages]:
    """The settings with the number of buffer lengths for a run over this many tokens, and its stages.

    Each length is one more program to compile. Where programs are compiled in threads during the first steps,
    there are as many lengths as the padding they save is worth, and the first steps make do with few.
    """
    if not compiles_ahead(mesh.devices.flat[0].platform):
        return train, ()
    flops = (6 if spec.full else 4) * count_matrix_parameters(spec.config) * tokens / mesh.size
    if train.buffer_sizes == 0:
        train = replace(train, buffer_sizes=min(MOST_LENGTHS, 1 + int(flops / FLOPS_A_LENGTH)))
    return train, tuple((math.ceil(steps * early / flops), n) for early, n in EARLY)


def trained_spec(config: RunConfig, base: Base) -> tuple[RunConfig, ModelSpec]:
    """The model with its trained part, and the configuration with the adapter that it starts from.

    Raises:
      UserError: the model does not support this placement, or the adapter to start from does not fit it.
    """
    scheme = pick_scheme(config.model, training=True)
    model = ModelSpec(base.config, None, config.model.dtype, scheme=scheme)
    if config.train.what == "full":
        if config.lora.start is not None:
            raise UserError("config.lora.start: train.what=full trains no adapter; merge it first")
        return config, replace(model, full=True)
    if config.lora.start is None:
        spec = replace(model, lora=config.lora)
        check_targets(spec)
        return config, spec
    adapter = read_adapter(config.lora.start, base.config, base.folder)
    if reason := other_base(adapter.metadata, base):
        raise UserError(f"config.lora.start: {config.lora.start}: {reason}")
    lora = replace(adapter.lora, start=config.lora.start, dropout=config.lora.dropout)
    if lora.dropout and (lora.output_head or "lm_head" in lora.modules):
        raise UserError(
            "config.lora.dropout: is not supported in the head's adapter, which this start has; give 0"
        )
    spec = replace(model, lora=lora, shapes=adapter.shapes)
    check_targets(spec)
    return replace(config, lora=lora), spec


def fresh_state(job: Prepared) -> TrainState:
    """The state before the first step, determined by the seed and by what the run starts from."""
    spec, start = job.spec, job.config.lora.start
    if spec.full:
        trained = job.base.load(replace(spec, dtype="float32", full=False), job.mesh)
    else:
        tree = init_lora(spec, job.config.seed) if start is None else read_adapter(start, spec.config).tree
        trained = place_trained(job.mesh, spec, tree)
        check_lora(spec, trained)
        assert spec.shapes or sum(x.size for x in jax.tree.leaves(trained)) == count_trainable(spec)
    return init_state(trained, job.config.optim)


def abstract_state(job: Prepared) -> TrainState:
    """Shapes, dtypes and shardings of the state, without arrays."""
    return state_on(job.mesh, job.spec, job.config.optim)


def state_on(mesh: jax.sharding.Mesh, spec: ModelSpec, optim: OptimConfig) -> TrainState:
    """The same, for a model on a mesh."""

    def make() -> TrainState:
        if not spec.full:
            return init_state(init_lora(spec, 0), optim)
        return init_state(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), spec.abstract_base), optim)

    state = jax.eval_shape(make)
    return abstract(state, trained_shardings(mesh, spec, state))


def abstract_frozen(job: Prepared) -> Tree:
    """Shapes, dtypes and shardings of what `load_frozen` returns, without arrays."""
    if job.spec.full:
        return {}
    return abstract(job.spec.abstract_base, base_shardings(job.mesh, job.spec))


def load_frozen(job: Prepared) -> Tree:
    """The frozen base of a job; `{}` if all weights are trained."""
    return {} if job.spec.full else job.base.load(job.spec, job.mesh)


def _look_at_gates(config: RunConfig) -> GateStatus:
    """The state of the data's gates, which are required if a benchmark is to be evaluated."""
    data = config.data
    if config.eval.benchmark is None or data.validation_path is None:
        reason = "no benchmark is named (eval.benchmark)"
        if config.eval.benchmark is not None:
            reason = "data.validation_fraction has no validation file to compare with"
        return GateStatus(False, True, reason, None, None, train_sha256="", validation_sha256="")
    return require_gates(data.train_path, data.validation_path, data.gate_report, data.allow_ungated)


def _load_rows(
    data: DataConfig, tokenizer: Tokenizer, seed: int
) -> tuple[list[RenderedRow], list[RenderedRow], tuple[RowReport, RowReport]]:
    """Training rows, validation rows, and a report for each of what was read and skipped."""
    kept = RowCache(default_folder(), cache(lambda: tokenizer_sha256(tokenizer)))
    load = partial(
        load_rendered_rows,
        tokenizer=tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        options=RowOptions.of(data),
        cache=kept if data.cache else None,
    )
    rows, report = load(data.train_path, limit=data.train_rows)
    if data.validation_path is not None:
        validation_rows, validation_report = load(data.validation_path, limit=data.validation_rows)
        return rows, validation_rows, (report, validation_report)
    if data.validation_fraction is None:
        raise UserError(
            "config.data.validation_path: none is given; give one, or data.validation_fraction=0.05"
        )
    train, validation = split_validation([row.prompt_id for row in rows], data.validation_fraction, seed)
    validation = validation[: data.validation_rows]
    return [rows[i] for i in train], [rows[i] for i in validation], (report, report)


def trained_tokens(job: Job, steps: int) -> int:
    """Shifted tokens in the first steps of a run."""
    epochs, rest = divmod(steps, job.plan.steps_per_epoch)
    last = range(steps - rest + 1, steps + 1)
    return epochs * token_count(job.train_rows) + sum(
        token_count([job.train_rows[i] for i in job.plan.rows_of_step(step)]) for step in last
    )


def token_count(rows: list[RenderedRow]) -> int:
    """Shifted tokens of these rows."""
    return sum(row.n_tokens for row in rows)


def padding_efficiency(rows: list[RenderedRow], batches: Sequence[Sequence[int]], layout: Layout) -> float:
    """Ratio of real tokens to buffer tokens in one pass."""
    parts = [[rows[i] for i in batch] for batch in batches]
    return sum(map(token_count, parts)) / sum(math.prod(layout.shape(part)) for part in parts)


def estimate_memory(job: Job) -> dict[str, int]:
    """Bytes that a run needs over all devices, split as in `step_memory`."""
    layout = job.train_layout
    return step_memory(job, max(layout.sizes) * (layout.lines if layout.packed else layout.batch_rows))


def step_memory(job: Prepared, tokens: int) -> dict[str, int]:
    """Bytes that steps over buffers of this many tokens need over all devices, in four parts; accurate to
    about a fifth.

    Base: the weights used for computation. Trained: weights, gradients and two moments in float32.
    Activations: what is kept for the backward pass of one buffer, see `kept_per_token`. Output head: logits
    of one chunk and their gradient, in float32.
    """
    config, width = job.spec.config, 2 if job.spec.dtype == "bfloat16" else 4
    ways = max(job.config.mesh.expert, 1)
    own = -(-tokens // token_shards(job.mesh))
    kept = sum(kept_per_token(config, job.config.model.remat, own, ways)) * config.num_hidden_layers
    if job.config.model.remat is True:  # the recomputed layer's activations are all kept
        kept += sum(kept_per_token(config, False, own, ways))
    return {
        "base": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(job.spec.abstract_base)),
        "trained weights, gradients and moments": count_trainable(job.spec) * 4 * 4,
        "activations": round(kept * tokens * width),
        "output head": 2 * 4 * config.vocab_size * min(CHUNK, tokens),
    }


def memory_per_device(job: Job) -> int:
    """Bytes that a run needs on one device, from `estimate_memory`: the base is split over fsdp and tensor,
    activations over all devices, and adapters are replicated. CPU devices share memory: the sum over all.
    """
    shape, parts = job.mesh.shape, estimate_memory(job)
    split = shape["fsdp"] * shape["tensor"]
    trained = "trained weights, gradients and moments"
    one = parts["base"] / split + parts["activations"] / job.mesh.size + parts["output head"]
    one += parts[trained] / (split if job.spec.full else 1)
    on_cpu = job.mesh.devices.flat[0].platform == "cpu"
    return round(one * (job.mesh.size if on_cpu else 1))


def fits(needed: int, device: jax.Device) -> bool | None:
    """Whether this many bytes fit on a device; None if it is too close to tell or its memory is unknown."""
    room = memory_of(device)
    if room is None or SURE * room < needed <= room / SURE:
        return None
    return needed <= SURE * room


def room_of(needed: int, device: jax.Device, smaller: str) -> str:
    """The same in words; `smaller` names a setting that takes less."""
    room = memory_of(device)
    if room is None:
        return f"about {needed / 2**30:.2f} GiB a device, which does not say what it has"
    owner = "this machine" if device.platform == "cpu" else "a device"
    text = f"about {needed / 2**30:.2f} of the {room / 2**30:.2f} GiB that {owner} has: "
    if verdict := fits(needed, device):
        return text + "fits"
    return text + ("may not fit" if verdict is None else "does not fit") + f"; {smaller}, takes less"


def what_is_trained(job: Prepared) -> str:
    lora = job.spec.lora
    if lora is None:
        return "all weights, float32 master weights"
    names = ", ".join(weight.name for weight in job.spec.adapted)
    start = f", starting from {lora.start}" if lora.start else ""
    rank = f"rank {lora.rank}"
    if any(weight.experts for weight in job.spec.adapted):
        rank += f" ({job.spec.expert_rank} of each expert)"
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    return f"adapter {lora.condition}, {rank}, alpha {lora.alpha:g}{dropout}, on {names}{start}"


def describe_model(job: Prepared) -> dict[str, str]:
    """The first lines of a plan: the run, its model and what is trained."""
    config, model = job.config, job.spec.config
    trainable, total = count_trainable(job.spec), count_parameters(model)
    return {
        "run": f"{config.run_id} in {config.run_dir}",
        "model": f"{config.model.path}, {model.num_hidden_layers} layers, {config.model.dtype}"
        + (f", base in {described(job.spec.scheme)}" if job.spec.scheme else "")
        + (", random weights" if config.model.random_weights else ""),
        "parameters": f"{trainable:,} trainable, {total:,} in the base ({trainable / total:.2%})",
        "trained": what_is_trained(job),
    }


def table_of(rows: dict[str, str]) -> Table:
    """The lines of a plan for the terminal."""
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    return table


def leaked_rows(job: Job) -> list[RenderedRow]:
    """Validation rows with a prompt that is also in the training rows."""
    trained = {row.prompt_id for row in job.train_rows}
    return [row for row in job.validation_rows if row.prompt_id in trained]


def describe(job: Job) -> Table:
    """The plan as a table for the terminal: what will be trained, on what, in how many steps."""
    config, plan = job.config, job.plan
    train_tokens, validation_tokens = token_count(job.train_rows), token_count(job.validation_rows)
    passes = len(plan.validation_steps)
    steps = min(plan.steps_per_epoch, plan.total_steps)
    epoch = [plan.rows_of_step(step) for step in range(1, steps + 1)]
    memory = estimate_memory(job)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    device = jax.devices()[0]
    rows = describe_model(job) | {
        "training": f"{len(job.train_rows):,} rows, {train_tokens:,} tokens an epoch, "
        f"{trained_tokens(job, plan.total_steps):,} in all",
        "validation": f"{len(job.validation_rows):,} rows, {validation_tokens:,} tokens a pass, "
        f"{validation_tokens * passes:,} in all",
        "steps": f"{plan.total_steps:,}, {plan.steps_per_epoch:,} an epoch, "
        f"{config.train.batch_rows} rows a step, {plan.warmup_steps} of warm-up",
        "validation steps": ", ".join(map(str, plan.validation_steps)),
        "learning rate": f"{config.optim.peak_lr:g}, {config.optim.schedule}",
        "buffers": f"{config.train.layout}, {', '.join(map(str, job.train_layout.sizes))} tokens, "
        f"{padding_efficiency(job.train_rows, epoch, job.train_layout):.1%} of them real",
        "memory": f"about {sum(memory.values()) / 2**30:.2f} GiB: {parts}",
        "room": room_of(
            memory_per_device(job),
            job.mesh.devices.flat[0],
            "train.max_buffer_tokens or train.batch_rows smaller, or model.remat=elementwise",
        ),
        "devices": f"{job.mesh.size} x {device.device_kind}, mesh {dict(job.mesh.shape)},"
        f" attention {job.machine.backend}, layers {'scanned' if job.spec.scan else 'unrolled'}",
    }
    table = table_of(rows)
    for report in dict.fromkeys(job.reports):
        style = "bold red" if report.skipped else "bold"
        table.add_row(f"[{style}]rows[/{style}]", escape(report.describe()))
    if leaked := leaked_rows(job):
        text = (
            f"{len(leaked):,} of the validation rows have a prompt that is also trained on: their loss will"
            " be too low"
        )
        table.add_row("[bold red]overlap[/bold red]", text)
    if warning := rate_warning(job.spec.config, config.train.what, config.optim.peak_lr):
        table.add_row("[bold red]rate[/bold red]", escape(warning))
    return table
