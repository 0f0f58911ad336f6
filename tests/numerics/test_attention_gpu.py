"""cuDNN attention on packed rows and on a decoder's cache computes what the XLA backend computes.

Needs a GPU: `JAX_PLATFORMS=cuda python -m pytest tests/numerics/test_attention_gpu.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.models.attention import decode_attention, segment_attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN attention needs a GPU")


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def error(ours, expected) -> float:
    """Relative error against the same attention in float32."""
    a, b = np.asarray(ours, np.float32), np.asarray(expected, np.float32)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("longest", [0, 320])
@pytest.mark.parametrize("backend", ["cudnn", "cudnn_rows"])
@pytest.mark.parametrize("lines", [1, 2, 3])
def test_packed_rows_forward_and_backward(lines, backend, longest):
    length, segments = 640, 4
    q, k, v, g = draw(*((lines, length, heads, 128) for heads in (8, 2, 2, 8)))
    ends = [np.cumsum(np.random.default_rng(i).integers(20, 155, segments)) for i in range(lines)]
    ids = np.array([[sum(t >= e for e in line) + 1 for t in range(length)] for line in ends])
    ids = jnp.asarray(np.where(ids > segments, 0, ids), jnp.int32)  # what follows the last row is padding
    real = (ids > 0)[..., None, None]

    def run(backend, dtype):
        def loss(q, k, v):
            out = segment_attention(q, k, v, ids, backend, segments, longest)
            return jnp.sum(jnp.where(real, out * g.astype(dtype), 0).astype(jnp.float32)), out

        arrays = (x.astype(dtype) for x in (q, k, v))
        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return jnp.where(real, out, 0), *grads

    for ours, expected in zip(run(backend, jnp.bfloat16), run("xla", jnp.float32), strict=True):
        assert error(ours, expected) < 1e-2


def test_decoding_reads_each_row_up_to_its_own_length():
    rows, length = 16, 256
    q, keys, values = draw((rows, 8, 128), (rows, length, 2, 128), (rows, length, 2, 128))
    lengths = jnp.asarray(np.random.default_rng(1).integers(1, length + 1, rows), jnp.int32)
    ours = decode_attention(q, keys, values, lengths, "cudnn")
    expected = decode_attention(*(x.astype(jnp.float32) for x in (q, keys, values)), lengths, "xla")
    assert error(ours, expected) < 1e-2
