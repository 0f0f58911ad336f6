"""What is said of the machine: a CPU that stands in for a GPU is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxlora.runtime.devices import cpu_warning


@pytest.mark.parametrize(
    ("platform", "asked", "visible", "has_card", "said"),
    [
        ("cpu", None, "7", False, "CUDA_VISIBLE_DEVICES=7 names no GPU that JAX can use"),
        ("cpu", "", "7", True, "CUDA_VISIBLE_DEVICES=7 names no GPU that JAX can use"),
        ("cpu", None, None, True, "JAX cannot use the NVIDIA card that is here"),
        ("cpu", None, None, False, None),  # no card, and none was asked for
        ("cpu", "cpu", "7", True, None),  # the CPU was asked for
        ("gpu", None, "7", True, None),
    ],
)
def test_a_cpu_that_stands_in_for_a_gpu_is_named(platform, asked, visible, has_card, said):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    warning = cpu_warning(platform, asked, environment, has_card)
    assert warning is None if said is None else said in warning
    assert warning is None or "JAX_PLATFORMS=cpu" in warning


def test_a_platform_that_is_not_here_is_one_line(repository):
    environment = os.environ | {"JAX_PLATFORMS": "nowhere", "CUDA_VISIBLE_DEVICES": "7"}
    command = [sys.executable, "-m", "jaxlora", "train", "--config", "tiny", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=repository)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert lines[0].startswith("error: JAX finds no device (JAX_PLATFORMS=nowhere, CUDA_VISIBLE_DEVICES=7): ")


def test_a_mesh_of_such_a_cpu_says_so_once(repository):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "7"}
    environment.pop("JAX_PLATFORMS", None)
    code = (
        "from jaxlora.config import MeshConfig; from jaxlora.sharding import make_mesh;"
        " import jax; cpu = jax.devices()[0].platform == 'cpu';"
        " make_mesh(MeshConfig()); make_mesh(MeshConfig()); print(cpu)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=repository
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("CUDA_VISIBLE_DEVICES=7 names no GPU") == (done.stdout.strip() == "True")
