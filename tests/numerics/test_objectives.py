"""The objectives of policy gradients: published values, true gradients, and the same through the engine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rows import random_rows

import jaxlora
from jaxlora.models.head import Head, chunked_loss
from jaxlora.runtime.errors import UserError
from jaxlora.train.objective import POLICY, Loss, extras_of, objective_of

LEARNER = np.array([-0.5, -1.2, -2.0], np.float32)
SAMPLER = np.array([-0.7, -1.0, -2.0], np.float32)


def value(loss: Loss, advantage: float, logprobs=LEARNER, weights=None) -> jax.Array:
    ones = np.ones(3, np.float32)
    extras = {"advantages": advantage * ones, "sampler_logprobs": SAMPLER}
    return jnp.sum(objective_of(loss)(logprobs, ones if weights is None else weights, extras))


@pytest.mark.parametrize(
    ("name", "advantage", "expected"),
    [
        ("importance_sampling", 0.75, -2.2801001334),
        ("ppo", 0.75, -2.2640480648),
        ("cispo", 0.75, 2.6868576778),
        ("dro", 0.75, 2.777),
        ("importance_sampling", -0.25, 0.7600333778),
        ("ppo", -0.25, 0.7600333778),
    ],
)
def test_losses_have_the_published_values(name, advantage, expected):
    assert float(value(Loss(name), advantage)) == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_importance_sampling_is_the_published_one():
    found = jax.grad(lambda lp: value(Loss("importance_sampling"), 0.75, lp))(jnp.asarray(LEARNER))
    np.testing.assert_allclose(found, [-0.9160520686, -0.6140480648, -0.75], atol=1e-6)


@pytest.mark.parametrize("name", POLICY)
def test_on_policy_every_gradient_is_that_of_reinforce(name):
    found = jax.grad(lambda lp: value(Loss(name), 0.75, lp))(jnp.asarray(SAMPLER))
    np.testing.assert_allclose(found, -0.75 * np.ones(3), atol=1e-6)


def test_clip_bounds_and_beta_are_settings():
    wide = value(Loss("ppo", clip_low=0.5, clip_high=1.5), 0.75)
    assert float(wide) == pytest.approx(float(value(Loss("importance_sampling"), 0.75)), abs=1e-6)
    gap = float(value(Loss("dro", beta=1.05), 0.75) - value(Loss("dro", beta=0.05), 0.75))
    assert gap == pytest.approx(0.5 * 0.08, abs=1e-6)


def test_ppo_has_no_gradient_beyond_a_bound_in_the_advantages_direction():
    up = jax.grad(lambda lp: value(Loss("ppo"), 0.75, lp))(jnp.asarray(LEARNER))
    down = jax.grad(lambda lp: value(Loss("ppo"), -0.25, lp))(jnp.asarray(LEARNER))
    assert up[0] == 0
    assert down[0] != 0


@pytest.mark.parametrize("name", POLICY)
def test_what_has_no_weight_may_hold_anything(name):
    extras = {"advantages": np.full(3, 1e30, np.float32), "sampler_logprobs": np.full(3, -1e30, np.float32)}
    weights = np.zeros(3, np.float32)
    loss, gradient = jax.value_and_grad(lambda lp: jnp.sum(objective_of(name)(lp, weights, extras)))(LEARNER)
    assert loss == 0
    assert not gradient.any()


# --- The divergence, over all tokens of a toy vocabulary ----------------------------------------------------


def test_the_expected_gradient_of_the_divergence_is_that_of_kl_also_off_policy():
    rng = np.random.default_rng(0)
    theta, behind, reference = (jnp.asarray(rng.normal(size=7)) for _ in range(3))
    ref, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(behind)
    objective = objective_of(Loss("importance_sampling", kl=0.3))

    def kl(theta) -> float:
        lp = jax.nn.log_softmax(theta)
        return float(0.3 * jnp.sum(jnp.exp(lp) * (lp - ref)))

    def expected(theta):  # over tokens that q draws
        extras = {"advantages": jnp.zeros(7), "sampler_logprobs": q, "reference_logprobs": ref}
        return jnp.sum(objective(jax.nn.log_softmax(theta), jnp.exp(q), extras))

    with jax.enable_x64(True):
        theta, ref, q = (jnp.asarray(np.asarray(x), jnp.float64) for x in (theta, ref, q))
        steps = 1e-5 * np.eye(7)
        differences = [(kl(theta + step) - kl(theta - step)) / 2e-5 for step in steps]
        found = jax.grad(expected)(theta)
    np.testing.assert_allclose(found, differences, atol=1e-8)
    assert np.abs(differences).max() > 0.01


# --- Temperature, and the way through a model ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probabilities_are_of_the_tempered_distribution(temperature):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(11, 8)), jnp.float32)
    targets, ones = jnp.asarray([[1, 2, 3, 4, 5]]), jnp.ones((1, 5))

    def plain(hidden):
        logits = jnp.einsum("bli,oi->blo", hidden, weight) / temperature
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    def ours(hidden):
        objective = objective_of("cross_entropy")
        return chunked_loss(hidden, Head(weight), targets, ones, objective, (), ones > 0, temperature)

    (loss, found), gradient = jax.value_and_grad(ours, has_aux=True)(hidden)
    np.testing.assert_allclose(found, plain(hidden), atol=1e-5)
    np.testing.assert_allclose(loss, -plain(hidden).sum(), rtol=1e-5)
    expected = jax.grad(lambda hidden: -plain(hidden).sum())(hidden)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.fixture(scope="module")
def trainer():
    return jaxlora.load("embedded:base", dtype="float32").lora(rank=2)


def policy_rows(trainer) -> list[dict]:
    """Rows with the model's own log-probabilities, of another length each."""
    rows = [
        {"tokens": row.tokens[:n], "weights": np.arange(n) > 3}
        for row, n in zip(random_rows(3), (9, 12, 7), strict=True)
    ]
    for i, (row, found) in enumerate(zip(rows, trainer.logprobs(rows), strict=True)):
        row["logprobs"] = np.concatenate([[0], found])
        row["advantages"] = np.where(row["weights"], 0.5 - i, 0.0)
    return rows


