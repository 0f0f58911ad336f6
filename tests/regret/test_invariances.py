"""What follows from y = W x + (alpha / r) B A x, B zero at first, and Adam: checked on steps that train."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import make_checkpoint
from helpers.rows import random_rows

from jaxlora.checkpoints.base import load_base
from jaxlora.config import LoraConfig, MeshConfig, OptimConfig
from jaxlora.data.packing import pack
from jaxlora.lora import count_trainable, init_lora, merged_weight
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.sharding import make_mesh
from jaxlora.train.step import (
    Compute,
    gradients,
    init_state,
    make_row_step,
    make_train_step,
    optimizer,
)

RANKS = (1, 16, 512)
ROWS = random_rows(6)
BATCH = pack(ROWS, (256,), 256)
RATE = 2.0**-9


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model's shape and its base; the head is tied, so that its adapter is one, too."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder, num_hidden_layers=2, tie_word_embeddings=True)
    config = load_model_config(folder)
    spec = ModelSpec(config, None, "float32")
    return config, load_base(folder, spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))


def spec_of(config, rank=16, alpha=32.0, **lora):
    return ModelSpec(config, LoraConfig(rank=rank, alpha=alpha, **lora), "float32")


def steps(spec, base, count, seed=0, rate=RATE):
    """Losses of so many steps over one batch, and the trained state."""
    step = make_train_step(spec, OptimConfig(), Compute())
    state, losses = init_state(init_lora(spec, seed), OptimConfig()), []
    for _ in range(count):
        state, metrics = step(state, base, BATCH, jnp.float32(rate))
        losses.append(float(metrics["nll"]))
    return losses, state


def test_the_first_loss_is_that_of_the_base_to_the_last_bit_whatever_the_rank(world):
    config, base = world
    bare = make_row_step(ModelSpec(config, None, "float32"), Compute(max_segments=8))({}, base, BATCH)
    for rank in RANKS:
        spec = spec_of(config, rank, output_head=True)
        rows = make_row_step(spec, Compute(max_segments=8))(init_lora(spec, 0), base, BATCH)
        np.testing.assert_array_equal(rows, bare)
    assert len({steps(spec_of(config, rank), base, 1)[0][0] for rank in RANKS}) == 1


def test_but_the_rank_does_reach_the_adapter(world):
    config, _ = world
    counts = [count_trainable(spec_of(config, rank)) for rank in RANKS]
    assert counts == [rank * counts[0] for rank in RANKS]
    assert init_lora(spec_of(config, 16), 0)["layers"]["mlp"]["up_proj"]["lora_a"].shape[1] == 16


@pytest.mark.parametrize("rank", RANKS)
def test_the_first_update_of_b_has_the_size_of_the_rate(world, rank):
    """Adam's eps must not be felt, though the gradient is proportional to alpha / r."""
    config, base = world
    _, state = steps(spec_of(config, rank), base, 1)
    for path, array in jax.tree.leaves_with_path(state.trained):
        if path[-1].key == "lora_b":
            sizes = np.abs(np.asarray(array))
            assert np.quantile(sizes, 0.01) == pytest.approx(RATE, rel=0.01), path
            assert np.max(sizes) == pytest.approx(RATE, rel=0.01), path


def test_the_gradient_is_proportional_to_alpha_over_r(world):
    config, base = world
    half, whole = (
        gradients(
            spec_of(config, 16, alpha), init_lora(spec_of(config), 0), base, BATCH, Compute(),
            "cross_entropy", False,
        )[0]
        for alpha in (16.0, 32.0)
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(2 * a, b)


def turned(config, base, p=1.0, q=1.0, eps_a=1.0, eps_b=1.0, count=4):
    """Losses and merged matrices of steps with alpha / (p q), p A, and the rates and eps of A and B apart."""
    spec, eps = spec_of(config, alpha=32.0 / (p * q)), 2.0**-8
    rates = {"lora_a": jnp.float32(RATE * p), "lora_b": jnp.float32(RATE * q)}
    made = {
        "lora_a": optimizer(OptimConfig(eps=eps * eps_a)),
        "lora_b": optimizer(OptimConfig(eps=eps * eps_b)),
    }

    @jax.jit
    def step(trained, states):
        grads, loss, _ = gradients(spec, trained, base, BATCH, Compute(), "cross_entropy", False)
        done = {name: one.update(grads, states[name], trained) for name, one in made.items()}

        def moved(path, x, a, b):
            name = path[-1].key
            return x - rates[name] * (a if name == "lora_a" else b)

        new = jax.tree.map_with_path(moved, trained, done["lora_a"][0], done["lora_b"][0])
        return new, {name: state for name, (_, state) in done.items()}, loss

    trained = init_lora(spec, 0)
    trained = jax.tree.map_with_path(lambda k, x: x * p if k[-1].key == "lora_a" else x, trained)
    states = {name: one.init(trained) for name, one in made.items()}
    losses = []
    for _ in range(count):
        trained, states, loss = step(trained, states)
        losses.append(float(loss))
    zeros = [jnp.zeros((config.num_hidden_layers, *w.shape), jnp.float32) for w in spec.adapted]
    return losses, [merged_weight(spec, trained, w, x) for w, x in zip(spec.adapted, zeros, strict=True)]


@pytest.fixture(scope="module")
def plain(world):
    return turned(*world)


@pytest.mark.parametrize(("p", "q"), [(2.0, 0.5), (1.0, 8.0)])
def test_two_of_the_four_settings_are_redundant_to_the_last_bit(world, plain, p, q):
    """alpha / (pq), p times A at first, rates p and q times as high, eps of A and B divided by p and q: each
    of the two gradients scales by its own factor, so each eps must."""
    again, others = turned(*world, p, q, 1 / p, 1 / q)
    assert again == plain[0]
    for ours, theirs in zip(others, plain[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_eps_rule_for_both_matrices_does_not_hold(world, plain):
    again, _ = turned(*world, 2.0, 0.5, 2.0, 2.0)  # 1 / q for both
    assert again[0] == plain[0][0]
    assert again[-1] != plain[0][-1]


@pytest.mark.slow
def test_early_curves_of_two_ranks_differ_less_than_those_of_two_seeds_later(world):
    """The expected first change of B A / r does not depend on r."""
    config, base = world
    low, high = (np.array(steps(spec_of(config, rank), base, 12, rate=2.0**-11)[0]) for rank in (16, 256))
    fallen = low[0] - low
    assert fallen[-1] > 0.01 * low[0]  # something was learned
    assert np.all(np.abs(low - high)[1:4] < 0.05 * fallen[1:4])


@pytest.mark.slow
def test_master_weights_of_full_training_all_move(world, tmp_path):
    """At the rates of full fine-tuning an update is far below bfloat16's resolution of a weight."""
    config, base = world
    spec = replace(ModelSpec(config, None, "bfloat16"), full=True)
    state = init_state(jax.tree.map(jnp.copy, base), OptimConfig())
    step = make_train_step(spec, OptimConfig(), Compute())
    for _ in range(10):
        state, _ = step(state, {}, BATCH, jnp.float32(1e-5))
    for ours, start in zip(
        jax.tree.leaves(state.trained["layers"]), jax.tree.leaves(base["layers"]), strict=True
    ):
        assert np.mean(np.asarray(ours) != np.asarray(start)) > 0.99
