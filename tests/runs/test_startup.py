"""What is trained is what is evaluated: the check before step 1 sees every way in which it might not be."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxlora.cli import load_config
from jaxlora.config import MeshConfig
from jaxlora.generate import decode as generate
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh
from jaxlora.train import startup
from jaxlora.train.job import fresh_state, load_frozen, prepare


class Start:
    """A job with its fresh adapter and base, on one device."""

    def __init__(self, repository, **fields: str):
        small = {"data.train_rows": "8", "data.validation_rows": "8"}
        job = prepare(load_config(repository / "configs" / "tiny.py", small | fields))
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.job = dataclasses.replace(job, machine=dataclasses.replace(job.machine, mesh=mesh))
        with jax.set_mesh(mesh):
            self.lora, self.frozen = fresh_state(self.job).trained, load_frozen(self.job)

    def check(self, lora=None) -> startup.StartCheck:
        with jax.set_mesh(self.job.mesh):
            return startup.check_start(self.job, self.lora if lora is None else lora, self.frozen)


@pytest.fixture(scope="module")
def start(repository) -> Start:
    return Start(repository)


@pytest.fixture
def changed(monkeypatch):
    """Replace a function of the decoder, and forget the programs that were compiled with the right one."""

    def change(module, name: str, wrong) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: wrong(original, *args, **options))
        startup._decode.clear_cache()

    yield change
    startup._decode.clear_cache()


def test_trainer_and_decoder_agree_and_a_random_adapter_has_an_effect(start):
    found = start.check()
    assert found.fresh < 1e-4
    assert found.perturbed < 1e-4
    assert found.effect > 0.5


def test_in_bfloat16_the_differences_are_far_below_the_tolerance(repository):
    found = Start(repository, **{"model.dtype": "bfloat16"}).check()
    assert found.fresh < startup.TOLERANCE["bfloat16"] / 4
    assert found.perturbed < (startup.TOLERANCE["bfloat16"] + startup.SHARE["bfloat16"] * found.effect) / 4


def test_an_adapter_whose_b_is_not_zero_is_refused(start):
    lora = jax.tree.map_with_path(
        lambda path, x: x + 1e-3 if path[-1].key == "lora_b" else x,
        start.lora,
    )
    with pytest.raises(UserError, match="its B must be zero"):
        start.check(lora)


def test_a_merge_with_another_scale_is_refused(start, changed):
    def twice(original, spec, lora, frozen, **options):
        doubled = dataclasses.replace(spec.lora, alpha=2 * spec.lora.alpha)
        merged_spec, *rest = original(dataclasses.replace(spec, lora=doubled), lora, frozen, **options)
        return merged_spec, *rest

    changed(startup, "decode_weights", twice)
    with pytest.raises(UserError, match="with a random B, trainer and decoder differ by"):
        start.check()


def test_a_merge_that_forgets_the_adapter_is_refused(start, changed):
    def without(original, spec, lora, frozen, **options):
        return original(spec, jax.tree.map(jnp.zeros_like, lora), frozen, **options)

    changed(startup, "decode_weights", without)
    with pytest.raises(UserError, match="with a random B"):
        start.check()


def test_positions_shifted_between_prompt_and_answer_are_refused(start, changed):
    def shifted(original, model, state, window, backend):
        hidden, cache = original(model, state._replace(lengths=state.lengths + 1), window, backend)
        return hidden, cache

    changed(startup, "decode_hidden", shifted)
    with pytest.raises(UserError, match="with the fresh adapter"):
        start.check()


def test_a_mask_that_hides_the_newest_token_is_refused(start, changed):
    def short(original, q, keys, values, lengths, backend):
        return original(q, keys, values, lengths - 1, backend)

    changed(generate, "decode_attention", short)
    with pytest.raises(UserError, match="with the fresh adapter"):
        start.check()


def test_an_adapter_that_is_not_connected_is_refused(start, monkeypatch):
    monkeypatch.setattr(startup, "with_random_b", lambda spec, lora: lora)
    with pytest.raises(UserError, match="not connected"):
        start.check()
