"""Grouped products are those of the dense formula, by every implementation, with all gradients."""

from __future__ import annotations

import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.config import LoraConfig, MeshConfig, ModelSource, OptimConfig, RunConfig
from jaxlora.models import grouped_triton
from jaxlora.models.families import model_config_from_dict
from jaxlora.models.grouped import expert_products, group_tokens, resolve, tile_rows, to_rows, to_tokens
from jaxlora.plan import programs
from jaxlora.runtime.devices import slice_named
from jaxlora.train.step import make_train_step

EXPERTS, K, TOKENS, IN, OUT, RANKS = 6, 2, 50, 64, 32, (3, 5)
SCALE = 0.7


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as plain operations."""
    for name in ("sum_of_products", "outer_products"):
        monkeypatch.setattr(grouped_triton, name, partial(getattr(grouped_triton, name), interpret=True))


@pytest.fixture(scope="module")
def case():
    """Choices `[tokens, k]`, the last ten tokens' nowhere and none of expert 4; the inputs; a target."""
    random = np.random.default_rng(0)
    free = np.asarray([0, 1, 2, 3, 5])
    choices = np.stack([random.permutation(free)[:K] for _ in range(TOKENS)])
    choices[40:] = EXPERTS

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    weights = [normal(EXPERTS, OUT, IN) for _ in RANKS]
    adapters = [(normal(EXPERTS, r, IN), normal(EXPERTS, OUT, r)) for r in RANKS]
    shares = jnp.asarray(random.random((TOKENS, K)), jnp.float32)
    return (
        jnp.asarray(choices, jnp.int32),
        (normal(TOKENS, IN), weights, adapters, shares),
        normal(TOKENS, OUT),
    )


def dense(choices, x, weights, adapters, shares):
    """Every token with every expert, then those that it chose."""
    chosen = jax.nn.one_hot(choices, EXPERTS)  # zeros for nowhere
    total = 0
    for w, (a, b) in zip(weights, adapters, strict=True):
        whole = w + SCALE * jnp.einsum("eor,eri->eoi", b, a)
        y = jnp.tanh(jnp.einsum("ti,eoi->teo", x, whole))
        total += jnp.einsum("teo,tke,tk->to", y, chosen, shares)
    return total


def grouped(how, tile, choices, x, weights, adapters, shares):
    groups = group_tokens(choices, EXPERTS, tile)
    ys = expert_products(to_rows(x, groups), weights, adapters, SCALE, groups, how)
    return to_tokens(sum(jnp.tanh(y) for y in ys), shares, groups)


@pytest.mark.parametrize(("how", "tile"), [("loop", 16), ("ragged_dot", 32), ("triton", 16), ("triton", 64)])
def test_values_and_all_gradients_are_those_of_the_dense_formula(interpreted, case, how, tile):
    choices, inputs, target = case

    def with_gradients(function):
        return jax.jit(
            jax.value_and_grad(lambda given: jnp.sum(jnp.square(function(choices, *given) - target)))
        )(inputs)

    expected, found = with_gradients(dense), with_gradients(partial(grouped, how, tile))
    for (path, own), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(own - other) < 1e-5 * np.linalg.norm(other), jax.tree_util.keystr(path)
    nobodys = found[1][1][0][4]
    assert not np.any(nobodys)


def test_the_kernels_round_bfloat16_as_ragged_dot_does(interpreted, case):
    choices, (x, weights, adapters, shares), _ = case
    x, weights, shares = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (x, weights, shares))
    ours, theirs = (
        np.asarray(grouped(how, 16, choices, x, weights, adapters, shares), np.float32)
        for how in ("triton", "ragged_dot")
    )
    assert np.linalg.norm(ours - theirs) < 5e-3 * np.linalg.norm(theirs)


def test_a_frozen_weight_has_no_gradient_and_keeps_nothing_for_one(case):
    choices, (x, weights, _, _), _ = case

    def run(x):
        groups = group_tokens(choices, EXPERTS, 16)
        return sum(expert_products(to_rows(x, groups), weights, [], 0.0, groups, "loop"))

    rows = jax.eval_shape(run, x).shape[0]
    _, pull = jax.vjp(run, x)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")}
    assert (rows, IN) not in kept


@pytest.mark.parametrize(("choices", "tile"), [(8, 16), (384 * 8, 32), (8192 * 8, 128), (10**6, 128)])
def test_tiles_are_as_large_as_an_experts_mean_share(choices, tile):
    assert tile_rows(choices, 128) == tile


@pytest.mark.parametrize(
    ("platform", "capability", "chosen"),
    [
        ("gpu", "9.0", "mosaic"),
        ("gpu", "8.0", "triton"),
        ("gpu", "10.0", "triton"),
        ("tpu", "", "ragged_dot"),
    ],
)
def test_each_machine_has_its_own_kernels(monkeypatch, platform, capability, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert resolve("auto") == chosen
    assert resolve("loop") == "loop"


def test_the_tpu_program_has_no_array_of_tokens_times_experts_times_anything():
    pytest.importorskip("libtpu")
    raw = {"model_type": "qwen3_moe", "vocab_size": 256, "hidden_size": 640, "intermediate_size": 256}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 128}
    raw |= {"num_experts": 24, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "norm_topk_prob": True}
    model = model_config_from_dict(raw)
    config = RunConfig(lora=LoraConfig(rank=8), mesh=MeshConfig(1, 1, 1, 4), model=ModelSource(path="x"))
    plan = programs.Programs(config, model, slice_named("v5e-4"), programs.Workload())
    step = make_train_step(plan.spec, OptimConfig(), plan.compute)
    buffer = plan.buffer(2048)
    with jax.set_mesh(plan.mesh):
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = step.lower(plan._state, plan._base, plan._batch(1, buffer), rate)
        text = lowered.compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\w\d+\[([\d,]+)\]", text)}
    tokens = {buffer, buffer // 4, 2 * buffer, 2 * buffer // 4}
    for experts in (24, 6):
        largest = 2 * buffer * experts  # of two layers
        assert not [s for s in shapes if tokens & set(s) and experts in s and math.prod(s) > largest]
