"""Dropout is PEFT's, with masks that follow from where an element stands and from nothing else."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.adapters import trained_lora
from helpers.hf_models import FAMILY_SHAPES, make_checkpoint
from helpers.rows import random_rows
from helpers.torch_loss import torch_summed_nll
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from jaxlora.checkpoints.base import load_base
from jaxlora.config import LoraConfig, MeshConfig, OptimConfig, from_dict
from jaxlora.data.batches import Layout, row_words, step_batch
from jaxlora.lora import get_path
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.dropout import Noise, dropped, kept
from jaxlora.models.families import load_model_config
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import base_shardings, make_mesh, place_batch, place_trained
from jaxlora.train.step import Compute, gradients, init_state, make_eval_step, make_train_step

RATE, SEED, SIZE = 0.3, 5, 96
ROWS = random_rows(12)
PACKED = Layout(True, (384,), 6, 384)


def chosen(step: int) -> range:
    return range(6 * (step - 1) % 12, 6 * (step - 1) % 12 + 6)


def batch_of(step: int, layout: Layout = PACKED, seed: int | None = SEED):
    return step_batch(ROWS, chosen, layout, step, dropout_seed=seed)


def noise_of(step: int = 1, row: int = 0, seed: int = SEED, length: int = 300) -> Noise:
    words = np.full((1, length), row_words(seed, step, [row])[0])
    return Noise.of(words, np.arange(length)[None], RATE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, make_checkpoint(folder, **FAMILY_SHAPES["qwen3"])


@pytest.fixture(scope="module")
def model(checkpoint):
    """A spec that drops, its base on one device, and an adapter whose B is not zero."""
    spec = ModelSpec(load_model_config(checkpoint[0]), LoraConfig(dropout=RATE), "float32")
    frozen = load_base(checkpoint[0], spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    return spec, frozen, trained_lora(spec)


def by_hand(word: int, position: int, layer: int, module: str, feature: int) -> bool:
    """Whether an element is kept, in Python's whole numbers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    first = mix(mix(mix(mix(word) ^ position) ^ layer) ^ zlib.crc32(module.encode()))
    return mix(mix(feature ^ first) ^ mix(first ^ 0x9E3779B9)) >= round(RATE * 2**32)


class TestMasks:
    def test_they_are_what_a_pocket_calculator_says(self):
        word = int(row_words(SEED, 3, [4]).view(np.uint32)[0])
        found = np.asarray(kept(noise_of(3, 4, length=7).of_layer(2), "layers.mlp.down_proj", 9))[0]
        for position, feature in itertools.product(range(7), range(9)):
            assert found[position, feature] == by_hand(word, position, 2, "layers.mlp.down_proj", feature)

    def test_each_is_a_fair_draw_and_none_goes_with_another(self):
        """Shares and correlations of 28,800 elements lie within five standard deviations."""
        masks = {
            f"step {step}, row {row}, layer {layer}, {module}, seed {seed}": np.asarray(
                kept(noise_of(step, row, seed).of_layer(layer), module, SIZE)
            ).ravel()
            for step, row, layer, module, seed in itertools.product((1, 2), (0, 1), (0, 1), "qv", (0, 1))
        }
        n = 300 * SIZE
        for mask in masks.values():
            assert abs(mask.mean() - (1 - RATE)) < 5 * (RATE * (1 - RATE) / n) ** 0.5
        for (one, a), (other, b) in itertools.combinations(masks.items(), 2):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5, (one, other)
        first = next(iter(masks.values())).reshape(300, SIZE)
        for a, b in ((first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):  # neighbours
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / n**0.5

    def test_what_is_kept_is_scaled_so_that_the_mean_stays(self):
        x = jnp.ones((1, 300, SIZE))
        y = np.asarray(dropped(x, noise_of(), "q"))
        assert set(np.unique(y)) == {0.0, np.float32(1) / np.float32(1 - RATE)}
        assert y.mean() == pytest.approx(1, abs=0.02)

    def test_a_row_draws_the_same_wherever_it_lies(self):
        packed, split = batch_of(1), batch_of(1, Layout(True, (128,), 6, 128))
        padded = batch_of(1, Layout(False, (64,), 6, 0))
        assert split["tokens"].shape[0] > 1

        def words(batch):
            real = batch["segment_ids"] > 0
            assert not batch["dropout"][~real].any()
            return batch["dropout"][real], batch["tokens"][real]

        for other in (split, padded):
            for ours, theirs in zip(words(packed), words(other), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert len(set(words(packed)[0])) == 6


def gradient(spec: ModelSpec, frozen, lora, batch, compute: Compute = Compute()):  # noqa: B008
    grads, loss, _ = jax.jit(gradients, static_argnums=(0, 4, 5, 6))(
        spec, lora, frozen, batch, compute, "cross_entropy", False
    )
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)]), float(loss)


def assert_equal(ours, theirs) -> None:
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    assert np.linalg.norm(ours[0] - theirs[0]) / np.linalg.norm(theirs[0]) < 1e-4


