"""The kernels around the 8-bit products of decoding compute what the plain operations do, and are used."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import trained_lora

from jaxlora.checkpoints.base import random_base
from jaxlora.config import LoraConfig, MeshConfig
from jaxlora.generate.decode import Sampling, generate
from jaxlora.models import float8_kernels, quantised
from jaxlora.models.attention import segment_attention
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.quantised import Quantised, Scheme, decoding_scheme, fused_products, fuses, quantise
from jaxlora.models.spec import AdapterShape, ModelConfig
from jaxlora.sharding import base_shardings, make_mesh

SIMULATED = jax.default_backend() != "gpu"  # the kernels themselves run with JAX_PLATFORMS=cuda
SCALE = 0.7  # no power of two, so that it is rounded
PLAIN = Scheme("float8", activations=True, native=False)
FUSED = replace(PLAIN, fused=True)
# Rows, `in`, the `out` and the rank of each adapter: one part of `in` and several, blocks that are not full.
CASES = {
    "three projections": (50, 384, (256, 128, 128), 8),
    "two rows, rank 1": (2, 1024, (384,), 1),
    "four parts, rank 16": (33, 4096, (512, 512), 16),
    "eight parts": (48, 12288, (128,), 8),
    "an odd rank": (5, 2048 + 128, (256, 384, 128), 5),
    "the many rows of prompts": (1030, 256, (256, 128), 8),
}


@pytest.fixture
def calls(monkeypatch):
    """The kernels as plain operations; how often each was traced."""
    counts: Counter[str] = Counter()

    def counted(name, function, *arguments):
        counts[name] += 1
        return function(*arguments, interpret=SIMULATED)

    for name in ("round_and_lower", "scale_and_add"):
        monkeypatch.setattr(float8_kernels, name, partial(counted, name, getattr(float8_kernels, name)))
    return counts


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def inputs(rows, size, outs, rank):
    """Rows (one of zeros, one that is large), weights, and matrices A and B of each."""
    x = normal(0, rows, size).at[rows // 3].set(0).at[-1].multiply(1000)
    weights = [quantise(FUSED, normal(1 + i, out, size)) for i, out in enumerate(outs)]
    all_a = [normal(10 + i, rank, size) for i in range(len(outs))]
    return x, weights, all_a, [0.1 * normal(20 + i, out, rank) for i, out in enumerate(outs)]


@pytest.mark.parametrize("case", CASES)
def test_rows_are_rounded_to_the_bit_and_lowered_as_in_plain_operations(case):
    x, _, all_a, _ = inputs(*CASES[case])
    values, scales = jax.jit(partial(quantised.round_rows, "float8"))(x.astype(jnp.float32))
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    found, parts = float8_kernels.round_and_lower(x, most, jnp.concatenate(all_a), interpret=SIMULATED)
    np.testing.assert_array_equal(found.view(jnp.uint8), values.view(jnp.uint8))
    np.testing.assert_array_equal(jnp.maximum(most, float8_kernels.LEAST) * np.float32(1 / 448), scales)

    exact = np.asarray(x, np.float64) @ np.concatenate(all_a).astype(np.float64).T
    low = np.asarray(parts).reshape(len(x), -1, float8_kernels.padded(exact.shape[1])).sum(1)
    assert not np.any(low[:, exact.shape[1] :])
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.concatenate(all_a).astype(np.float64)).T
    assert np.all(np.abs(low[:, : exact.shape[1]] - exact) <= 1e-6 * size)


@pytest.mark.parametrize("case", CASES)
def test_products_are_scaled_and_added_with_the_roundings_of_plain_operations(case):
    x, weights, all_a, all_b = inputs(*CASES[case])
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    _, parts = float8_kernels.round_and_lower(x, most, jnp.concatenate(all_a), interpret=SIMULATED)
    ys = [3e4 * normal(30 + i, len(x), w.values.shape[0]) for i, w in enumerate(weights)]
    columns = [w.scales.T for w in weights]
    found = float8_kernels.scale_and_add(ys, most, columns, parts, all_b, SCALE, interpret=SIMULATED)

    scales = jnp.maximum(most, 1e-30) * jnp.float32(1 / 448)
    sums = parts.reshape(len(x), -1, float8_kernels.padded(sum(map(len, all_a)))).sum(1)
    low = sums.astype(jnp.bfloat16) * jnp.bfloat16(SCALE)
    for i, (y, column, b) in enumerate(zip(ys, columns, all_b, strict=True)):
        own = low[:, i * b.shape[1] : (i + 1) * b.shape[1]].astype(jnp.float32)
        delta = own @ b.astype(jnp.float32).T
        before = (y.astype(jnp.float32) * scales * column).astype(jnp.bfloat16).astype(jnp.float32)
        assert np.linalg.norm(delta) > 0.01 * np.linalg.norm(before)
        expected = np.asarray((before + delta).astype(jnp.bfloat16), np.float32)
        ours = np.asarray(found[i], np.float32)
        # Sums in another order fall on the other side of a rounding now and then.
        assert np.mean(ours != expected) < 1e-3
        # A step of bfloat16 where the two cancel is one of the terms'.
        terms = np.abs(before) + np.abs(own) @ np.abs(b.astype(jnp.float32)).T
        assert np.all(np.abs(ours - expected) <= 2.0**-8 * terms)


def test_the_products_of_an_input_are_those_of_its_weights_and_its_adapters(calls):
    x, weights, all_a, all_b = inputs(24, 512, (256, 128), 8)
    x = x.reshape(2, 12, 512)
    found = jax.jit(fused_products, static_argnums=4)(x, weights, jnp.concatenate(all_a), all_b, SCALE)
    assert calls == {"round_and_lower": 1, "scale_and_add": 1}
    plain = quantised.products(x, [replace(w, scheme=PLAIN) for w in weights])
    for y, base, a, b in zip(found, plain, all_a, all_b, strict=True):
        delta = SCALE * x.astype(jnp.float32) @ a.astype(jnp.float32).T @ b.astype(jnp.float32).T
        expected = base + delta
        assert y.shape == expected.shape
        assert y.dtype == jnp.bfloat16
        assert np.linalg.norm(y - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("tile", [16, 64])
def test_the_last_block_reads_and_writes_no_row_beyond_the_last(tile):
    """Simulated, rows beyond an array are lost; on a GPU they would be somebody else's memory."""
    found = [int(float8_kernels._real_rows(i, tile, 1030).sum()) for i in range(-(-1030 // tile))]
    assert found == [tile] * (1030 // tile) + [1030 % tile]


@pytest.mark.parametrize("n_rows", [50, 1030])
def test_a_gate_gives_what_it_and_what_it_gates_give_apart(n_rows):
    x, weights, all_a, all_b = inputs(n_rows, 384, (384, 384), 8)
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    _, parts = float8_kernels.round_and_lower(x, most, jnp.concatenate(all_a), interpret=SIMULATED)
    ys = [30 * normal(30 + i, len(x), 384) for i in range(2)]
    own = ys, most, [w.scales.T for w in weights], parts, all_b, SCALE
    gate, up = (y.astype(jnp.float32) for y in float8_kernels.scale_and_add(*own, interpret=SIMULATED))
    (found,) = float8_kernels.scale_and_add(*own, gated=True, interpret=SIMULATED)
    expected = gate / (1 + jnp.exp(-gate)) * up
    assert found.shape == expected.shape
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2.0**-8)


# --- Where they are used ------------------------------------------------------------------------------------


def with_scheme(scheme, tree):
    return jax.tree.map(
        lambda x: replace(x, scheme=scheme) if isinstance(x, Quantised) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Quantised),
    )


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
    )
    spec = ModelSpec(config, LoraConfig(rank=8), scan=False, scheme=PLAIN)
    frozen = random_base(spec, 0, make_mesh(MeshConfig(), jax.devices()[:1]), std=0.1)
    # A residual stream that is mostly embeddings: 8-bit numbers on the other side of a rounding then change
    # no token.
    frozen["embed_tokens"]["weight"] *= 48
    return spec, trained_lora(spec), frozen


def logits_of(spec, lora, frozen):
    tokens = jax.random.randint(jax.random.key(0), (4, 9), 0, 96)

    def attend(q, k, v, cache):
        return segment_attention(q, k, v, jnp.ones(tokens.shape, jnp.int32)), cache

    made = spec.module(spec.for_steps(lora), frozen)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    return made.logits(made(tokens, positions, attend)[0]).astype(jnp.float32)


def test_logits_with_the_kernels_are_as_near_to_those_of_float32(model, calls):
    spec, lora, frozen = model
    plain = logits_of(spec, lora, frozen)
    assert not calls
    found = logits_of(replace(spec, scheme=FUSED), lora, with_scheme(FUSED, frozen))
    assert calls == {"round_and_lower": 4, "scale_and_add": 4}  # of each input of a layer
    wider = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, frozen)
    exact = logits_of(replace(spec, dtype="float32"), lora, wider)
    error = np.linalg.norm(plain - exact)
    assert np.linalg.norm(found - exact) < 1.1 * error
    assert np.linalg.norm(logits_of(spec, trained_lora(spec, 1), frozen) - exact) > 5 * error


