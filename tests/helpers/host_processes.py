"""Several hosts on this machine: processes with CPU devices of their own, joined over the loopback.

    finished = run_hosts(2, ["launch/train.py", "--config", ...], devices=2)
    hosts = start_hosts(2, [...]); wait_for(lambda: ..., hosts); kill(hosts)

Every wait has a limit, and only what was started here is killed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.forks import Fork
from helpers.xla_flags import xla_flags

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 900.0  # seconds; a busy machine takes many times what an idle one does


@dataclass(frozen=True)
class Host:
    process: Fork
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def start_hosts(
    n: int,
    words: Sequence[str | Path],
    folder: Path,
    *,
    devices: int = 1,
    variables: Sequence[dict[str, str]] = (),
) -> list[Host]:
    """Start a Python program in `n` processes (one process: without any sign of others).

    Args:
      folder: for the logs.
      variables: of the environment, one dict a process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    hosts = []
    for index in range(n):
        own = {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": xla_flags(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
        }
        if n > 1:
            own["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
            own |= {"JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(index)}
        own |= variables[index] if variables else {}
        environment = os.environ | own
        if n > 1 and "JAX_COMPILATION_CACHE_DIR" not in own:  # then they keep programs where all of them look
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        log = folder / f"{time.monotonic_ns()}-{index}.log"
        hosts.append(Host(Fork(words, cwd=REPOSITORY, environment=environment, log=log), log))
    return hosts


def wait_for(condition: Callable[[], bool], hosts: Sequence[Host], seconds: float = LIMIT) -> None:
    """Until the condition holds; fails, with the logs, if a process ends before or time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = any(host.process.poll() is not None for host in hosts)
        if ended or time.monotonic() > deadline:
            kill(hosts)
            raise AssertionError(("ended too early:\n" if ended else "timed out:\n") + logs(hosts))
        time.sleep(0.05)


def wait(hosts: Sequence[Host], seconds: float = LIMIT) -> list[int]:
    """The exit codes; a process that has not ended by then is killed, and that is a failure."""
    deadline = time.monotonic() + seconds
    try:
        return [host.process.wait(max(0.1, deadline - time.monotonic())) for host in hosts]
    except subprocess.TimeoutExpired:
        raise AssertionError("did not end:\n" + logs(hosts)) from None
    finally:
        kill(hosts)


def kill(hosts: Sequence[Host]) -> None:
    """SIGKILL to all that still run."""
    for host in hosts:
        host.process.kill()
    for host in hosts:
        host.process.wait(30)


def run_hosts(n: int, words: Sequence[str | Path], folder: Path, *, code: int = 0, **options) -> list[Host]:
    """Start, wait, and check that every process ended with this code."""
    hosts = start_hosts(n, words, folder, **options)
    codes = wait(hosts)
    assert codes == [code] * n, f"exit codes {codes}\n{logs(hosts)}"
    return hosts


def logs(hosts: Sequence[Host]) -> str:
    return "\n".join(f"--- process {i}\n{host.text[-3000:]}" for i, host in enumerate(hosts))
