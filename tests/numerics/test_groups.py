"""Several answers to one prompt: what each would be alone, with the prompt read once."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers.adapters import random_model

from jaxlora.generate import decode
from jaxlora.generate.decode import Sampling, generate
from jaxlora.generate.weights import decode_weights

GROUP, PROMPTS = 5, 7
DRAWN = Sampling(1.0, logprobs=True)


@pytest.fixture(scope="module")
def model():
    return random_model(layers=1, rank=1)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 160, n).tolist() for n in (9, 30, 9, 47, 3, 30, 12)]


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    every = jax.random.split(jax.random.key(5), PROMPTS * GROUP)
    return np.asarray(jax.random.key_data(every))


def answers(model, prompts, slots, **options):
    options = {"stop_ids": (7, 31), "max_new_tokens": 24, "sampling": DRAWN} | options
    found = generate(*model, prompts, slots=slots, **options)
    return [(one.tokens, one.stop_reason) for one in found], np.concatenate([one.logprobs for one in found])


def test_a_group_is_what_its_answers_would_be_alone(model, prompts, keys):
    every = [prompt for prompt in prompts for _ in range(GROUP)]
    alone, alone_logprobs = answers(model, every, 13, keys=keys)
    together, logprobs = answers(model, prompts, 13, keys=keys, repeats=GROUP)
    assert together == alone
    np.testing.assert_allclose(logprobs, alone_logprobs, atol=1e-4)
    assert len({tuple(tokens) for tokens, _ in together}) == PROMPTS * GROUP  # each draws its own
    assert {reason for _, reason in together} == {"stop", "length"}


def test_a_prompt_is_read_once_for_its_group(model, prompts, keys, monkeypatch):
    read: list[int] = []
    original = decode.make_prefill

    def watched(*arguments):
        prefill = original(*arguments)

        def call(state, lora, weights, tokens, lengths, *rest):
            read.append(int(lengths.sum()) - int((lengths == 1).sum()))
            assert tokens.shape[0] == decode.SHARED_PROMPTS
            return prefill(state, lora, weights, tokens, lengths, *rest)

        return call

    monkeypatch.setattr(decode, "make_prefill", watched)
    answers(model, prompts, PROMPTS * GROUP, keys=keys, repeats=GROUP)
    assert sum(read) == sum(map(len, prompts))


def test_limits_are_of_answers(model, prompts, keys):
    limits = [1 + i % 20 for i in range(PROMPTS * GROUP)]
    found, _ = answers(model, prompts, 13, keys=keys, repeats=GROUP, limits=limits)
    assert all(
        len(tokens) == most or reason == "stop" for (tokens, reason), most in zip(found, limits, strict=True)
    )
    assert all(len(tokens) <= most for (tokens, _), most in zip(found, limits, strict=True))


def test_the_adapter_beside_the_weights_copies_nothing_of_the_base(model):
    spec, lora, frozen = model
    form, kept, weights, _ = decode_weights(spec, lora, frozen, merge=False)
    assert form.lora is not None
    assert all(ours is theirs for ours, theirs in zip(*map(jax.tree.leaves, (kept, lora)), strict=True))
    ours, theirs = ({x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)} for tree in (weights, frozen))
    assert ours == theirs
