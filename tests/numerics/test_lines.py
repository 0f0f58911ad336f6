"""What GPUs do with a mesh, on simulated devices: whole rows on each, through every door to a step."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxlora
from jaxlora import sharding
from jaxlora.checkpoints.base import random_base
from jaxlora.config import LoraConfig, MeshConfig, ModelSource, RunConfig, TrainConfig, from_dict
from jaxlora.data.packing import pack, pad
from jaxlora.data.render import RenderedRow
from jaxlora.estimate import mesh_here, mesh_of_gpus
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import init_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import published_config
from jaxlora.models.quantised import Scheme
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import gather_again, make_mesh, place_batch, place_trained
from jaxlora.train import step as train_step
from jaxlora.train.job import prepare
from jaxlora.train.loop import train
from jaxlora.train.step import Compute, make_gradient_step

GIB = 2**30


@pytest.fixture
def as_on_gpus(monkeypatch):
    """A line of whole rows for each device."""
    for module in (sharding, train_step):
        monkeypatch.setattr(module, "token_lines", sharding.token_shards)


def test_the_engine_finds_the_same_on_one_device_and_in_lines(as_on_gpus):
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(5, 900, n).tolist()} for n in (40, 9, 23, 64, 5)]
    found = []
    for shape in ((1, 1, 1), (2, 2, 1)):
        devices = jax.devices()[: shape[0] * shape[1]]
        engine = jaxlora.load("embedded:base", mesh=make_mesh(MeshConfig(*shape), devices))
        assert engine.machine.lines == len(devices)
        trainer = engine.lora(rank=2, targets="v_proj")
        result = trainer.forward_backward(rows)
        norms = trainer.optim_step(1e-2)
        found.append((result.loss, norms["grad_norm"], result.logprobs, trainer.logprobs(rows)))
    one, lines = found
    assert lines[:2] == pytest.approx(one[:2], rel=1e-5)
    for ours, expected in zip(lines[2] + lines[3], one[2] + one[3], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_split_weights_are_summed_over_an_axis_of_experts_too(as_on_gpus):
    """The engine takes such a mesh for a model without experts."""
    rows = [{"tokens": np.arange(5 + i, 25 + i).tolist()} for i in range(4)]
    norms = []
    for mesh, n in ((MeshConfig(1, 1, 1), 1), (MeshConfig(1, 2, 1, expert=2), 4)):
        engine = jaxlora.load("embedded:base", mesh=make_mesh(mesh, jax.devices()[:n]))
        trainer = engine.lora(rank=256, targets="v_proj")
        trainer.forward_backward(rows)
        norms.append(trainer.optim_step(1e-3)["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_line_has_no_more_rows_than_kernels_look_for():
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(5, 900, 8).tolist()} for _ in range(300)]
    engine = jaxlora.load("embedded:base")
    engine.machine = replace(engine.machine, backend="cudnn")  # whose lines are long
    trainer = engine.lora(rank=2)
    found = list(trainer._batches(trainer._render(rows)))
    assert sum(len(by_row(batch["tokens"])) for batch, _, by_row in found) == 300
    for batch, compute, _ in found:
        assert batch["segment_ids"].max() <= compute.max_segments


@pytest.mark.parametrize("lines", [2, 4])
def test_rows_that_devices_divide_neither_by_number_nor_by_length_are_computed_whole(lines):
    config = replace(published_config("qwen3-8b"), vocab_size=64, hidden_size=24, intermediate_size=24)
    config = replace(config, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    spec = ModelSpec(config, LoraConfig(rank=2), "float32", scan=False)
    rng, found = np.random.default_rng(0), []
    rows = [
        RenderedRow(str(i), rng.integers(0, 64, 20).astype(np.int32), np.ones(20, np.float32))
        for i in range(lines)
    ]
    for devices in (1, 3):
        mesh = make_mesh(MeshConfig(1, devices, 1), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            trained = place_trained(mesh, spec, jax.tree.map(lambda x: x + 0.02, init_lora(spec, 0)))
            batch = place_batch(mesh, pad(rows, (32,), lines))
            step = make_gradient_step(spec, Compute(by_line=devices > 1))
            zeros = jax.tree.map(jnp.zeros_like, trained)
            grads, *values = step(trained, zeros, random_base(spec, 0, mesh, std=0.1), batch)
            found.append(jax.tree.map(np.asarray, (values, grads)))
    for ours, expected in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [False, True], ids=["adapter kept", "merged"])
@pytest.mark.parametrize("scan", [False, True], ids=["unroll", "scan"])
def test_all_that_decodes_lies_on_one_mesh_and_the_adapter_whole_on_every_device(monkeypatch, merge, scan):
    """As GPUs decode. A program with custom kernels refuses arrays of another mesh, and a part of an adapter
    would be gathered for every token."""
    config = replace(published_config("qwen3-8b"), vocab_size=64, hidden_size=32, intermediate_size=32)
    config = replace(config, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    spec = ModelSpec(config, LoraConfig(rank=256), "float32", scan)
    mesh, copies = (make_mesh(MeshConfig(*sizes)) for sizes in ((1, 8, 1), (8, 1, 1)))
    monkeypatch.setattr("jaxlora.generate.weights.decode_mesh", lambda *_: copies)
    with jax.set_mesh(mesh):
        lora = place_trained(mesh, spec, init_lora(spec, 0))
        base = random_base(spec, 0, mesh)
        assert not any(x.sharding.is_fully_replicated for x in jax.tree.leaves(lora))
        _, kept, weights, found = decode_weights(spec, lora, base, merge=merge)
    assert found == copies
    for x in jax.tree.leaves((kept, weights)):
        assert x.sharding.mesh == copies
        assert x.sharding.is_fully_replicated
    assert bool(kept) != merge
    for ours, expected in zip(*map(jax.tree.leaves, (kept, lora if kept else {})), strict=True):
        np.testing.assert_array_equal(ours, expected)
    norms = (tree["norm"]["weight"].addressable_shards[0].data for tree in (weights, base))
    assert len({x.unsafe_buffer_pointer() for x in norms}) == 1  # what lies alike is no copy


@pytest.mark.slow
def test_a_run_in_lines_ends_where_one_on_one_device_does(as_on_gpus, tmp_path):
    values = {
        "model": {"path": "embedded:base", "dtype": "float32"},
        "lora": {"rank": 4, "dropout": 0.1},
        "data": {"train_path": "embedded:data/train.jsonl", "validation_path": "embedded:data/val.jsonl"},
        "train": {"batch_rows": 8, "epochs": 1, "startup_check": False},
    }
    values["data"] |= {"train_rows": 16, "validation_rows": 8, "shuffle": False}
    nll = []
    for name, data in (("one", 1), ("lines", 4)):
        config = from_dict(values | {"name": name, "results_dir": str(tmp_path)})
        devices = jax.devices()[:data]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_, own=devices: own)
            job = prepare(config)
            assert job.train_layout.lines == data
            nll.append(train(job).mean_nll)
    assert nll[1] == pytest.approx(nll[0], rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_8_bit_base_gives_the_same_gradients_in_lines(kind, shape):
    config = replace(published_config("qwen3-8b"), vocab_size=64, hidden_size=128, intermediate_size=128)
    config = replace(config, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    spec = ModelSpec(config, LoraConfig(rank=2), "float32", scan=False, scheme=Scheme(kind))
    rng = np.random.default_rng(0)
    rows = [
        RenderedRow(str(i), rng.integers(0, 64, 20).astype(np.int32), np.ones(20, np.float32))
        for i in range(4)
    ]
    found = []
    for axes in ((1, 1, 1), shape):
        lines = axes[0] * axes[1]
        mesh = make_mesh(MeshConfig(*axes), jax.devices()[:lines])
        lora = jax.tree.map(lambda x: x + 0.02, init_lora(spec, 0))
        with jax.set_mesh(mesh):
            frozen, trained = random_base(spec, 0, mesh, std=0.1), place_trained(mesh, spec, lora)
            batch = place_batch(mesh, pack(rows, (80 // lines,), 80, lines))
            step = make_gradient_step(spec, Compute(by_line=lines > 1, max_segments=4))
            grads, loss, _ = step(trained, jax.tree.map(jnp.zeros_like, trained), frozen, batch)
            found.append((float(loss), jax.tree.map(np.asarray, grads)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for ours, expected in zip(*(jax.tree.leaves(grads) for _, grads in found), strict=True):
        assert np.linalg.norm(ours - expected) < 1e-4 * np.linalg.norm(expected)


def test_a_gather_of_the_backward_pass_waits_for_no_gradient():
    """Else it would begin when its product could, and the devices wait for it. Adapters are gathered late:
    they are small, and whoever gathers them once keeps them from the forward pass."""
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])

    def whole(matrix):
        return jax.lax.all_gather(matrix, "fsdp", axis=0, tiled=True)

    def product(x, weight, adapter):
        return x @ whole(weight) + x @ whole(adapter)

    def gradient(x, weight, adapter):
        function = gather_again(product, in_loop=False)
        return jax.grad(lambda x: jnp.sum(jnp.sin(function(x, weight, adapter))))(x)

    split = PartitionSpec("fsdp")
    x, weight = jnp.ones((6, 4)), jnp.arange(12.0).reshape(4, 3)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(gradient, in_specs=(split,) * 3, out_specs=split, check_vma=False)
        traced = jax.make_jaxpr(mapped)(x, weight, weight / 2)
        found = jax.jit(mapped)(x, weight, weight / 2)
    np.testing.assert_allclose(found, jnp.cos(1.5 * x @ weight) @ (1.5 * weight).T, rtol=1e-5)
    (inner,) = (one.params["jaxpr"] for one in traced.eqns)
    given = dict(zip(("x", "weight", "adapter"), inner.invars, strict=True))
    held_back = [one for one in inner.eqns if one.primitive.name == "optimization_barrier"]
    (with_weight,) = (one for one in held_back if given["weight"] in one.invars)
    (with_adapter,) = (one for one in held_back if given["adapter"] in one.invars)
    assert with_weight.invars == [given["weight"], given["x"]]  # no gradient
    assert len(with_adapter.invars) == 2
    gathered = [one.invars[0] for one in inner.eqns if one.primitive.name == "all_gather"]
    again = {with_weight.outvars[0], with_adapter.outvars[0]}
    assert (gathered[:2], set(gathered[2:])) == ([given["weight"], given["adapter"]], again)


def test_gpus_take_copies_of_a_base_that_fits_and_split_one_that_does_not():
    adapters = RunConfig(model=ModelSource(path="x"), lora=LoraConfig(), train=TrainConfig(batch_rows=32))
    everything = RunConfig(model=ModelSource(path="x"), train=TrainConfig(what="full", batch_rows=32))
    model = published_config("qwen3-8b")
    assert mesh_of_gpus(adapters, model, 4, 72 * GIB) == MeshConfig(4, 1, 1)
    assert mesh_of_gpus(adapters, model, 4, 42 * GIB) == MeshConfig(2, 2, 1)
    assert mesh_of_gpus(adapters, model, 4, 8 * GIB) == MeshConfig(1, 4, 1)
    assert mesh_of_gpus(everything, model, 8, 72 * GIB).fsdp >= 4


@pytest.mark.parametrize("ways", [2, -1])
def test_experts_of_a_model_without_experts_are_not_split(ways):
    config = RunConfig(model=ModelSource(path="x"), mesh=MeshConfig(fsdp=1, expert=ways))
    with pytest.raises(UserError, match=rf"^config\.mesh\.expert: {ways}, but this model has no experts"):
        mesh_here(config, published_config("qwen3-8b"))
