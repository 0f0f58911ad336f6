"""A local Tinker service for tests: SkyRL's JAX engine on the CPU, on loopback, in an environment of its own.

    with local_server(model_dir, scratch) as url:
        ...                                        # TINKER_BASE_URL=url TINKER_API_KEY=tml-local

The environment is made by `python tools/tinker_parity.py install-server`. Run by that environment's Python,
this file is the service itself: `python tinker_server.py MODEL_DIR SCRATCH PORT`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120
STOP_SECONDS = 20
# An adapter's slot is freed only when its session has been silent for minutes, so there are plenty of them.
ENGINE = {
    "max_lora_adapters": 16,
    "max_lora_rank": 8,
    "train_micro_batch_size": 4,
    "loss_chunk_size": 128,
    "sample_max_num_sequences": 4,
}


@contextmanager
def local_server(model_dir: Path, scratch: Path) -> Iterator[str]:
    """Start the service for one base, wait until it listens, and stop what was started.

    Raises:
      RuntimeError: it stopped or does not listen in time; with the end of its log.
    """
    from jaxlora.parity.server import server_python

    scratch.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(server_python()), __file__, str(model_dir.resolve()), str(scratch.resolve()), str(port)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "TINKER_"))
    }
    environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    log = scratch / "server.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait_until_listening(url, process, log)
            yield url
        finally:
            _stop(process)


def _wait_until_listening(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"the server stopped with code {process.returncode}:\n{log.read_text()[-3000:]}"
            )
        try:
            with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server does not listen after {START_SECONDS} s:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen) -> None:
    """End the service and its engine: they are the process group that was started for them."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.wait(timeout=STOP_SECONDS)


# --- In the server's environment ----------------------------------------------------------------------------


def serve(model_dir: str, scratch: str, port: int) -> None:
    """Run the API; it starts its engine as a process of its own."""
    # The API starts its engine with `uv run ... -m tx.tinker.engine ARGUMENTS`, which needs a uv project.
    # This `uv` runs the module with this Python.
    bin_dir = Path(scratch) / "bin"
    bin_dir.mkdir(exist_ok=True)
    uv = bin_dir / "uv"
    uv.write_text(f'#!/bin/sh\nwhile [ "$1" != "-m" ]; do shift; done\nexec "{sys.executable}" "$@"\n')
    uv.chmod(0o755)
    os.environ["PATH"] = f"{bin_dir}{os.pathsep}{os.environ['PATH']}"

    import uvicorn
    from tx.tinker import api
    from tx.tinker.config import EngineConfig

    api.app.state.engine_config = EngineConfig(
        base_model=model_dir,
        backend="jax",
        backend_config=ENGINE,
        checkpoints_base=Path(scratch) / "checkpoints",
        database_url=f"sqlite:///{scratch}/tinker.db",
    )
    # The SDK's opening request, for which this server has no route.
    api.app.post("/api/v1/client/config")(lambda: {"pjwt_auth_enabled": False})
    uvicorn.run(api.app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
