"""What cuDNN is told about rows that lie end to end: each length and place, for queries and for shared keys.

The kernels need a GPU (`test_attention_gpu.py`). Here others stand in for them that read q, k and v as plain
memory, at the places that they are given.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.models import cudnn
from jaxlora.models.attention import segment_attention

LENGTH, ROWS, HEADS, KV_HEADS, DIM = 48, 5, 6, 2, 8


def lines_of_rows(seed: int, lines: int, longest: int = LENGTH) -> np.ndarray:
    """Lines of 1 to `ROWS` rows, full to the end or with padding; of several lines the first has no row."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((lines, LENGTH), np.int32)
    for line in ids[1 if lines > 1 else 0 :]:
        end = 0
        for row in range(1, rng.integers(1, ROWS + 1) + 1):
            start, end = end, min(end + rng.integers(1, longest + 1), LENGTH)
            line[start:end] = row
    return ids


@pytest.mark.parametrize("width", [12, 24, 48])
@pytest.mark.parametrize("lines", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_told_in_order_and_fill_every_line(seed, lines, width):
    ids = lines_of_rows(seed, lines, width)
    lengths, starts = map(np.asarray, cudnn.row_lengths(jnp.asarray(ids), ROWS, width))
    expected = []
    for line in ids:
        padding, *rows = np.bincount(line, minlength=2)
        pieces = [min(width, padding - done) for done in range(0, padding, width)]
        expected += [n for n in [*rows, *pieces] if n]
    n = len(expected)
    assert lengths.shape == (lines * (ROWS + LENGTH // width),)
    assert lengths[:n].tolist() == expected
    assert not lengths[n:].any()
    assert starts.tolist() == [0, *np.cumsum(lengths)]
    assert starts[-1] == ids.size


@pytest.mark.parametrize(
    ("tokens", "longest", "width"),
    [
        (2816, 1152, 1408),
        (2816, 640, 704),
        (2816, 1409, 2816),
        (12032, 1280, 1504),
        (4096, 600, 1024),
        (301, 50, 301),
    ],
)
def test_a_row_is_as_wide_as_the_longest_needs(tokens, longest, width):
    assert cudnn.row_width(tokens, longest) == width


class Kernel:
    """Attention of each row on its own, read from flat memory as cuDNN reads it."""

    def __init__(self, backward: bool):
        self.backward = backward

    def bind(self, q, k, v, bias, q_lengths, k_lengths, q_places, k_places, *rest, **options):
        lines, width = q.shape[:2]
        assert q_lengths.shape[0] == q_places.shape[0] == lines
        assert q_places.shape[1] == q_lengths.shape[1] + 1
        assert q_lengths.max() <= width
        rows = [x.ravel()[: q_lengths.size] for x in (q_lengths, q_places, k_places)]

        def attend(q, k, v):
            def read(x, start, heads):  # what lies behind the row's end is read too, and is dropped below
                places = start + jnp.arange(width * heads * DIM)
                return x.reshape(-1).at[places].get(mode="fill", fill_value=0).reshape(width, heads, DIM)

            def row(n, start, key_start):
                own = read(q, start, HEADS), read(k, key_start, KV_HEADS), read(v, key_start, KV_HEADS)
                y = jax.nn.dot_product_attention(*own, scale=options["scale"], is_causal=True)
                index = jnp.arange(y.size)
                return y.ravel(), jnp.where(index < n * HEADS * DIM, start + index, q.size)

            y, places = jax.vmap(row)(*rows)
            return jnp.zeros(q.size).at[places].set(y, mode="drop").reshape(q.shape)

        if not self.backward:
            return [attend(q, k, v), jnp.zeros(0)][: 1 + options["is_training"]]
        *_, softmax, y, g = rest
        assert softmax.size == 0
        assert y.shape == q.shape
        return list(jax.vjp(attend, q, k, v)[1](g))


def test_a_row_that_fits_no_buffer_is_an_error():
    with pytest.raises(ValueError, match=r"^a row of 3072 tokens does not fit a buffer of 384$"):
        cudnn.row_width(384, 3072)


@pytest.mark.parametrize("longest", [0, 14, 24, 3072])  # that of a run, which has shorter buffers too
@pytest.mark.parametrize("lines", [1, 3])
def test_rows_are_read_where_they_lie_and_gradients_go_back_there(monkeypatch, lines, longest):
    library = cudnn.cudnn
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_is_flash_attention", lambda *_, **__: None)
    monkeypatch.setattr(library, "_dot_product_attention_fwd_p", Kernel(backward=False))
    monkeypatch.setattr(library, "_dot_product_attention_bwd_p", Kernel(backward=True))
    ids = lines_of_rows(7, lines, min(longest or LENGTH, LENGTH))
    rng = np.random.default_rng(1)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(lines, LENGTH, heads, DIM)), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    g = jnp.where((ids > 0)[..., None, None], g, 0)

    def run(backend):
        def attend(q, k, v):
            return jnp.sum(segment_attention(q, k, v, jnp.asarray(ids), backend, ROWS, longest) * g)

        return jax.value_and_grad(attend, (0, 1, 2))(q, k, v)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run("cudnn"), run("xla"))
    inference = segment_attention(q, k, v, jnp.asarray(ids), "cudnn", ROWS, longest)
    expected = segment_attention(q, k, v, jnp.asarray(ids), "xla")
    np.testing.assert_allclose(inference[ids > 0], expected[ids > 0], atol=2e-5)


def test_the_library_has_the_primitives_and_calls_the_kernels_for_packed_rows(monkeypatch):
    """Lowered for a GPU by whichever JAX is here, forward and backward."""
    monkeypatch.setattr(cudnn.cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn.cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn.cudnn, "is_cuda_compute_capability_equal", lambda *_: False)
    shapes = [jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]

    def total(q, k, v, ids):
        return jnp.sum(segment_attention(q, k, v, ids, "cudnn", 3, 128).astype(jnp.float32))

    step = jax.jit(jax.grad(total, (0, 1, 2)))
    text = step.trace(*shapes, jax.ShapeDtypeStruct((2, 256), jnp.int32)).lower(lowering_platforms=("cuda",))
    calls = [line for line in text.as_text().splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2
    assert "fmhaSoftmaxBackward" in calls[1]
    assert all(r"max_seg_per_batch\22: 3" in call and "PADDING_CAUSAL" in call for call in calls)
