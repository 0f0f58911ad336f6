"""Benchmark of a fused sweep: members trained together against lone runs one after another.

    result = bench_sweep(config, shape, lengths, [Variant(2), Variant(4, "elementwise")], steps=12)

Every member trains on the same rows in the same order, 8 a step, as the study's sweep does. All programs run
in one process over one base, each over the same steps and after its compilation; only real tokens count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlora.bench import device_facts, random_rows, utilisation, warm_up_runs
from jaxlora.checkpoints.base import random_base
from jaxlora.config import Condition, Remat, RunConfig
from jaxlora.data.batches import choose_layout
from jaxlora.data.packing import Batch
from jaxlora.lora import init_lora
from jaxlora.models.attention import pick_backend
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.families import count_matrix_parameters
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.devices import memory_in_use, scan_layers
from jaxlora.runtime.progress import console
from jaxlora.sharding import make_mesh, place_batch, place_trained, token_multiple
from jaxlora.train.fused import group_spec, stack_batches, stack_members
from jaxlora.train.schedule import plan_run
from jaxlora.train.step import Compute, TrainState, init_state, make_train_step

MIX: tuple[Condition, ...] = ("attention_only", "all_layer")


@dataclass(frozen=True)
class Variant:
    """One way of training a group."""

    members: int
    remat: Remat = False


class Setting(NamedTuple):
    """What all measurements share."""

    config: RunConfig
    mesh: Mesh
    frozen: Tree
    batches: list[Batch]  # of a lone run, one a step
    tokens: int  # real ones in them
    flops: int  # a real token
    facts: dict[str, Any]


def bench_sweep(
    config: RunConfig,
    shape: ModelConfig,
    lengths: list[tuple[int, int]],
    variants: Sequence[Variant],
    steps: int,
    *,
    mix: bool = False,
) -> dict[str, Any]:
    """Time each variant's group over the same steps, against lone runs of the same members.

    Args:
      config: placement, rank, batch size, layers, attention; lone runs take its remat.
      lengths: (prompt, total) tokens of each row.
      mix: half of the members adapt attention only and half all layers; else all as the configuration says.
    """
    facts = device_facts()
    mesh = make_mesh(config.mesh)
    rows = random_rows(lengths, shape.vocab_size)
    plan = plan_run(config.optim, config.train, len(rows))
    parts = [plan.rows_of_step(step) for step in range(1, min(steps, plan.steps_per_epoch) + 1)]
    layout = choose_layout(rows, parts, plan.batch_rows, config.train, token_multiple(mesh))
    batches = [layout.build([rows[i] for i in part]) for part in parts]
    tokens = sum(rows[i].n_tokens for part in parts for i in part)
    scan = scan_layers(config.model.layers, jax.default_backend())
    backend = pick_backend(config.model.attention, jax.default_backend(), config.model.dtype, mesh.size)
    compute = Compute(backend, config.model.remat, plan.batch_rows if layout.packed else 1)
    conditions = MIX if mix else (config.lora.condition,)
    specs = [
        ModelSpec(shape, replace(config.lora, targets=condition), config.model.dtype, scan)
        for condition in conditions
    ]
    frozen = jax.block_until_ready(random_base(replace(specs[0], lora=None), 0, mesh))
    setting = Setting(config, mesh, frozen, batches, tokens, 4 * count_matrix_parameters(shape), facts)

    with jax.set_mesh(mesh):
        lone = []
        for condition, spec in zip(conditions, specs, strict=True):
            lone.append({"condition": condition} | measure(setting, [spec], compute))
            _say(f"alone, {condition}", lone[-1])
        fused = [
            measure_group(setting, specs, lone, variant, compute)
            for variant in sorted(variants, key=lambda v: v.members)
        ]
    return facts | {
        "benchmark": "sweep",
        "attention": backend,
        "layers": "scan" if scan else "unroll",
        "steps": len(parts),
        "batch_rows": plan.batch_rows,
        "real_tokens_of_a_member": tokens,
        "buffer_lengths": sorted({batch["tokens"].shape[-1] for batch in batches}),
        "padding_efficiency": tokens / sum(batch["tokens"].size for batch in batches),
        "lone": lone,
        "fused": fused,
    }


def measure_group(
    setting: Setting,
    specs: Sequence[ModelSpec],
    lone: Sequence[dict[str, Any]],
    variant: Variant,
    compute: Compute,
) -> dict[str, Any]:
    """A group whose members take these specs in turn, beside their lone runs; or that it does not fit."""
    turns = [i % len(specs) for i in range(variant.members)]
    result: dict[str, Any] = {"members": variant.members, "remat": variant.remat}
    try:
        result |= measure(setting, [specs[i] for i in turns], replace(compute, remat=variant.remat))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result["out_of_memory"] = str(error).splitlines()[0][:200]
    else:
        result["over_lone_runs"] = sum(lone[i]["seconds"] for i in turns) / result["seconds"]
    _say(f"{variant.members} members, remat {str(variant.remat).lower()}", result)
    return result


def measure(setting: Setting, members: Sequence[ModelSpec], compute: Compute) -> dict[str, Any]:
    """The steps of one run, or of several together."""
    config, mesh, batches = setting.config, setting.mesh, setting.batches
    states = [init_state(init_lora(member, i), config.optim) for i, member in enumerate(members)]
    spec, state, rate = members[0], states[0], jnp.float32(1e-4)
    if len(members) > 1:
        spec, state = group_spec(members), stack_members(states, members)
        rate = jnp.full(len(members), 1e-4, jnp.float32)
        batches = [stack_batches([batch] * len(members)) for batch in batches]
    del states
    state = place_trained(mesh, spec, state)
    step_fn = make_train_step(spec, config.optim, compute)
    compiling, seconds = _time(step_fn, mesh, state, setting.frozen, batches, rate)
    tokens_per_second = len(members) * setting.tokens / seconds
    peak = memory_in_use(jax.local_devices()[0])
    return {
        "seconds": seconds,
        "step_ms": seconds / len(batches) * 1e3,
        "real_tokens_per_second": tokens_per_second,
        **utilisation(tokens_per_second, setting.flops, setting.facts),
        "compile_seconds": compiling,
        "peak_memory_gib": peak / 2**30 if peak else None,  # so far in this process
    }


def _time(
    step_fn, mesh, state: TrainState, frozen: Tree, batches: list[Batch], rate: jax.Array
) -> tuple[float, float]:
    """Seconds until each shape of batch has been compiled and warmed up, and of all steps after that."""
    placed = [place_batch(mesh, batch) for batch in batches]
    shapes = {batch["tokens"].shape: batch for batch in placed}
    start = time.perf_counter()
    for batch in shapes.values():
        for _ in range(warm_up_runs()):
            state, metrics = step_fn(state, frozen, batch, rate)
    jax.block_until_ready(metrics)
    compiled = time.perf_counter()
    for batch in placed:
        state, metrics = step_fn(state, frozen, batch, rate)
    jax.block_until_ready(metrics)
    return compiled - start, time.perf_counter() - compiled


def _say(name: str, result: dict[str, Any]) -> None:
    if "out_of_memory" in result:
        console.print(f"{name}: out of memory")
        return
    text = f"{name}: {result['real_tokens_per_second']:,.0f} real tokens/s, {result['step_ms']:.1f} ms a step"
    if result["peak_memory_gib"]:
        text += f", peak {result['peak_memory_gib']:.1f} GiB"
    text += f", compiled in {result['compile_seconds']:.0f} s"
    if "over_lone_runs" in result:
        text += f"; {result['over_lone_runs']:.3f} times the lone runs"
    console.print(text)
