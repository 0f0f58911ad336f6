"""The planner counts what programs do, and its arithmetic is that of a pocket calculator."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from rich.console import Console

from jaxlora.cli import load_config
from jaxlora.commands import plan as command
from jaxlora.config import LoraConfig, MeshConfig, ModelSource, RunConfig, TrainConfig
from jaxlora.estimate import (
    REMATS,
    Roofline,
    attention_flops,
    candidates,
    estimate,
    factors,
    roofline,
    with_mesh,
)
from jaxlora.models.decoder import kept_per_token
from jaxlora.models.families import count_parameters, published_config
from jaxlora.models.grouped import group_tokens, rows_of
from jaxlora.models.spec import ModelConfig
from jaxlora.plan import report
from jaxlora.plan.hlo import Work, count_work, group_size
from jaxlora.plan.programs import Memory, Program, Programs, Workload, _text_of, deeper
from jaxlora.plan.report import run_cost
from jaxlora.runtime.devices import CHIPS, SLICES, memory_of, out_of_memory, peak_flops, slice_named, slice_of
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import decode_mesh, make_mesh, whole_mesh
from jaxlora.train.job import describe, estimate_memory, fits, memory_per_device, prepare

GIB = 2**30


# --- the table of chips


@pytest.mark.parametrize(
    ("name", "chips", "topology"),
    [
        ("v4-8", 4, "v4:2x2x1"),
        ("v4-32", 16, "v4:2x2x4"),
        ("v5e-4", 4, "v5e:2x2"),
        ("v5e-16", 16, "v5e:4x4"),
        ("v5p-8", 4, "v5p:2x2x1"),
        ("v6e-8", 8, "v6e:2x4"),
    ],
)
def test_cloud_names_become_chip_counts(name, chips, topology):
    assert (slice_named(name).n_chips, slice_named(name).topology) == (chips, topology)


def test_a_corner_has_one_link_along_each_axis_of_the_grid():
    assert slice_named("v5e-8").ici_rate == 2 * 50e9
    assert slice_named("v4-8").ici_rate == 2 * 50e9  # 2x2x1: the third axis has no neighbour
    assert slice_named("v4-16").ici_rate == 3 * 50e9


def test_an_unknown_slice_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'v5e-7' is not known; give one of v4-8, .*, or all"):
        slice_named("v5e-7")


def test_devices_are_recognised_as_their_slice():
    devices = [
        SimpleNamespace(device_kind="TPU v5 lite", coords=[x, y, 0]) for x in range(2) for y in range(4)
    ]
    found = slice_of(devices)
    assert (found.chip, found.n_chips, found.ici_rate) == (CHIPS["v5e"], 8, slice_named("v5e-8").ici_rate)
    assert slice_of(jax.devices()) is None


@pytest.mark.parametrize(
    ("kind", "rate"),
    [("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
     ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)],
)  # fmt: skip
def test_peak_rates_are_found_by_the_names_that_jax_gives(kind, rate):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == rate


# --- the roofline, by hand


def test_the_roofline_is_the_slowest_of_three():
    best = roofline(slice_named("v5e-8"), flops=19.7e12, hbm_bytes=81.9e9, ici_bytes=50e9)
    assert (best.compute, best.memory, best.interconnect) == pytest.approx((0.1, 0.1, 0.5))
    assert (best.seconds, best.bound) == (0.5, "interconnect")
    assert best.likely == pytest.approx(0.1 / 0.75 + 0.5 / 2)
    assert roofline(slice_named("v4-8"), 275e12, 1e9, 1e9).bound == "compute"
    assert roofline(slice_named("v6e-8"), 1e12, 1640e9, 1e9).bound == "memory"


def test_cost_of_a_run_by_hand():
    # 3,600 steps of half a second and 1,800 batches of one second: one hour on 8 chips at 2 dollars
    cost = run_cost(0.5, 3600, 1.0, 1800, n_chips=8, dollars_per_chip_hour=2.0)
    assert (cost.hours, cost.dollars) == (1.0, 16.0)
    assert run_cost(0.5, 3600, 1.0, 1800, 8, None).dollars is None


def test_attention_flops_by_hand():
    # 36 layers, 32 heads of 128: 2 products of 2 FLOPs for each of 1,000 queries and 500 keys
    expected = 36 * 2 * 2 * 32 * 128 * 1000 * 500
    assert attention_flops(published_config("qwen3-8b"), 1000, 500, passes=1) == expected


def test_the_estimate_of_a_step_by_hand():
    model, lora = published_config("qwen3-8b"), LoraConfig()
    layer_weights, head, adapters = 6_945_767_424, 622_329_856, 21_823_488
    one = estimate(model, lora, slice_named("v5e-8"), MeshConfig(1, 8, 1), False, 1, 4096, 128)
    assert one.tokens == 4096
    # 512 tokens a chip, 4 FLOPs a weight, 6 one of adapters
    # attention: 4 x 4096 x keys x 36 layers x (1 + 3.5) passes
    attention = 512 * 4 * 4096 * 4096 * (1 - 0.5 / 8) * 36 * 4.5
    products = 512 * (4 * (layer_weights + head) + 6 * adapters)
    assert one.best.compute * 197e12 == pytest.approx(products + attention)
    # seven eighths of: layers twice and the head once in bfloat16; keys and values three times; twice the
    # gradients of 21.8 million adapter weights
    gathers = 2 * (2 * layer_weights + head) * 7 / 8
    key_values = 3 * 36 * 2 * 4096 * 2 * 1024 * 7 / 8
    gradients = 2 * 2 * adapters * 7 / 8
    assert one.best.interconnect * 100e9 == pytest.approx(gathers + key_values + gradients)

    # without fsdp no weight moves: activations are summed 4 times a layer over 8 chips, both ways
    tensor = estimate(model, lora, slice_named("v5e-8"), MeshConfig(1, 1, 8), False, 1, 4096, 128)
    assert tensor.best.interconnect * 100e9 == pytest.approx(36 * 4 * 2 * (2 * 4096 * 4096) * 7 / 8)


# What the TPU compiler says of Qwen3-30B-A3B's training step at rank 32 (launch/README.md): GiB a chip,
# seconds at best.
COMPILED_30B = [
    ("v5p-8", MeshConfig(1, 1, 2, 2), 40.9, 0.170),
    ("v5p-8", MeshConfig(4, 1, 1), 77.7, 0.253),
    ("v6e-8", MeshConfig(1, 2, 2, 2), 25.1, 0.199),
    ("v5e-16", MeshConfig(1, 4, 2, 2), 14.4, 0.252),
]


@pytest.mark.parametrize(("name", "mesh", "memory", "seconds"), COMPILED_30B)
def test_the_estimate_of_a_mixture_is_what_the_compiler_says(name, mesh, memory, seconds):
    model, lora = published_config("qwen3-30b-a3b"), LoraConfig(rank=32)
    one = estimate(model, lora, slice_named(name), mesh, False, 1, 8 * 340, 128)
    assert one.memory / GIB == pytest.approx(memory, rel=0.03)
    assert one.best.seconds == pytest.approx(seconds, rel=0.06)


def test_the_estimate_of_full_fine_tuning_by_hand():
    """Six FLOPs per weight and token, 18 bytes per parameter, and the gradients of all weights summed."""
    model, slice_ = published_config("qwen3-8b"), slice_named("v5e-32")
    layer_weights, head, parameters = 6_945_767_424, 622_329_856, 8_190_735_360
    assert count_parameters(model) == parameters

    def of(what, mesh, remat=False, buffers=1):
        return estimate(model, LoraConfig(), slice_, mesh, remat, buffers, 4096, 128, what)

    mesh, adapters = MeshConfig(1, 32, 1), 21_823_488
    lora, full = of("lora", mesh), of("full", mesh)
    tokens = 4096 / 32
    more = tokens * (2 * (layer_weights + head) - 6 * adapters)
    assert full.best.compute * 197e12 == pytest.approx(lora.best.compute * 197e12 + more)
    attention = tokens * 4 * 4096 * 4096 * (1 - 0.5 / 32) * 36 * 4.5
    assert full.best.compute * 197e12 == pytest.approx(tokens * 6 * (layer_weights + head) + attention)
    again = of("full", mesh, remat=True)
    more = tokens * 2 * layer_weights + attention / 4.5
    assert again.best.compute * 197e12 == pytest.approx(full.best.compute * 197e12 + more)

    # a reduce-scatter of bfloat16 gradients instead of an all-reduce of the adapters'
    more = 2 * parameters * 31 / 32 - 2 * 2 * adapters * 31 / 32
    assert full.best.interconnect * 100e9 == pytest.approx(lora.best.interconnect * 100e9 + more)
    # master weights, gradients and two moments; the head's gradient before it is split
    more = 16 * parameters / 32 + 4 * head - 16 * adapters
    assert full.memory == pytest.approx(lora.memory + more)
    # bfloat16 gradients written and read; then seven passes in float32 and the copy written
    more = 2 * 2 * parameters + (7 * 4 + 2) * parameters / 32 - 7 * 4 * adapters
    assert full.best.memory * 819e9 == pytest.approx(lora.best.memory * 819e9 + more)

    # two copies: what a reduce-scatter over 16 leaves on a chip is summed over the two
    lora, full = of("lora", MeshConfig(2, 16, 1)), of("full", MeshConfig(2, 16, 1))
    more = 2 * parameters * 15 / 16 + 2 * 2 * parameters / 16 / 2 - 2 * 2 * adapters * 31 / 32
    assert full.best.interconnect * 100e9 == pytest.approx(lora.best.interconnect * 100e9 + more)

    # micro-batches: one more gradient in memory, and still only one update a step
    whole, split = of("full", mesh), of("full", mesh, buffers=4)
    assert whole.tokens == split.tokens == 4096  # the shortest buffer that 32 chips can share
    assert split.memory == pytest.approx(whole.memory + 4 * parameters / 32)
    update = (7 * 4 + 2) * parameters / 32
    assert split.best.memory * 819e9 == pytest.approx(4 * (whole.best.memory * 819e9 - update) + update)


def test_full_fine_tuning_takes_more_memory_and_time_than_lora_on_every_mesh():
    model, slice_ = published_config("qwen3-0.6b"), slice_named("v5e-4")
    lora = candidates(model, LoraConfig(), slice_, 2720, 128)
    full = candidates(model, LoraConfig(), slice_, 2720, 128, what="full")
    assert {c.mesh for c in lora} == {c.mesh for c in full}
    for ours, theirs in zip(sorted(lora, key=_setting), sorted(full, key=_setting), strict=True):
        assert _setting(ours) == _setting(theirs)
        assert ours.memory < theirs.memory
        assert ours.best.compute < theirs.best.compute
    # 18 bytes for each of 596 million parameters
    copies = next(c for c in full if (c.mesh, c.remat) == (MeshConfig(4, 1, 1), True))
    assert copies.memory > 18 * count_parameters(model)


def _setting(choice):
    mesh = choice.mesh
    return mesh.data, mesh.fsdp, mesh.tensor, REMATS.index(choice.remat), choice.buffers


def test_the_search_tries_every_mesh_and_prefers_speed():
    assert sorted(factors(4)) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    choices = candidates(published_config("qwen3-8b"), LoraConfig(), slice_named("v5e-16"), 2720, 128)
    assert choices[0].best.likely <= 1.05 * min(c.best.likely for c in choices)
    for a, b in pairwise(choices):
        alike = max(a.best.likely, b.best.likely) <= 1.05 * min(a.best.likely, b.best.likely)
        simpler = (a.buffers, REMATS.index(a.remat), a.memory) <= (b.buffers, REMATS.index(b.remat), b.memory)
        assert a.best.likely < b.best.likely or (alike and simpler)
    assert {c.mesh.tensor for c in choices} == {1, 2, 4, 8}  # 16 does not divide 8 key-value heads
    assert all(c.tokens % (128 * c.mesh.data * c.mesh.fsdp) == 0 for c in choices)
    whole = next(c for c in choices if (c.mesh.fsdp, c.mesh.tensor, c.remat) == (1, 1, False))
    assert whole.memory > 16 * GIB  # the whole base on one v5e chip


@pytest.mark.parametrize(
    ("name", "remat", "expected"),
    [
        ("v5e-8", False, MeshConfig(2, 1, 4)),
        ("v5e-4", False, MeshConfig(1, 2, 2)),  # fully split by heads, activations would not fit
        ("v5e-4", True, MeshConfig(2, 1, 2)),
    ],
)
def test_the_mesh_chosen_for_a_slice_fits_and_is_the_fastest(name, remat, expected):
    model, slice_ = published_config("qwen3-8b"), slice_named(name)
    config = RunConfig(model=ModelSource(remat=remat))
    chosen = with_mesh(config, model, slice_)
    assert chosen.mesh == expected
    assert replace(chosen, mesh=config.mesh) == config
    whole = [c for c in candidates(model, LoraConfig(), slice_, 2720, 128) if c.buffers == 1]
    fitting = [c for c in whole if c.remat == remat and c.memory < 0.9 * slice_.chip.hbm_bytes]
    best = min(c.best.likely for c in fitting)
    assert next(c for c in fitting if c.mesh == expected).best.likely <= 1.05 * best


def test_the_mesh_of_a_run_that_trains_all_weights_is_chosen_for_that():
    model, slice_ = published_config("qwen3-8b"), slice_named("v5e-16")
    adapters, whole = RunConfig(), RunConfig(train=TrainConfig(what="full"))
    multiple = whole.train.buffer_multiple
    fitting = [
        c.mesh
        for c in candidates(model, LoraConfig(), slice_, 2720, multiple, what="full")
        if c.memory < 0.9 * slice_.chip.hbm_bytes and c.buffers == 1 and not c.remat
    ]
    assert with_mesh(whole, model, slice_).mesh == fitting[0]
    # The adapters' mesh copies 18 bytes a parameter to chips that have no room for them.
    assert with_mesh(adapters, model, slice_).mesh not in fitting


def test_a_mesh_that_is_given_stays_and_off_the_table_nothing_is_chosen():
    model = published_config("qwen3-8b")
    given = RunConfig(mesh=MeshConfig(fsdp=8))
    assert with_mesh(given, model, slice_named("v5e-8")) is given
    assert with_mesh(RunConfig(), model, None) == RunConfig()
    assert slice_of(jax.devices()) is None  # these are CPUs


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1, 8, 1)),
        ({"tensor": 2}, (1, 4, 2)),
        ({"fsdp": 8, "tensor": 1}, (1, 8, 1)),
        ({"data": -1}, (8, 1, 1)),
        ({"fsdp": 2, "tensor": -1}, (1, 2, 4)),
    ],
)
def test_axes_that_are_not_given_are_one_and_fsdp_takes_what_is_left(given, expected):
    assert whole_mesh(MeshConfig(**given), 8) == MeshConfig(*expected)


def test_decoding_never_gathers_weights():
    model = published_config("qwen3-8b")
    devices = jax.devices()[:8]
    mesh = decode_mesh(make_mesh(MeshConfig(), devices), model.num_key_value_heads)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 8}
    fewer_heads = replace(model, num_key_value_heads=4)
    assert dict(decode_mesh(mesh, fewer_heads.num_key_value_heads).shape) == {
        "data": 2,
        "fsdp": 1,
        "tensor": 4,
    }


@pytest.mark.parametrize(("n", "tensor"), [(1, 1), (2, 2), (3, 1), (4, 4), (5, 1), (6, 2), (7, 1), (8, 8)])
def test_any_number_of_devices_decodes_split_by_heads_as_far_as_they_allow(n, tensor):
    mesh = make_mesh(MeshConfig(), jax.devices()[:n])
    decoding = decode_mesh(mesh, published_config("qwen3-8b").num_key_value_heads)
    assert dict(decoding.shape) == {"data": n // tensor, "fsdp": 1, "tensor": tensor}
    assert set(decoding.devices.flat) == set(mesh.devices.flat)


# --- counting compiled programs


def compiled_text(function, mesh, *arguments) -> str:
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().as_text()


def test_loops_collectives_and_products_of_a_program_for_eight_devices():
    """x <- x W for 5 layers of weights split over 8 devices, then a sum over the devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, jax.P(*spec)))

    def program(x, weights):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, jax.P())
            return jax.lax.with_sharding_constraint(x @ whole, jax.P("x")), None

        x, _ = jax.lax.scan(layer, x, weights)
        return jax.lax.with_sharding_constraint(jnp.sum(x, axis=0), jax.P())

    text = compiled_text(program, mesh, array((64, 32), "x"), array((5, 32, 32), None, "x"))
    work = count_work(text)
    assert work.flops == 5 * 2 * 8 * 32 * 32  # each device has 8 of 64 rows
    assert work.ici["all-gather"] == 5 * 4 * 32 * 32 * 7 / 8
    assert work.ici["all-reduce"] == 2 * 4 * 32 * 7 / 8
    assert work.dynamic_loops == 0
    assert work.largest_entry_gather == 0
    assert work.hbm_bytes >= 5 * 3 * 4 * 32 * 32  # a gathered weight is written and read


