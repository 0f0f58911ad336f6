"""Answers that share a prompt are learned from as if each had its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import FAMILY_SHAPES, make_checkpoint
from helpers.rl import job_of, make_model, rl_config

from jaxlora.checkpoints.base import load_base
from jaxlora.config import LoraConfig, MeshConfig, TrainConfig
from jaxlora.data.render import RenderedRow
from jaxlora.lora import init_lora
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.families import load_model_config
from jaxlora.models.quantised import Scheme
from jaxlora.rl.job import copies_memory
from jaxlora.rl.learning import Learner, buffers_of
from jaxlora.sharding import make_mesh
from jaxlora.train.job import fresh_state, load_frozen
from jaxlora.train.objective import Loss
from jaxlora.train.step import Machine, TrainState


def rows(n_prompts: int = 5, answers: int = 6, seed: int = 0, vocabulary: int = 1000) -> list[RenderedRow]:
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(1, 40)), rng.integers(1, 30, answers).tolist()) for _ in range(n_prompts)]
    return rows_of_lengths(lengths, seed, vocabulary)


def rows_of_lengths(
    lengths: Sequence[tuple[int, list[int]]], seed: int = 0, vocabulary: int = 1000
) -> list[RenderedRow]:
    """Rows of prompts and of their answers with these lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt, (length, answers) in enumerate(lengths):
        asked = rng.integers(4, vocabulary, length)
        for i, n in enumerate(answers):
            answered = rng.integers(4, vocabulary, n)
            weights = np.repeat(np.float32([0, 1]), [length, n])
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
    trained = jax.tree.map(lambda x: x + 0.03 * jax.random.normal(next(keys), x.shape), state.trained)
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


def assert_same(ours, theirs) -> None:
    """What `gradient` found, up to rounding."""
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(ours[2], theirs[2], atol=1e-4)
    for path, expected in jax.tree.leaves_with_path(theirs[0]):
        found = dict(jax.tree.leaves_with_path(ours[0]))[path]
        size = float(np.abs(expected).max())
        assert size > 0
        np.testing.assert_allclose(found, expected, atol=1e-4 * size, err_msg=str(path))


def test_loss_log_probabilities_and_gradient_are_those_of_whole_rows(learners):
    job, (sharing, whole), state = learners
    with jax.set_mesh(job.mesh):
        assert_same(*(gradient(learner, state, rows()) for learner in (sharing, whole)))


ODD = {  # a prompt's tokens, and its answers'
    "prompts of a token": [(1, [3, 4, 1]), (1, [2, 2])],
    "a prompt longer than a buffer": [(300, [5, 6, 3, 2]), (10, [2, 3])],
    "answers of a token": [(30, [1] * 10), (2, [1] * 5)],
    "one long answer": [(30, [1, 2, 250, 4]), (20, [2, 3])],
    "64 answers": [(20, [1, 2, 3, 4] * 16)],
}


@pytest.mark.parametrize("lengths", ODD.values(), ids=ODD)
def test_odd_lengths_are_learned_from_alike(learners, lengths):
    job, (sharing, whole), state = learners
    likelihood = replace(sharing.loss, kl=0.0)
    both = [Learner(job.spec, job.machine, one.config, likelihood, one.frozen) for one in (sharing, whole)]
    given = rows_of_lengths(lengths)
    assert "wide" in both[0].buffers(given)[0]
    assert "wide" not in both[1].buffers(given)[0]
    with jax.set_mesh(job.mesh):
        assert_same(*(gradient(learner, state, given) for learner in both))


def test_so_are_rows_in_the_longer_buffers_that_kernels_are_given(learners):
    job, (sharing, whole), state = learners

    class ForKernels(Learner):
        def buffers(self, rows):
            return buffers_of(rows, self.config.train, 1, shares=True)

    likelihood = replace(sharing.loss, kl=0.0)
    both = [
        kind(job.spec, job.machine, one.config, likelihood, one.frozen)
        for kind, one in ((ForKernels, sharing), (Learner, whole))
    ]
    given = rows_of_lengths([(30, [2] * 64), (200, [3, 30] * 8)])
    shapes = {(b["wide"].shape[2], b["shared"].shape[2]) for b in both[0].buffers(given)}
    assert len({shared for _, shared in shapes}) > 1  # too many copies for one shape
    assert max(wide for wide, _ in shapes) == 512
    with jax.set_mesh(job.mesh):
        assert_same(*(gradient(learner, state, given) for learner in both))


