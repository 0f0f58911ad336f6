"""Whatever is trained gets its true gradient: that of a plain loss under plain autodiff, for all weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import make_checkpoint
from helpers.rows import random_rows

from jaxlora.checkpoints.base import load_base
from jaxlora.config import LoraConfig, MeshConfig
from jaxlora.data.packing import pack, pad
from jaxlora.lora import init_lora
from jaxlora.models import head
from jaxlora.models.attention import segment_attention
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.sharding import make_mesh, place_batch, place_trained, trained_shardings
from jaxlora.train.step import Compute, buffer_loss, gradients

ROWS = random_rows(5)
LAYOUTS = {"packed": lambda: pack(ROWS, (256,), 256), "padded": lambda: pad(ROWS, (64,), 6)}


def plain_loss(spec, trained, frozen, buffer):
    """-sum of weight * log softmax of the whole logits; no chunks, no rule of our own."""
    model = spec.bind(trained, frozen)
    segments = buffer["segment_ids"]
    hidden, _ = model(
        buffer["tokens"], buffer["positions"], lambda q, k, v, c: (segment_attention(q, k, v, segments), c)
    )
    tied = model.lm_head is None or model.lm_head.weight is None
    weight = model.embed_tokens.weight[...] if tied else model.lm_head.weight[...]
    logits = hidden @ weight.T
    if model.lm_head is not None and model.lm_head.lora_a is not None:
        one = model.lm_head
        logits += one.scale * (hidden @ one.lora_a[...].T) @ one.lora_b[...].T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), buffer["targets"][..., None], axis=-1)[..., 0]
    return -jnp.sum(buffer["weights"] * picked)


def worst(ours, theirs) -> tuple[float, str]:
    """Largest relative difference of an array's norm, and its name."""
    found = []
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        size = np.linalg.norm(b)
        assert size > 0, jax.tree_util.keystr(path)
        found.append((float(np.linalg.norm(a - b) / size), jax.tree_util.keystr(path)))
    return max(found)


def full_model(folder, scan: bool, **shape):
    make_checkpoint(folder, **shape)
    spec = ModelSpec(load_model_config(folder), None, "float32", scan, full=True)
    return spec, load_base(folder, spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unroll"])
def test_all_weights_get_the_gradient_of_the_plain_loss(tmp_path, monkeypatch, scan, tied, layout):
    monkeypatch.setattr(head, "CHUNK", 32)  # several chunks
    spec, weights = full_model(tmp_path, scan, tie_word_embeddings=tied, num_hidden_layers=2)
    buffer = jax.tree.map(lambda x: x[0], LAYOUTS[layout]())
    ours = jax.jit(
        jax.grad(lambda w: buffer_loss(spec, w, {}, buffer, Compute(), "cross_entropy", False)[0])
    )(weights)
    theirs = jax.jit(jax.grad(lambda w: plain_loss(spec, w, {}, buffer)))(weights)
    gap, name = worst(ours, theirs)
    assert gap < 1e-5, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_trained_head_adapter_over_a_frozen_head(tmp_path, tied):
    make_checkpoint(tmp_path, num_hidden_layers=2, tie_word_embeddings=tied)
    lora = LoraConfig(targets="q_proj,down_proj", output_head=True)
    spec = ModelSpec(load_model_config(tmp_path), lora, "float32")
    frozen = load_base(tmp_path, spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    random = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), init_lora(spec, 0)
    )
    buffer = jax.tree.map(lambda x: x[0], LAYOUTS["packed"]())
    ours = jax.grad(lambda t: buffer_loss(spec, t, frozen, buffer, Compute(), "cross_entropy", False)[0])(
        trained
    )
    theirs = jax.grad(lambda t: plain_loss(spec, t, frozen, buffer))(trained)
    gap, name = worst(ours, theirs)
    assert gap < 1e-5, name


def test_a_weight_of_the_base_that_somebody_differentiates_by_gets_its_gradient_too(tmp_path):
    """Without an adapter and without `full`: nothing is silently zero."""
    make_checkpoint(tmp_path, num_hidden_layers=1)
    spec = ModelSpec(load_model_config(tmp_path), None, "float32")
    frozen = load_base(tmp_path, spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    buffer = jax.tree.map(lambda x: x[0], LAYOUTS["packed"]())
    ours = jax.grad(lambda w: buffer_loss(spec, {}, w, buffer, Compute(), "cross_entropy", False)[0])(frozen)
    theirs = jax.grad(lambda w: plain_loss(spec, {}, w, buffer))(frozen)
    assert worst(ours, theirs)[0] < 1e-5


def test_log_probabilities_come_with_the_loss_and_carry_no_gradient(tmp_path):
    spec, weights = full_model(tmp_path, True, num_hidden_layers=1)
    buffer = jax.tree.map(lambda x: x[0], LAYOUTS["padded"]())

    def both(w):
        return buffer_loss(spec, w, {}, buffer, Compute(), "cross_entropy", True)

    (loss, logprobs), grads = jax.value_and_grad(both, has_aux=True)(weights)
    assert float(-jnp.sum(buffer["weights"] * logprobs)) == pytest.approx(float(loss), rel=1e-6)
    real = buffer["segment_ids"] > 0
    assert np.all(np.asarray(logprobs)[real] < 0)
    assert not np.any(np.asarray(logprobs)[~real])
    alone = jax.grad(lambda w: both(w)[0])(weights)
    assert worst(grads, alone)[0] < 1e-6
    assert not any(np.any(x) for x in jax.tree.leaves(jax.grad(lambda w: jnp.sum(both(w)[1]))(weights)))


def test_gradients_over_a_mesh_are_those_of_one_device(tmp_path):
    spec, weights = full_model(tmp_path, True, vocab_size=160, hidden_size=64, num_hidden_layers=2)
    batch = pack(ROWS, (256,), 256)
    alone, _, _ = gradients(spec, weights, {}, batch, Compute(), "cross_entropy", False)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = place_trained(mesh, spec, weights)
        step = jax.jit(
            lambda w, b: gradients(spec, w, {}, b, Compute(), "cross_entropy", False)[0],
            out_shardings=trained_shardings(mesh, spec, placed),
        )
        split = step(placed, place_batch(mesh, batch))
    assert worst(split, alone)[0] < 1e-5
    head_weight = split["lm_head"]["weight"]
    assert head_weight.addressable_shards[0].data.size * 4 == head_weight.size  # vocabulary and hidden split