def test_a_loop_decided_at_run_time_counts_as_told():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def program(n, x):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    arguments = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    text = compiled_text(program, mesh, *arguments)
    assert count_work(text, dynamic_trips=3).flops == 3 * 2 * 16**3
    assert count_work(text).dynamic_loops == 1


def test_batched_products_count_each_batch_once():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = jax.ShapeDtypeStruct((3, 16, 32), jnp.float32), jax.ShapeDtypeStruct((3, 32, 64), jnp.float32)
    assert count_work(compiled_text(jnp.matmul, mesh, *shapes)).flops == 2 * 3 * 16 * 32 * 64


INT8 = """
ENTRY %main (a: s8[4,8], b: s8[8,2], c: bf16[8,2]) -> s32[4,2] {
  %a = s8[4,8]{1,0} parameter(0)
  %b = s8[8,2]{1,0} parameter(1)
  %c = bf16[8,2]{1,0} parameter(2)
  %mixed = f32[4,2]{1,0} dot(%a, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = s32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_products_of_two_factors_in_8_bits_are_counted_apart():
    work = count_work(INT8)
    assert (work.flops, work.flops8) == (2 * 2 * 4 * 8 * 2, 2 * 4 * 8 * 2)


STACKED = """
%view (p: s8[6,4,8]) -> s8[6,4,8] {
  %p = s8[6,4,8]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[6,4,8]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%slice (q: s8[6,4,8], i: s32[]) -> s8[4,8] {
  %q = s8[6,4,8]{2,1,0} parameter(0)
  %v = s8[6,4,8]{2,1,0} fusion(%q), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%view
  %i = s32[] parameter(1)
  %o = s8[1,4,8]{2,1,0} dynamic-slice(%v, %i, %i, %i), dynamic_slice_sizes={1,4,8}
  ROOT %b = s8[4,8]{1,0} bitcast(%o)
}

%turn (t: s8[8,2]) -> s8[8,2] {
  %t = s8[8,2]{1,0} parameter(0)
  ROOT %b2 = s8[8,2]{0,1} bitcast(%t)
}

%fused (r: s8[6,4,8], j: s32[], u: s8[8,2]) -> s32[4,2] {
  %r = s8[6,4,8]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %own = s8[4,8]{1,0} fusion(%r, %j), kind=kLoop, calls=%slice
  %u = s8[8,2]{1,0} parameter(2)
  %same = s8[8,2]{1,0} fusion(%u), kind=kLoop, calls=%turn
  ROOT %product = s32[4,2]{1,0} dot(%own, %same), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: s8[6,4,8], n: s32[], x: s8[8,2]) -> s32[4,2] {
  %a = s8[6,4,8]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = s8[8,2]{1,0} parameter(2)
  ROOT %y = s32[4,2]{1,0} fusion(%a, %n, %x), kind=kOutput, calls=%fused
}
"""


def test_of_stacked_weights_seen_through_a_view_one_layer_is_read_and_of_others_all():
    assert count_work(STACKED).hbm_bytes == 4 * 8 + 4 + 8 * 2 + 4 * 4 * 2


GATHER = 'channel_id=1, replica_groups=[1,8]<=[8], dimensions={1}, frontend_attributes={chain_id="0"}'
ASYNC_GATHER = """
%start (p: bf16[8,4]) -> (bf16[8,4], bf16[8,32]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %g1 = bf16[8,32]{1,0} all-gather(%p), GATHER
  ROOT %c1 = (bf16[8,4]{1,0}, bf16[8,32]{1,0}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%done (q: bf16[8,4], r: bf16[8,32]) -> bf16[8,32] {
  %q = bf16[8,4]{1,0} parameter(0)
  %r = bf16[8,32]{1,0} parameter(1)
  %g2 = bf16[8,32]{1,0} all-gather(%q), GATHER
  ROOT %c2 = bf16[8,32]{1,0} custom-call(%r, %g2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,32] {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[8,4]{1,0}, bf16[8,32]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %s0 = bf16[8,4]{1,0} get-tuple-element(%s), index=0
  %s1 = bf16[8,32]{1,0} get-tuple-element(%s), index=1
  ROOT %d = bf16[8,32]{1,0} fusion(%s0, %s1), kind=kCustom, calls=%done
}
""".replace("GATHER", GATHER)


def test_a_gather_that_overlaps_with_work_counts_once():
    assert dict(count_work(ASYNC_GATHER).ici) == {"all-gather": 2 * 8 * 4 * 7}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
    ],
)
def test_every_notation_of_groups_is_read(text, size):
    assert group_size(f"(%x), channel_id=1, {text}, dimensions={{0}}") == size


def test_the_compilers_out_of_memory_error_is_read():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.95G of 15.75G hbm. Exceeded hbm capacity by 5.20G."
    )
    assert out_of_memory(message) == int(5.2 * GIB)
    message = "HLO temporaries (16.25G) exceeds available HBM (15.75G)."
    assert out_of_memory(message) == GIB // 2
    assert out_of_memory("INTERNAL: something else") is None


# --- plans


def test_a_plan_names_the_longest_step_that_fits():
    """By hand: 4 GiB of arguments leave 12 of 16, and 3 GiB hold 3,072 tokens. Blocks are of 128 x 4."""
    memory = Memory(4 * GIB, 3 * GIB, 0, 0)
    step = Program("train step", 3072, memory, 0.0, Work(), roofline(slice_named("v5e-8"), 1, 1, 1), 1.0)
    assert report.longest_buffer(step, 16 * GIB, 512, most=16384) == 12288
    assert report.longest_buffer(step, 15.9 * GIB, 512, most=16384) == 11776
    assert report.longest_buffer(step, 16 * GIB, 512, most=12288) is None  # no longer one is allowed
    assert report.longest_buffer(step, 6.9 * GIB, 512, most=16384) == 3072  # what was compiled


def fake_program(name: str, peak: float, missing: int = 0) -> Program:
    best = roofline(slice_named("v5e-8"), 19.7e12, 1e9, 1e9)
    return Program(name, 3072, Memory(int(peak), 0, 0, 0, missing), 19.7e12, Work(), best, 1.0)


@pytest.fixture
def compiled(monkeypatch):
    """Programs that are said to take so many bytes a chip; nothing is compiled."""

    def set_peak(peak: float, missing: int = 0) -> None:
        class Fake(Programs):
            def __init__(self, config, model, slice_, workload):
                self.config, self.mesh = config, make_mesh(MeshConfig(), jax.devices()[:1])

            def train_step(self):
                return fake_program("train step", peak, missing)

            validation_step = prefill = decode_step = train_step

        monkeypatch.setattr(report, "Programs", Fake)

    return set_peak


def run_tool(repository, *arguments) -> int | str | None:
    spec = importlib.util.spec_from_file_location("plan_tool", repository / "tools" / "plan.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["plan.py", "--config", str(repository / "configs" / "main.py"), *arguments]
        )
        with pytest.raises(SystemExit) as exit_:
            tool.run_main(tool.main)
    return exit_.value.code


def test_a_plan_that_fits_exits_with_0_and_writes_json(repository, tmp_path, compiled, capsys):
    compiled(8 * GIB)
    file = tmp_path / "plan.json"
    assert run_tool(repository, "--topology", "v5e-8", "--price", "1.2", "--json", str(file)) == 0
    (plan,) = json.loads(file.read_text())
    # 6,338 steps and 7 x 177 validation batches, each taken to be as long as a step
    seconds = plan["programs"][0]["best"]["likely"]
    hours = (6338 + 7 * 177) * seconds / 3600
    assert plan["run"] == pytest.approx({"hours": hours, "dollars": hours * 8 * 1.2})
    assert plan["sweep"]["hours"] == pytest.approx(6 * hours)
    assert plan["programs"][0]["best"]["bound"] == "compute"
    assert (
        f"v5e-8: fits; likely {8 * 340 / seconds:,.0f} tokens/s (at best 27,200)" in capsys.readouterr().out
    )
    assert run_tool(repository, "--topology", "v5e-8", "--json", str(file)) == 2  # never overwritten


@pytest.mark.parametrize(("peak", "missing"), [(15.9 * GIB, 0), (8 * GIB, 3 * GIB)])
def test_a_plan_that_does_not_fit_exits_with_1_and_says_what_would(
    repository, compiled, capsys, peak, missing
):
    compiled(peak, missing)
    assert run_tool(repository, "--topology", "v5e-4") == 1
    out = capsys.readouterr().out
    assert "v5e-4: does not fit; --config.mesh.data=" in out
    assert "should fit" in out


def test_a_mistake_exits_with_2_and_one_line(repository, capsys):
    assert run_tool(repository, "--topology", "v9-8") == 2
    assert capsys.readouterr().err.startswith("error: --topology: 'v9-8' is not known")


def test_advice_names_a_larger_slice_where_this_one_is_too_small():
    config = RunConfig()
    advice = report.what_would_fit(config, published_config("qwen3-32b"), slice_named("v5e-4"), Workload())
    assert advice.startswith("on v5e-8, --config.mesh.data=")
    none = report.what_would_fit(
        config, published_config("qwen3-32b"), slice_named("v6e-8"), Workload(row_tokens=1e6)
    )
    assert none == "no v6e slice in the table is large enough"


def test_a_search_plans_the_first_choice_that_fits(repository, compiled, capsys):
    compiled(8 * GIB)
    assert run_tool(repository, "--topology", "v5e-8", "--search") == 0
    out = capsys.readouterr().out
    mesh = "--config.mesh.data=2 --config.mesh.fsdp=1 --config.mesh.tensor=4"
    assert f"{mesh} --config.model.remat=false: fits" in out
    compiled(8 * GIB, missing=1)
    assert run_tool(repository, "--topology", "v5e-8", "--search") == 1
    assert "none of the choices tried fits" in capsys.readouterr().out


def test_all_topologies_are_planned_and_compared(repository, compiled, capsys, monkeypatch):
    compiled(1 * GIB)
    assert run_tool(repository, "--topology", "all") == 0
    out = capsys.readouterr().out
    assert all(f"{name}: fits" in out for name in SLICES)
    monkeypatch.setenv("COLUMNS", "80")
    assert run_tool(repository, "--topology", "all", "--price", "1.2") == 0
    comparison = capsys.readouterr().out.split("mesh data,")[1]
    assert all(f"\n{name} " in comparison for name in SLICES)
    assert "…" not in comparison
    assert len(CHIPS) == 4


@pytest.mark.parametrize(
    "words",
    [
        ["--train-rows", "0"],
        ["--validation-rows", "many"],
        ["--row-tokens", "-5"],
        ["--row-tokens", "nan"],
        ["--price", "-1"],
        ["--price", "inf"],
        ["--json", "no/such/folder/plan.json"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_said_before_anything_is_compiled(repository, monkeypatch, capsys, words):
    monkeypatch.setattr(Programs, "__init__", lambda *_: pytest.fail("compiled"))
    assert run_tool(repository, "--topology", "v5e-8", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --")
    assert "; " in line


def test_the_tool_leaves_the_machines_own_devices_alone(repository):
    code = "import os, runpy, sys; sys.argv = 'plan.py --topology none --config configs/tiny.py'.split()\n"
    code += "try: runpy.run_path('tools/plan.py', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print(os.environ['JAX_PLATFORMS'])"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, env=environment
    )
    assert done.stdout.rstrip().endswith("cpu"), done.stderr


# --- the real compiler


@pytest.mark.slow
def test_the_real_tpu_compiler_takes_all_four_programs(tpu_compiler):
    model = ModelConfig(
        vocab_size=32_768,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        eos_token_ids=(1,),
    )
    config = RunConfig(mesh=MeshConfig(1, 4, 2), model=ModelSource(remat=True))
    config = replace(config, eval=replace(config.eval, batch_rows=32, max_new_tokens=64))
    plan = report.make_plan(config, model, slice_named("v5e-8"), Workload(prompt_tokens=128), dollars=1.0)
    assert plan.fits
    train, validation, prefill, decode = plan.programs
    assert train.work.kernels["splash_mha_fwd_segmented_residuals"] == 2 * 4  # again in the backward pass
    assert train.work.kernels["splash_mha_dq_segmented_no_residuals"] == 4
    assert validation.work.kernels
    assert not prefill.work.kernels  # the decoder's attention is XLA's
    # nothing larger than the head is gathered outside the loop over layers
    assert train.work.largest_entry_gather <= 2 * 32_768 * 1024 / 2
    # the weights of all layers and every token's keys and values, gathered over 4 chips in each of two
    # passes, the head's once more, and little else
    layer_weights = 4 * (1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 2048)
    keys_and_values = 4 * train.tokens * 2 * 8 * 128
    gathers = 2 * (2 * (layer_weights + keys_and_values) + 32_768 * 1024) / 2 * 3 / 4
    assert gathers < train.work.ici["all-gather"] < 1.02 * gathers
    # products: 4 FLOPs a weight and token, a third pass of 2 but for down_proj, and adapters
    tokens = train.tokens / 4
    weights = (4 * layer_weights + 2 * (layer_weights - 4 * 1024 * 2048) + 4 * 32_768 * 1024) / 2
    assert weights * tokens < train.work.flops < 1.15 * weights * tokens
    assert decode.work.ici.get("all-gather", 0) < 1e6  # no weights move
    assert plan.to_json()["run"]["dollars"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "condition", "most"),
    [
        ("v5e-8", "all_layer", 12 * GIB),
        ("v5e-8", "attention_only", 12 * GIB),
        ("v4-8", "all_layer", 20 * GIB),
        ("v4-8", "attention_only", 20 * GIB),
    ],
)
def test_the_studys_training_step_fits_with_room(tpu_compiler, name, condition, most):
    """Qwen3-8B as `configs/main.py` trains it. The real compiler: a minute and a half each."""
    model, config = published_config("qwen3-8b"), RunConfig(lora=LoraConfig(condition))
    programs = Programs(config, model, slice_named(name), Workload())
    step = programs.train_step()
    base = 2 * count_parameters(model) / programs.mesh.shape["tensor"] / programs.mesh.shape["fsdp"]
    assert base < step.memory.arguments < step.memory.total < most
    assert step.memory.missing == 0
    assert sum(runs for kernel, runs in step.work.kernels.items() if "splash" in kernel) == 3 * 36
    head = 2 * model.vocab_size * model.hidden_size
    assert step.work.largest_entry_gather <= head  # the layers' weights are never gathered all at once


class TestHere:
    """`--dry-run`, and the plan without a slice."""

    @pytest.fixture
    def job(self, tmp_path):
        return prepare(load_config("tiny", {"results_dir": str(tmp_path)}), with_weights=False)

    @pytest.mark.parametrize(
        ("share", "verdict", "words"),
        [
            (0.5, True, "fits"),
            (0.9, None, "may not fit; train.max_buffer_tokens"),
            (1.2, None, "may not fit"),
            (2.0, False, "does not fit; train.max_buffer_tokens or train.batch_rows smaller"),
        ],
    )
    def test_it_says_whether_the_memory_fits(self, job, monkeypatch, share, verdict, words):
        needed = memory_per_device(job)
        monkeypatch.setattr("jaxlora.train.job.memory_of", lambda device: int(needed / share))
        assert fits(needed, jax.devices()[0]) is verdict
        table = Console(width=400, file=io.StringIO())
        table.print(describe(job))
        (line,) = [line for line in table.file.getvalue().splitlines() if line.strip().startswith("room")]
        assert words in line
        assert f"about {needed / 2**30:.2f} of the {needed / share / 2**30:.2f} GiB" in line

    @pytest.mark.parametrize(
        ("rate", "what", "warned"), [(1e-6, "lora", True), (1e-6, "full", False), (1e-3, "lora", False)]
    )
    def test_it_warns_of_a_rate_of_full_fine_tuning_on_an_adapter(self, job, rate, what, warned):
        optim, train = replace(job.config.optim, peak_lr=rate), replace(job.config.train, what=what)
        table = Console(width=400, file=io.StringIO())
        table.print(describe(replace(job, config=replace(job.config, optim=optim, train=train))))
        assert ("times below the published rule for adapters" in table.file.getvalue()) == warned

    def test_it_warns_of_validation_rows_whose_prompts_are_trained_on(self, job):
        def printed(rows):
            table = Console(width=400, file=io.StringIO())
            table.print(describe(replace(job, validation_rows=rows)))
            return table.file.getvalue()

        assert "also trained on" not in printed(job.validation_rows)
        rows = [*job.validation_rows[2:], *job.train_rows[:2]]
        assert "overlap" in printed(rows)
        assert "2 of the validation rows have a prompt that is also trained on" in printed(rows)

    def test_the_base_is_split_over_fsdp_and_an_adapter_is_not(self, job):
        parts = estimate_memory(job)
        devices = job.mesh.size  # simulated ones, which share this machine's memory
        assert job.mesh.shape["fsdp"] == devices
        trained, head = parts["trained weights, gradients and moments"], parts["output head"]
        whole = parts["base"] + parts["activations"] + devices * (trained + head)
        assert memory_per_device(job) == pytest.approx(whole, abs=1)

    def test_a_machines_memory_is_what_the_system_says(self):
        (line,) = [x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemTotal")]
        assert 0 < memory_of(jax.devices()[0]) <= int(line.split()[1]) * 1024

    def test_the_command_plans_for_this_machine_where_no_slice_is_named(self, monkeypatch, capsys, tmp_path):
        words = ["plan", "--config", "tiny", f"--config.results_dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", words)
        assert command.main() == 0
        assert "of the" in capsys.readouterr().err
        monkeypatch.setattr("jaxlora.train.job.memory_of", lambda device: 2**20)
        monkeypatch.setattr(sys, "argv", words)
        assert command.main() == 1
        monkeypatch.setattr(sys, "argv", [*words, "--search"])
        with pytest.raises(UserError, match="--search is for a slice: give --topology as well"):
            command.main()


def test_a_program_that_this_jax_cannot_read_is_one_line():
    def unreadable():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nasync-update instruction")

    with pytest.raises(
        UserError, match=r"^the installed TPU compiler does not match this JAX; run `pip"
    ) as caught:
        _text_of(SimpleNamespace(as_text=unreadable))
    assert "\n" not in str(caught.value)


# --- Mixtures of experts ------------------------------------------------------------------------------------


def test_a_deep_program_lies_on_the_line_through_two_shallow_ones():
    def program(layers: int) -> Program:
        memory = Memory(100 + 10 * layers, 7 * layers, 3, 5)
        work = Work(
            2.0 + layers, 0.0, 0.0, 50.0 * layers, {"all-gather": 4.0 * layers}, {"kernel": 3 * layers}
        )
        return Program("prefill", 64, memory, 2.0 + layers, work, Roofline(0, 0, 0), 1.5)

    slice_ = slice_named("v6e-8")
    found = deeper(program(2), program(4), (48 - 2) / (4 - 2), slice_)
    expected = program(48)
    best = roofline(slice_, expected.flops, expected.work.hbm_bytes, expected.work.ici_bytes)
    assert found == replace(expected, best=best, compile_seconds=3.0)


def test_a_chip_has_room_for_the_rows_of_all_tokens_that_share_its_experts():
    experts = published_config("qwen3-30b-a3b").experts
    assert rows_of(experts, 1408, 2) == 1408 * 2 * 8 + 64 * 127 // 128 * 128  # 22,528 choices, 64 experts
    groups = group_tokens(jnp.zeros((2816, 8), jnp.int32), 64, 128)
    assert groups.token.shape == (rows_of(experts, 1408, 2),)
    whole, _ = kept_per_token(published_config("qwen3-30b-a3b"), "elementwise", 1408, 2)
    assert whole == (3 + rows_of(experts, 1408, 2) / 1408) * 2048
