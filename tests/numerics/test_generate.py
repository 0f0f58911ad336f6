"""Decoding gives what one prompt alone would give, and what Transformers gives."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import random_model
from helpers.hf_models import CONFIGURATIONS, make_checkpoint, our_model, torch_greedy

from jaxlora.config import MeshConfig
from jaxlora.data.packing import round_up
from jaxlora.generate import decode as decoding
from jaxlora.generate.decode import generate, init_decode, make_decode
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import merge_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.plan.hlo import count_work
from jaxlora.sharding import base_shardings, make_mesh


def random_prompts(n: int, vocab: int = 160, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(1, 50)).tolist() for _ in range(n)]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_32_greedy_tokens_equal_transformers(tmp_path, name):
    reference = make_checkpoint(tmp_path, seed=len(name), **CONFIGURATIONS[name])
    spec, frozen = our_model(tmp_path, scan=False)
    prompts = random_prompts(3)
    ours = generate(spec, {}, frozen, prompts, stop_ids=(), max_new_tokens=32, slots=3)
    for prompt, answer in zip(prompts, ours, strict=True):
        assert answer.tokens == torch_greedy(reference, prompt)


def test_prompts_of_other_lengths_seldom_need_another_program(small, monkeypatch):
    spec, *_ = small
    asked = set()
    make = decoding.make_packed_prefill

    def noted(spec, stop_ids, backend, sampling, longest):
        asked.add((backend, longest))
        return make(spec, stop_ids, "xla", sampling, longest)

    monkeypatch.setattr(decoding, "make_packed_prefill", noted)
    for longest in (130, 300, 400, 500):
        for backend in ("xla", "cudnn"):
            prompts, limits = [[1] * 60] * 40 + [[2] * longest], [4] * 41
            rows, at_once = decoding._seats(prompts, limits, (), 2, None, 1, None, True)
            decoding._filling(spec, (), backend, decoding.GREEDY, rows, at_once, True, (512,), round_up)
    assert asked == {("xla", 0), ("cudnn", 256), ("cudnn", 512)}


@pytest.fixture(scope="module")
def small():
    return random_model(layers=2, rank=4)


def test_answers_do_not_depend_on_slots_order_or_refill(small):
    spec, lora, frozen = small
    prompts = random_prompts(40)
    limits = np.random.default_rng(3).integers(1, 40, 40).tolist()
    eos = (7, 31)  # with random weights, one of these ends about one answer in three

    def run(order, slots, tail_slots=(), **options):
        chosen = [prompts[i] for i in order]
        answers = generate(
            spec,
            lora,
            frozen,
            chosen,
            stop_ids=eos,
            max_new_tokens=40,
            slots=slots,
            limits=[limits[i] for i in order],
            tail_slots=tail_slots,
            **options,
        )
        return {i: (a.tokens, a.stop_reason) for i, a in zip(order, answers, strict=True)}

    alone = run(list(range(0, 40, 5)), slots=1)
    together = run(list(range(40)), slots=16)
    assert together == run(list(range(40)), slots=16, tail_slots=(8, 3))
    expected = np.random.default_rng(4).integers(1, 100, 40).tolist()
    assert together == run(list(range(40)), slots=16, expected=expected)
    assert together == run(list(range(40)), slots=5, packed=True, expected=expected, tail_slots=(4, 2))
    assert together == run(list(range(40)), slots=16, packed=True)
    assert together == run(list(reversed(range(40))), slots=3)
    assert all(together[i] == answer for i, answer in alone.items())
    reasons = [reason for _, reason in together.values()]
    assert {"stop", "length"} == set(reasons)
    for i, (tokens, reason) in together.items():
        assert len(tokens) <= limits[i]
        assert (tokens[-1] in eos) == (reason == "stop")
        assert not set(tokens[:-1]) & set(eos)


def test_the_host_reads_no_condition_between_tokens(small):
    spec, lora, frozen = small
    compiled = make_decode(spec, ()).lower(init_decode(spec, 4, 128, 8), lora, frozen, 128).compile()
    work = count_work(compiled.as_text())
    assert "while" in compiled.as_text()
    assert work.dynamic_loops == 0


def test_progress_counts_every_answer_once(small):
    spec, lora, frozen = small
    finished: list[int] = []
    options = {"stop_ids": (), "max_new_tokens": 20, "slots": 8, "progress": finished.append}
    generate(spec, lora, frozen, random_prompts(20), limits=[1 + i for i in range(20)], **options)
    assert sum(finished) == 20


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1)], ids=str)
@pytest.mark.parametrize("scan", [False, True])
def test_merged_and_unmerged_adapters_give_the_same_tokens(small, scan, shape):
    spec, lora, frozen = small
    prompts = random_prompts(12)
    options = {"stop_ids": (), "max_new_tokens": 24, "slots": 12}
    plain = ModelSpec(spec.config, None, "float32", scan=False)
    expected = generate(plain, {}, merge_lora(spec, lora, frozen), prompts, **options)
    assert generate(spec, lora, frozen, prompts, **options) == expected
    assert generate(plain, {}, frozen, prompts, **options) != expected

    if scan:
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *frozen["layers"].values())
        spec, frozen = replace(spec, scan=True), {**frozen, "layers": stacked}
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    placed = jax.tree.map(jax.device_put, frozen, base_shardings(mesh, spec))
    for merge in (True, False):
        form, adapter, weights, decode = decode_weights(spec, lora, placed, merge=merge)
        assert (form.lora is None) == merge
        assert form.joined == (merge and math.prod(shape) == 1)
        with jax.set_mesh(decode):
            assert generate(form, adapter, weights, prompts, **options) == expected
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, frozen))  # the base is as it was
