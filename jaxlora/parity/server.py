"""The environment of the local Tinker server: where it is, and how it is installed.

The server (SkyRL's JAX engine) needs different versions of many packages, so it lives in a virtual
environment of its own: `$JAXLORA_TINKER_SERVER`, or `~/.cache/jaxlora/tinker-server`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console

# skyrl-tx 0.3.0 has one A matrix per projection, like PEFT; later releases tie those of q, k and v. It only
# speaks JSON, as the SDK does up to 0.24.1. Its own `jax` extra would pull in CUDA.
PINS = (
    "torch==2.13.0",
    "skyrl-tx[tinker]==0.3.0",
    "jax>=0.8,<1",
    "flax>=0.12.2,<1",
    "optax>=0.2.5,<1",
    "tinker==0.24.1",
)
HOW = "python tools/tinker_parity.py install-server"


def server_folder() -> Path:
    """The folder of the environment, whether or not it exists."""
    return Path(os.environ.get("JAXLORA_TINKER_SERVER", Path.home() / ".cache" / "jaxlora" / "tinker-server"))


def server_python() -> Path:
    """The environment's Python.

    Raises:
      UserError: it is not installed, or has other pins.
    """
    python, stamp = server_folder() / "bin" / "python", server_folder() / "pins.txt"
    if not python.exists():
        raise UserError(f"the local Tinker server is not installed; {HOW}")
    if not stamp.is_file() or stamp.read_text().split() != list(PINS):
        raise UserError(f"the local Tinker server is outdated or only partly installed; {HOW}")
    return python


def install_server() -> Path:
    """Create the environment, about 2 GB, unless it exists with the right pins.

    Raises:
      UserError: a package cannot be installed.
    """
    folder = server_folder()
    with suppress(UserError):
        server_python()
        console.print(f"the local Tinker server is in {folder}")
        return folder
    console.print(f"installing the local Tinker server in {folder} (about 2 GB)", markup=False)
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"{folder}: exists but is not a virtual environment; it is not replaced")
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"the local Tinker server cannot be installed: {error}") from None
    (folder / "pins.txt").write_text("\n".join(PINS) + "\n")
    return folder