def gradient(trainer, rows, loss):
    result = trainer.forward_backward(rows, loss)
    found, trainer._grads = trainer._grads, None
    return result, found


def test_on_policy_the_engine_finds_minus_the_advantages_and_the_gradient_of_their_likelihood(trainer):
    rows = policy_rows(trainer)
    result, found = gradient(trainer, rows, "importance_sampling")
    assert result.loss == pytest.approx(-sum(float(row["advantages"].sum()) for row in rows), abs=1e-4)
    likelihood = [{"tokens": row["tokens"], "weights": row["advantages"]} for row in rows]
    _, expected = gradient(trainer, likelihood, "cross_entropy")
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(np.abs(theirs).max() + 1e-6))
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(found)) > 0.01


def test_a_row_twice_has_twice_the_gradient(trainer):
    """A sum: nothing is divided by lengths, tokens or rows."""
    rows = policy_rows(trainer)
    loss = Loss("ppo", clip_low=0.9, clip_high=1.1)
    once, first = gradient(trainer, rows[:1], loss)
    twice, second = gradient(trainer, [rows[0], rows[0]], loss)
    assert twice.loss == pytest.approx(2 * once.loss, rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(second), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(
            ours, 2 * np.asarray(theirs), atol=1e-3 * float(np.abs(theirs).max() + 1e-6)
        )


@pytest.mark.parametrize("name", ["advantages", "logprobs"])
def test_a_row_without_what_the_loss_takes_is_one_line(trainer, name):
    rows = policy_rows(trainer)
    del rows[1][name]
    with pytest.raises(UserError, match=f"row 1: this loss needs `{name}`"):
        trainer.forward_backward(rows, "ppo")
    rows[1][name] = np.ones(3)
    with pytest.raises(UserError, match=f"row 1: 12 tokens need as many finite {name}"):
        trainer.forward_backward(rows, "ppo")


def test_an_unknown_loss_is_one_line_with_the_known_ones(trainer):
    with pytest.raises(UserError, match="'reinforce' is not known; give one of cross_entropy, importance_sa"):
        trainer.forward_backward(policy_rows(trainer), "reinforce")


def test_what_each_loss_takes():
    assert extras_of("cross_entropy") == ()
    assert extras_of("ppo") == ("advantages", "sampler_logprobs")
    assert extras_of(Loss("ppo", kl=0.1))[-1] == "reference_logprobs"
