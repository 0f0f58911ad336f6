"""The TPU attention kernel, run by Pallas' interpreter, computes what the XLA backend computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.config import MeshConfig
from jaxlora.models.attention import segment_attention
from jaxlora.models.splash import _block, splash_attention
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh


def value_and_gradients(attention, batch: int, length: int):
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=(batch, length, h, 128)), jnp.float32) for h in (4, 2, 2, 4))
    ends = (length // 5, length // 2, length - 30)  # three rows, then padding
    ids = jnp.asarray(
        np.broadcast_to(sum(np.arange(length) < end for end in ends), (batch, length)), jnp.int32
    )

    def loss(q, k, v):
        out = attention(q, k, v, ids)
        return jnp.sum(jnp.where((ids > 0)[..., None, None], out * g, 0))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)


def check(mesh_shape, batch: int, length: int) -> None:
    loss, expected = value_and_gradients(segment_attention, batch, length)
    n_devices = int(np.prod(mesh_shape))
    mesh = make_mesh(MeshConfig(*mesh_shape), jax.devices()[:n_devices])
    with jax.set_mesh(mesh):
        our_loss, ours = value_and_gradients(lambda *x: splash_attention(*x, interpret=True), batch, length)
    assert abs(our_loss - loss) < 2e-4  # a sum of a hundred thousand numbers near 0
    for a, b in zip(ours, expected, strict=True):
        assert jnp.linalg.norm(a - b) / jnp.linalg.norm(b) < 2e-6


def test_tokens_and_heads_split_over_chips():
    check((1, 2, 2), batch=1, length=256)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 1), (1, 4, 2)], ids=str)
def test_one_packed_row(mesh):
    check(mesh, batch=1, length=512)


@pytest.mark.parametrize(
    ("length", "block", "padded"),
    [(128, 128, 128), (512, 512, 512), (640, 384, 768), (1408, 512, 1536), (2816, 512, 3072)],
)
def test_blocks_are_few_and_large(length, block, padded):
    assert _block(length) == (block, padded)


def test_tokens_that_are_padded_for_larger_blocks():
    check((1, 2, 1), batch=1, length=1280)


@pytest.mark.slow
def test_rows_split_over_chips():
    check((2, 2, 2), batch=4, length=128)


def test_lengths_and_heads_that_cannot_be_split_are_refused():
    x = jnp.zeros((1, 256, 2, 128))
    ids = jnp.ones((1, 256), jnp.int32)
    with (
        jax.set_mesh(make_mesh(MeshConfig(1, 4, 1), jax.devices()[:4])),
        pytest.raises(UserError, match="64 tokens"),
    ):
        splash_attention(x, x, x, ids)
    with (
        jax.set_mesh(make_mesh(MeshConfig(1, 1, 4), jax.devices()[:4])),
        pytest.raises(UserError, match="tensor: 4"),
    ):
        splash_attention(x, x, x, ids)
