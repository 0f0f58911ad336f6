"""Answers that share a prompt are learned from as if each had its own."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers.rl import job_of, make_model, rl_config

from jaxlora.data.render import RenderedRow
from jaxlora.models.decoder import Tree
from jaxlora.rl.learning import Learner, buffers_of
from jaxlora.train.job import fresh_state, load_frozen
from jaxlora.train.objective import Loss
from jaxlora.train.step import TrainState


def rows(n_prompts: int = 5, answers: int = 6, seed: int = 0) -> list[RenderedRow]:
    rng = np.random.default_rng(seed)
    found = []
    for prompt in range(n_prompts):
        asked = rng.integers(4, 1000, rng.integers(1, 40))
        for i in range(answers):
            answered = rng.integers(4, 1000, rng.integers(1, 30))
            weights = np.repeat(np.float32([0, 1]), [len(asked), len(answered)])
            numbers = rng.normal(size=(2, len(weights))).astype(np.float32)
            extras = {"advantages": weights * numbers[0], "sampler_logprobs": -7 + 0.1 * numbers[1]}
            tokens = np.concatenate([asked, answered]).astype(np.int32)
            found.append(RenderedRow(f"{prompt}/{i}", tokens, weights, str(prompt), extras))
    return found


@pytest.fixture(scope="module")
def learners(tmp_path_factory):
    """A learner that shares prompts, one that does not, and a state with an adapter that is not 0."""
    folder = tmp_path_factory.mktemp("rl")
    config = rl_config(
        make_model(folder / "model", layers=2),  # of the last one, a prompt's own states have no gradient
        folder,
        train={"layout": "packed", "max_buffer_tokens": 256, "buffer_multiple": 32},
    )
    job = job_of(config)
    with jax.set_mesh(job.mesh):
        frozen, state = load_frozen(job), fresh_state(job)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state.trained)
    both = [
        Learner(
            job.spec, job.machine, replace(config, rl=replace(config.rl, share_prompts=shares)), loss, frozen
        )
        for shares in (True, False)
        for loss in [Loss("importance_sampling", kl=0.1)]
    ]
    return job, both, TrainState(trained, state.opt_state)


def gradient(learner: Learner, state: TrainState, given: list[RenderedRow]) -> tuple[Tree, float, list]:
    grads, found = learner.gradient(state, given)
    logprobs = [np.asarray(lp)[batch["weights"] != 0] for _, lp, batch in found]
    return grads, sum(float(value) for value, *_ in found), sorted(np.concatenate(logprobs).tolist())


def test_loss_log_probabilities_and_gradient_are_those_of_whole_rows(learners):
    job, (sharing, whole), state = learners
    with jax.set_mesh(job.mesh):
        ours, theirs = (gradient(learner, state, rows()) for learner in (sharing, whole))
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
    np.testing.assert_allclose(ours[2], theirs[2], atol=1e-4)
    for path, expected in jax.tree.leaves_with_path(theirs[0]):
        found = dict(jax.tree.leaves_with_path(ours[0]))[path]
        size = float(np.abs(expected).max())
        assert size > 0
        np.testing.assert_allclose(found, expected, atol=2e-4 * size, err_msg=str(path))


def test_the_same_rows_have_the_same_bits(learners):
    job, (sharing, _), state = learners
    with jax.set_mesh(job.mesh):
        first, second = (gradient(sharing, state, rows())[0] for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_prompt_takes_its_place_once(learners):
    job, _, _ = learners
    given = rows(n_prompts=1)
    train = replace(job.config.train, max_buffer_tokens=512)
    (one,) = buffers_of(given, train, 1, True)
    prompt = int(np.argmax(given[0].weights))
    answers = sum(int(row.weights.sum()) for row in given)
    assert int((one["segment_ids"] > 0).sum()) == prompt - 1 + answers
    assert int((one["wide_segment_ids"] > 0).sum()) == sum(row.n_tokens for row in given)
    assert float(one["weights"].sum()) == answers


def test_every_row_is_learned_from_once_whatever_the_buffers(learners):
    job, _, _ = learners
    given = rows(40, 3, seed=1)
    for size in (96, 256, 1024):
        train = replace(job.config.train, max_buffer_tokens=size)
        buffers = buffers_of(given, train, 1, True)
        assert sum(float(b["weights"].sum()) for b in buffers) == sum(row.weights.sum() for row in given)
        total = sum(float(b["advantages"].astype(np.float64).sum()) for b in buffers)
        assert total == pytest.approx(
            sum(row.extras["advantages"].sum(dtype=float) for row in given), abs=1e-4
        )
        assert len({tuple(x.shape for x in b.values()) for b in buffers}) <= 3
        assert all(b["tokens"].shape[2] <= max(size, 96) for b in buffers)