@pytest.mark.parametrize(
    ("family", "objective", "full", "scheme"),
    [
        ("qwen2", Loss("ppo"), False, None),
        ("qwen3_moe", Loss("cispo"), False, None),
        ("llama", Loss("dro", temperature=0.7), True, None),
        ("qwen3", Loss("importance_sampling"), False, Scheme("int8")),
    ],
    ids=["biases", "experts", "full", "rounded"],
)
def test_every_kind_of_model_learns_alike(tmp_path, learners, family, objective, full, scheme):
    make_checkpoint(tmp_path, family=family, **FAMILY_SHAPES[family])
    config, mesh = load_model_config(tmp_path), make_mesh(MeshConfig(), jax.devices()[:1])
    spec = ModelSpec(config, None if full else LoraConfig(rank=4), "float32", scan=False, scheme=scheme)
    machine, given = Machine(mesh, "xla", False, False), rows(3, 4, vocabulary=150)
    with jax.set_mesh(mesh):
        frozen = load_base(tmp_path, spec, mesh)
        if full:
            spec, trained, frozen = replace(spec, full=True), frozen, {}
        else:
            keys = iter(jax.random.split(jax.random.key(1), 100))
            draw = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)  # noqa: E731
            trained = jax.tree.map(draw, jax.tree.map(jnp.asarray, init_lora(spec, 0)))
        found = [
            gradient(Learner(spec, machine, like.config, objective, frozen), TrainState(trained, ()), given)
            for like in learners[1]
        ]
    assert_same(*found)


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


def test_several_devices_and_padded_rows_share_nothing(tmp_path):
    model = make_model(tmp_path / "model")
    for layout, devices in (("packed", 8), ("padded", 1)):
        config = rl_config(model, tmp_path, train={"layout": layout}, mesh={"data": devices})
        assert config.rl.share_prompts
        job = job_of(config, devices)
        learner = Learner(job.spec, job.machine, config, job.loss, {})
        assert all("wide" not in batch for batch in learner.buffers(rows()))
        assert copies_memory(job) == 0


def test_a_long_prompt_and_one_of_many_answers_need_no_room_for_many_copies_of_the_long_one():
    lengths = [(n, [20] * 64) for n in (30, 90, 300, 900, 2500)]
    given = rows_of_lengths(lengths)
    train = TrainConfig(max_buffer_tokens=4096)
    buffers = buffers_of(given, train, 1, True)
    assert sum(float(b["weights"].sum()) for b in buffers) == 5 * 64 * 20
    assert all(b["copies"].size <= 4 * b["wide"].size for b in buffers if b["tokens"].size == 4096)
    tokens = sum(b["tokens"].size for b in buffers)
    assert tokens < sum(b["tokens"].size for b in buffers_of(given, train, 1)) / 1.5


def test_attention_without_kernels_sees_no_longer_buffers_than_without_copies(learners):
    """Its scores grow with the square of a buffer's length."""
    _, (sharing, whole), _ = learners
    given = rows(40, 8)
    buffers, plain = sharing.buffers(given), whole.buffers(given)
    assert max(b["wide"].size for b in buffers) <= 256
    assert sum(b["wide"].size for b in buffers) <= 1.1 * sum(b["tokens"].size for b in plain)
    assert sum(b["tokens"].size for b in buffers) < 0.9 * sum(b["tokens"].size for b in plain)
    total = sum(float(b["weights"].sum()) for b in buffers)
    assert total == sum(float(row.weights.sum()) for row in given)


def test_room_for_copies_is_in_the_estimate(learners):
    job, *_ = learners
    kept = 256 * (2 * 2 + 2 * 1) * 16 * 2 * 4  # tokens, heads, their size, layers, bytes
    assert copies_memory(job) == kept
    kernels = replace(job, machine=replace(job.machine, backend="cudnn"))
    assert copies_memory(kernels) == 2 * kept
    one_layer = replace(job, config=replace(job.config, model=replace(job.config.model, remat=True)))
    assert copies_memory(one_layer) == math.ceil(kept / 2)