class TestSteps:
    @pytest.mark.parametrize(
        "layout",
        [Layout(True, (128,), 6, 128), pytest.param(Layout(False, (64,), 6, 0), marks=pytest.mark.slow)],
    )
    def test_layouts_and_buffers_give_one_gradient(self, model, layout):
        segments = Compute(max_segments=6)
        expected = gradient(*model, batch_of(1), segments)
        assert_equal(gradient(*model, batch_of(1, layout), segments), expected)
        without = gradient(*model, batch_of(1, seed=None), segments)
        assert abs(without[1] - expected[1]) > 1e-3 * expected[1]

    @pytest.mark.parametrize("remat", [pytest.param(True, marks=pytest.mark.slow), "elementwise"])
    def test_what_is_computed_again_is_dropped_again(self, model, remat):
        expected = gradient(*model, batch_of(1), Compute(max_segments=6))
        assert_equal(gradient(*model, batch_of(1), Compute(max_segments=6, remat=remat)), expected)

    def test_unrolled_layers_drop_the_same(self, checkpoint, model):
        spec, _, lora = model
        unrolled = replace(spec, scan=False)
        frozen = load_base(checkpoint[0], unrolled, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
        expected = gradient(*model, batch_of(1), Compute(max_segments=6))
        assert_equal(gradient(unrolled, frozen, lora, batch_of(1), Compute(max_segments=6)), expected)

    def test_a_mesh_of_eight_devices_drops_the_same(self, model):
        spec, frozen, lora = model
        expected = gradient(spec, frozen, lora, batch_of(1), Compute(max_segments=6))
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
        with jax.set_mesh(mesh):
            base = jax.tree.map(
                lambda x, s: jax.device_put(np.asarray(x), s), frozen, base_shardings(mesh, spec)
            )
            adapter = place_trained(mesh, spec, jax.tree.map(np.asarray, lora))
            found = gradient(spec, base, adapter, place_batch(mesh, batch_of(1)), Compute(max_segments=6))
        assert_equal(found, expected)

    def test_validation_drops_nothing(self, model):
        spec, frozen, lora = model
        batch, off = batch_of(1, seed=None), replace(spec, lora=replace(spec.lora, dropout=0.0))
        ours, theirs = (
            make_eval_step(one, Compute()).lower(lora, frozen, batch).as_text() for one in (spec, off)
        )
        assert ours == theirs

    def test_training_steps_equal_pefts_under_the_same_masks(self, checkpoint, model):
        """PEFT's own `Dropout` modules, with a forward pass that reads our masks, on unpacked rows."""
        spec, frozen, lora = model
        config = PeftConfig(r=8, lora_alpha=32, lora_dropout=RATE, target_modules="all-linear")
        peft = get_peft_model(checkpoint[1], config).train()
        now: dict = {}
        for name, module in peft.named_modules():
            if isinstance(module, torch.nn.Dropout) and "lora_dropout" in name:
                layer, *path = name.split("layers.")[1].split(".")[:3]
                module.forward = _reading(now, int(layer), ".".join(["layers", *path]))
        parameters = {n: p for n, p in peft.named_parameters() if "lora_" in n}
        for name, parameter in parameters.items():
            parameter.data.copy_(torch.tensor(np.asarray(_place(lora, name))))
        adam = torch.optim.Adam(parameters.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-12)
        state = init_state(jax.tree.map(jnp.copy, lora), OptimConfig())
        step_fn = make_train_step(spec, OptimConfig(), Compute(max_segments=6))
        for step in range(1, 5):
            state, metrics = step_fn(state, frozen, batch_of(step), jnp.float32(1e-3))
            adam.zero_grad()
            total = 0.0
            for row in chosen(step):
                now["noise"] = noise_of(step, row, length=64)
                loss = torch_summed_nll(peft, [ROWS[row]])
                loss.backward()
                total += loss.item()
            adam.step()
            assert float(metrics["nll"]) == pytest.approx(total, rel=1e-5), step
        pairs = [(_place(state.trained, n), p.detach().numpy()) for n, p in parameters.items()]
        ours, theirs = (np.concatenate([np.ravel(x) for x in side]) for side in zip(*pairs, strict=True))
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-3


def _place(tree, name: str):
    """The array of a PEFT parameter."""
    path = name.split("layers.")[1].split(".")
    key = "lora_a" if "lora_A" in name else "lora_b"
    return get_path(tree["layers"], ".".join(path[1:3]))[key][int(path[0])]


def _reading(now: dict, layer: int, module: str):
    def forward(x):
        mask = np.array(kept(now["noise"].of_layer(layer), module, x.shape[-1]))[:, : x.shape[1]]
        return x * torch.tensor(mask) / (1 - RATE)

    return forward


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"dropout": 1.0}}, "config.lora.dropout: 1.0 is not allowed"),
        (
            {"lora": {"dropout": 0.1, "output_head": True}},
            "config.lora.dropout: is not supported in the head",
        ),
        (
            {"lora": {"dropout": 0.1, "targets": "q_proj,lm_head"}},
            "config.lora.dropout: is not supported in the head",
        ),
        ({"lora": {"dropout": 0.1}, "train": {"what": "full"}}, "config.lora.dropout: with train.what=full"),
    ],
)
def test_what_cannot_drop_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(values)
