"""Programs compiled ahead, in threads, are those that would have been compiled when their batch came."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.checkpoints.base import random_base
from jaxlora.config import LoraConfig, MeshConfig, OptimConfig
from jaxlora.data.batches import Layout
from jaxlora.data.packing import pack
from jaxlora.data.render import RenderedRow
from jaxlora.generate.decode import GREEDY, PACKED_STEPS, generate, make_decode
from jaxlora.lora import init_lora
from jaxlora.models.decoder import DecoderLayer, ModelSpec
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime import ahead
from jaxlora.runtime.ahead import Ahead
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh, place_batch, place_trained
from jaxlora.train.job import padding_efficiency
from jaxlora.train.step import Compute, buffer_loss, init_state, make_train_step

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
)


def rows_of(n: int, length: int, seed: int = 0) -> list[RenderedRow]:
    rng = np.random.default_rng(seed)
    return [
        RenderedRow(str(i), rng.integers(0, 64, length).astype(np.int32), np.ones(length, np.float32))
        for i in range(n)
    ]


def by_shape(state, frozen, batch, rate):
    return batch["tokens"].shape


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_compiled_ahead_is_the_step_to_the_bit(devices):
    spec = ModelSpec(MODEL, LoraConfig(rank=2), "float32")
    mesh = make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
    frozen, rate = random_base(spec, 0, mesh, std=0.2), jnp.float32(1e-2)
    batches = [pack(rows_of(4, n), (4 * n,), 4 * n) for n in (8, 16, 8)]
    step = make_train_step(spec, OptimConfig(), Compute())

    def fresh():
        return init_state(place_trained(mesh, spec, init_lora(spec, 0)), OptimConfig())

    with jax.set_mesh(mesh):
        ends = []
        compiled = Ahead(step, by_shape)
        for batch in batches[:2]:
            compiled.start(fresh(), frozen, place_batch(mesh, batch), rate)
        made = dict(compiled._made)
        for run in (step, compiled):
            state = fresh()
            for batch in batches:
                state, metrics = run(state, frozen, place_batch(mesh, batch), rate)
            ends.append(jax.tree.map(np.asarray, (state.trained, metrics)))
    assert compiled._made == made  # nothing else was compiled
    assert set(made) == {(1, 1, 32), (1, 1, 64)}
    for ours, expected in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("devices", [1, 2])
def test_decoding_compiled_ahead_gives_the_same_answers(devices, monkeypatch):
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    spec = ModelSpec(MODEL, None, "float32", scan=False)
    frozen = random_base(spec, 0, mesh, std=0.3)
    prompts = [row.tokens.tolist() for n in range(9) for row in rows_of(1, 3 + 2 * n, n)]
    options = {"stop_ids": (3,), "max_new_tokens": 20, "slots": 4, "packed": True, "tail_slots": (2, 1)}
    with jax.set_mesh(mesh):
        expected = generate(spec, {}, frozen, prompts, **options)
        make_decode.cache_clear()
        monkeypatch.setattr(ahead, "COMPILES_AHEAD", ("cpu",))
        assert generate(spec, {}, frozen, prompts, **options) == expected
        decode = make_decode(spec, (3,), "xla", PACKED_STEPS, GREEDY)
    assert len(decode._made) == 3
    assert decode._function._cache_size() == 0  # every call had its program
    make_decode.cache_clear()


def test_unrolled_layers_are_traced_once(monkeypatch):
    spec = ModelSpec(replace(MODEL, num_hidden_layers=3), LoraConfig(rank=2), scan=False)
    calls, layer = [], DecoderLayer.__call__
    monkeypatch.setattr(DecoderLayer, "__call__", lambda *arguments: calls.append(1) or layer(*arguments))
    buffer = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in ("tokens", "targets", "positions")}
    buffer |= {name: jax.ShapeDtypeStruct((1, 8), jnp.float32) for name in ("segment_ids", "weights")}

    def loss(lora, frozen, buffer):
        return buffer_loss(spec, lora, frozen, buffer, Compute(), "cross_entropy", False)[0]

    adapter = jax.eval_shape(lambda: init_lora(spec, 0))
    jax.eval_shape(jax.grad(loss), adapter, spec.abstract_base, buffer)
    assert len(calls) == 1


def test_what_goes_wrong_in_a_thread_is_raised_where_the_program_is_needed():
    @jax.jit
    def step(state, frozen, batch, rate):
        raise UserError("no such kernel")

    arguments = jnp.zeros(1), {}, {"tokens": jnp.zeros((1, 1, 8), jnp.int32)}, jnp.float32(0)
    compiled = Ahead(step, by_shape)
    compiled.start(*arguments)
    with pytest.raises(UserError, match="no such kernel"):
        compiled(*arguments)


@pytest.mark.parametrize(
    "layout",
    [Layout(True, (96, 128, 200), 4, 100), Layout(True, (64, 200), 4, 80, 2), Layout(False, (32, 64), 4, 80)],
)
def test_the_shapes_to_come_are_those_that_are_built(layout):
    rows = [rows_of(1, 20 + 7 * i % 40, i)[0] for i in range(16)]
    steps = {step: range(4 * step - 4, 4 * step) for step in range(1, 5)}
    built = [layout.build([rows[i] for i in steps[step]])["tokens"].shape for step in steps]
    assert layout.shapes(rows, steps.__getitem__, range(1, 5)) == list(dict.fromkeys(built))
    real = sum(row.n_tokens for row in rows)
    assert padding_efficiency(rows, list(steps.values()), layout) == real / sum(map(math.prod, built))
