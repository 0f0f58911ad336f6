"""Which attention kernels a device gets, and what is said of those that it cannot run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxlora.models.attention import pick_backend, pick_decode_backend
from jaxlora.runtime.devices import compute_capability
from jaxlora.runtime.errors import UserError

GPUS = {"H100": "9.0", "B200": "10.0", "A100": "8.0", "L4": "8.9", "T4": "7.5", "MI300X": "gfx942"}


def capability(name: str) -> tuple[int, ...]:
    return compute_capability(SimpleNamespace(platform="gpu", compute_capability=GPUS[name]))


@pytest.mark.parametrize("pick", [pick_backend, pick_decode_backend])
@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_gets_cudnn_where_it_has_kernels_for_packed_rows(pick, name):
    expected = "cudnn" if name in ("H100", "B200") else "xla"
    assert pick("auto", "gpu", "bfloat16", capability(name)) == expected
    assert pick("auto", "gpu", "float32", capability(name)) == "xla"


@pytest.mark.parametrize("name", ["A100", "L4", "T4", "MI300X"])
def test_cudnn_is_refused_in_one_line_where_it_has_none(name):
    with pytest.raises(UserError, match="cudnn needs a Hopper GPU or a later one; give xla or auto"):
        pick_backend("cudnn", "gpu", "bfloat16", capability(name))
    assert pick_backend("xla", "gpu", "bfloat16", capability(name)) == "xla"


def test_other_devices_have_no_compute_capability():
    assert compute_capability(SimpleNamespace(platform="tpu")) == (0,)
    assert pick_backend("auto", "tpu") == "splash"
    assert pick_backend("auto", "cpu") == "xla"
    assert pick_decode_backend("auto", "tpu", "bfloat16") == "xla"