def answers(spec, lora, frozen, **options):
    prompts = [np.random.default_rng(i).integers(0, 96, 3 + i).tolist() for i in range(6)]
    options = {"stop_ids": (), "max_new_tokens": 6, "slots": 3, "sampling": Sampling(logprobs=True)} | options
    return generate(spec, lora, frozen, prompts, **options)


def shared_beginning(one, other) -> int:
    """How many tokens two answers begin with in common."""
    differ = [a != b for a, b in zip(one.tokens, other.tokens, strict=True)]
    return differ.index(True) if any(differ) else len(differ)


def test_decoding_with_the_kernels_gives_the_same_tokens_with_the_same_probabilities(model, calls):
    spec, lora, frozen = model
    expected = answers(spec, lora, frozen)
    assert not calls
    found = answers(replace(spec, scheme=FUSED), lora, with_scheme(FUSED, frozen))
    assert calls["round_and_lower"] == calls["scale_and_add"] >= 2 * 4  # each input of prefill and decoding
    same = [shared_beginning(*pair) for pair in zip(found, expected, strict=True)]
    # Two tokens that are as good as equally likely may change places; then so do those after them.
    assert same.count(6) >= 4
    for n, ours, theirs in zip(same, found, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs[: n + 1], theirs.logprobs[: n + 1], atol=0.1)
    others = answers(spec, trained_lora(spec, 1), frozen)
    assert [shared_beginning(*pair) for pair in zip(found, others, strict=True)].count(6) == 0


