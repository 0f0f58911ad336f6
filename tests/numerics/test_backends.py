"""Which attention kernels a device gets, and what is said of those that it cannot run."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.models import attention
from jaxlora.models.attention import pick_backend, pick_decode_backend, segment_attention
from jaxlora.runtime.devices import compute_capability
from jaxlora.runtime.errors import UserError

GPUS = {"H100": "9.0", "B200": "10.0", "A100": "8.0", "L4": "8.9", "T4": "7.5", "MI300X": "gfx942"}


def capability(name: str) -> tuple[int, ...]:
    return compute_capability(SimpleNamespace(platform="gpu", compute_capability=GPUS[name]))


@pytest.mark.parametrize("pick", [pick_backend, pick_decode_backend])
@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_gets_the_kernels_that_it_has(pick, name):
    kernels = {"H100": "cudnn", "B200": "cudnn", "A100": "cudnn_rows", "L4": "cudnn_rows"}
    assert pick("auto", "gpu", "bfloat16", capability(name)) == kernels.get(name, "xla")
    if name in kernels:
        assert pick("cudnn", "gpu", "bfloat16", capability(name)) == kernels[name]
    assert pick("auto", "gpu", "float32", capability(name)) == "xla"


@pytest.mark.parametrize("name", ["T4", "MI300X"])
def test_cudnn_is_refused_in_one_line_where_it_has_none(name):
    with pytest.raises(UserError, match="cudnn needs an Ampere GPU or a later one; give xla or auto"):
        pick_backend("cudnn", "gpu", "bfloat16", capability(name))
    assert pick_backend("xla", "gpu", "bfloat16", capability(name)) == "xla"


def test_other_devices_have_no_compute_capability():
    assert compute_capability(SimpleNamespace(platform="tpu")) == (0,)
    assert pick_backend("auto", "tpu") == "splash"
    assert pick_backend("auto", "cpu") == "xla"
    assert pick_decode_backend("auto", "tpu", "bfloat16") == "xla"


@pytest.mark.parametrize(("rows", "longest"), [([9, 16, 3], 16), ([16, 16], 16), ([1], 4), ([28, 4], 0)])
@pytest.mark.parametrize("lines", [1, 3])
def test_rows_that_are_laid_apart_give_what_packed_ones_do(monkeypatch, rows, longest, lines):
    """The kernels of XLA stand in for cuDNN's, whose interface is JAX's own."""
    apart = partial(attention._rows_apart, implementation="xla")
    monkeypatch.setattr(attention, "_rows_apart", apart)
    ids = np.zeros((lines, 32), np.int32)
    for line in range(lines):  # each with other rows, the last one with none
        own = rows[line:] if line < 2 else []
        for row, (end, n) in enumerate(zip(np.cumsum(own), own, strict=True), start=1):
            ids[line, end - n : end] = row
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=(lines, 32, heads, 8)), jnp.float32) for heads in (6, 2, 2, 6))
    real = (ids > 0)[..., None, None]

    def run(backend):
        def attend(q, k, v):
            y = segment_attention(q, k, v, jnp.asarray(ids), backend, 4, longest)
            return jnp.sum(jnp.where(real, y * g, 0)), jnp.where(real, y, 0)

        return jax.jit(jax.value_and_grad(attend, (0, 1, 2), has_aux=True))(q, k, v)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run("cudnn_rows"), run("xla"))


def test_rows_laid_apart_are_lowered_to_kernels_for_ampere():
    """`jax.nn.dot_product_attention` asks for them by lengths alone, which needs no Hopper GPU."""
    shapes = [jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    from jax._src.cudnn import fused_attention_stablehlo as library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "check_cudnn_version", lambda: 91000)
        patch.setattr(library, "check_compute_capability", lambda wanted: float(wanted) <= 8.0)
        patch.setattr(library, "is_cuda_compute_capability_equal", lambda *_: False)
        step = jax.jit(
            jax.grad(lambda *xs: jnp.sum(segment_attention(*xs, "cudnn_rows", 3, 128).astype(jnp.float32)))
        )
        text = step.trace(*shapes, ids).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2
    assert all("PADDING_CAUSAL" in call and "tensor<3x128x4x64xbf16>" in call for call in calls)
