"""Fixtures shared by all tests. Tests never reach the network and run on simulated CPU devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from helpers.xla_flags import xla_flags

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers may share one GPU
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=8))
# XLA has a thread a core. Collectives of eight simulated devices that wait for each other on a busy machine
# would hold them all, and after 40 seconds it ends the process.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest

# A command that a shell starts in the background ignores Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the repository; it is not part of the product."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the reference material (../shared) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, a real pretrained model: the folder that `JAXLORA_SMOLLM2` names, or one that
    the script of the reference material makes."""
    if "JAXLORA_SMOLLM2" in os.environ:
        return Path(os.environ["JAXLORA_SMOLLM2"])
    script = REPOSITORY.parent / "shared" / "smollm2" / "convert.py"
    if not script.is_file():
        pytest.skip(
            "SmolLM2 is not on this machine: JAXLORA_SMOLLM2 names no folder, and ../shared is missing"
        )
    folder = tmp_path_factory.mktemp("smollm2")
    made = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
    if made.returncode:
        last = (made.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"SmolLM2 cannot be made on this machine: {last}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory) -> Path:
    """A folder for compiled programs, shared by all runs that the tests of this session start.

    Nothing that tests compile goes to the user's own folder, nor comes from there.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder within that of the session
        folder = folder.parent
    (folder / "compiled").mkdir(exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    return folder / "compiled"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture
def tpu_compiler(monkeypatch):
    """The compiler for TPU slices that are not there, with the optimizations that other tests spare."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (pip install 'jax[tpu]')")
    import jax

    jax.devices()  # this machine's own have read their flags; the TPU compiler stops at those of CPUs
    monkeypatch.delenv("XLA_FLAGS")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