@pytest.mark.parametrize(("axis", "used"), [("data", True), ("tensor", False)])
def test_several_devices_use_them_where_each_has_whole_arrays(model, calls, axis, used):
    spec, lora, frozen = model
    expected = answers(spec, lora, frozen, slots=4, max_new_tokens=2)
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, axis: 2}), jax.devices()[:2])
    spec = replace(spec, scheme=FUSED)
    placed = jax.tree.map(jax.device_put, with_scheme(FUSED, frozen), base_shardings(mesh, spec))
    with jax.set_mesh(mesh):
        found = answers(spec, lora, placed, slots=2 if used else 4, max_new_tokens=2)
    assert bool(calls) == used
    ours, theirs = (np.concatenate([a.logprobs[:1] for a in some]) for some in (found, expected))
    np.testing.assert_allclose(ours, theirs, atol=0.1)


@pytest.mark.parametrize("lora", ["all_layer", "attention_only", "q_proj and v_proj", "own scales"])
def test_an_adapter_in_the_form_for_decoding_is_the_same_adapter(model, lora):
    spec = replace(model[0], scheme=None, dtype="float32")
    frozen = random_base(spec, 0, make_mesh(MeshConfig(), jax.devices()[:1]), std=0.1)
    if lora == "own scales":
        spec = replace(spec, shapes=(AdapterShape("layers.self_attn.k_proj", (8, 5), (1.0, 3.0)),))
    elif lora == "q_proj and v_proj":
        spec = replace(spec, lora=LoraConfig(rank=8, targets="q_proj,v_proj"))
    else:
        spec = replace(spec, lora=LoraConfig(rank=8, targets=lora))
    adapter, tokens = trained_lora(spec), jnp.arange(12).reshape(2, 6)

    def logits(made):
        def attend(q, k, v, cache):
            return jnp.cumsum(q + k + v, axis=1), cache

        return made.logits(made(tokens, jnp.broadcast_to(jnp.arange(6), (2, 6)), attend)[0])

    expected = logits(spec.bind(adapter, frozen))
    assert float(jnp.abs(expected - logits(spec.bind(trained_lora(spec, 1), frozen))).max()) > 1e-2
    np.testing.assert_allclose(logits(spec.module(spec.for_steps(adapter), frozen)), expected, atol=1e-4)


def test_the_kernels_take_rows_of_one_device_in_blocks_and_small_ranks():
    def weight(out, scheme=FUSED):
        return quantised.abstract(scheme, jax.ShapeDtypeStruct((out, 256), jnp.bfloat16))

    def rows(n, size=256, dtype=jnp.bfloat16):
        return jnp.zeros((n, 1, size), dtype)

    assert fuses(rows(4), [weight(128), weight(384)], [8, 8])
    assert not fuses(rows(4), [weight(128, PLAIN)], [8])
    assert not fuses(rows(4), [weight(128), weight(192)], [8, 8])
    assert not fuses(rows(4, size=192), [weight(128)], [8])
    assert not fuses(rows(4, dtype=jnp.float32), [weight(128)], [8])
    assert not fuses(rows(4), [weight(128), weight(128)], [32, 33])
    assert not fuses(rows(4), [jnp.zeros((128, 256), jnp.bfloat16)], [8])
    for devices in (1, 2):
        with jax.set_mesh(make_mesh(MeshConfig(data=devices), jax.devices()[:devices])):
            assert fuses(rows(4), [weight(128)], [8]) == (devices == 1)


@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_decoding_on_a_gpu_uses_them_where_it_has_such_products(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    native = Scheme("float8", activations=True, native=True, turned=True)
    assert decoding_scheme(native) == replace(native, turned=False, fused=backend == "gpu")
    for other in (PLAIN, Scheme("float8"), Scheme("int8", True), Scheme("nf4")):
        assert decoding_scheme(other) == other
