"""Fixtures shared by all tests. Tests never reach the network and run on simulated CPU devices."""

from __future__ import annotations

import os
import signal
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
