"""Multi-host runs: one process per host, all running the same program on their share of the devices.

    hosts.start()                        # first of all: joins the processes; does nothing on a single host
    stop = hosts.agree(asked_to_stop)    # the same answer on every host
    adapter = hosts.whole(state.trained)    # numpy arrays, whatever the sharding
    if hosts.is_main():                  # only process 0 writes files
        write(adapter)
    hosts.barrier("written")

In a single process every function is trivial. With several, all processes must make the same calls in the
same order. Hosts communicate through JAX's coordination service, not through the devices: a call never waits
for queued steps, and has a time limit. A failing host tells the others, which stop at once with its message.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlora.runtime.errors import MachineError, UserError, on_failure

CONNECT_SECONDS = 600  # hosts of one slice are ready within minutes of each other
LIMIT_SECONDS = 3600  # one host may compile or fetch the base while the others wait
HEARTBEAT_SECONDS = 60  # a host that dies silently is noticed after this long
SHUTDOWN_SECONDS = 60
_DEVICES = Path("/dev")
_FAILED = "jaxlora/failed"
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_listeners: list[Callable[[str], None]] = []
_calls: Counter[str] = Counter()  # by name; the same on all hosts, which all make the same calls


# --- Joining ------------------------------------------------------------------------------------------------


def start() -> None:
    """Join the processes, if the environment defines several. Must precede any use of devices.

    There are several on a Cloud TPU slice of more than one host (on GKE according to the plugin's
    environment, otherwise to the machine's metadata), or if JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID are all set.

    Raises:
      UserError: the variables are incomplete or impossible.
    """
    if jax.distributed.is_initialized():
        return
    address, n, index = (os.environ.get(f"JAX_{name}") for name in _VARIABLES)
    where: dict[str, Any] = {}
    if address is not None or n is not None or index is not None:
        if address is None or n is None or index is None:
            raise UserError(f"several hosts: set all of {', '.join(f'JAX_{name}' for name in _VARIABLES)}")
        if ":" not in address or not n.isdigit() or not index.isdigit() or int(index) >= int(n):
            raise UserError(
                f"several hosts: JAX_COORDINATOR_ADDRESS={address} JAX_NUM_PROCESSES={n}"
                f" JAX_PROCESS_ID={index} is invalid; give host:port, a count, and an index from 0 to {n} - 1"
            )
        if int(n) == 1:
            return
        where = {"coordinator_address": address, "num_processes": int(n), "process_id": int(index)}
        where["cluster_detection_method"] = "deactivate"
    elif _tpu_hosts() <= 1:
        return
    _connect(where)
    _watch_others()
    on_failure.append(_tell_others)


_VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def _tpu_hosts() -> int:
    """Number of hosts of this machine's TPU slice; 1 without a TPU."""
    if not (list(_DEVICES.glob("accel*")) or list(_DEVICES.glob("vfio/[0-9]*"))):
        return 1
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if names is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        names = _metadata()
    return len((names or "").split(","))


def _metadata() -> str | None:
    """The addresses of the slice's hosts, separated by commas; None if this is not a Cloud TPU machine."""
    request = urllib.request.Request(_METADATA, headers={"Metadata-Flavor": "Google"})
    for pause in (1, 3, 0):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(pause)
    return None


def _connect(where: dict[str, Any]) -> None:
    # The runtime would handle SIGTERM itself, and a run could not be stopped while it loads.
    jax.config.update("jax_enable_preemption_service", False)
    # CPU devices would run independent programs in an order that differs between hosts.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # At its timeout the runtime aborts with a stack trace; this ends the process a little earlier.
    text = f"the hosts did not find each other within {CONNECT_SECONDS} s"
    if where:
        text += f" (process {where['process_id']} of {where['num_processes']}, coordinator at "
        text += f"{where['coordinator_address']})"
    text += "; start the same command on every host"
    limit = threading.Timer(CONNECT_SECONDS, partial(_end, text, MachineError.exit_code))
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=CONNECT_SECONDS + 30,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            **where,
        )
    except (RuntimeError, ValueError) as error:  # an unresolvable name, a port in use
        raise MachineError(f"several hosts: {error}") from None
    finally:
        limit.cancel()


# --- Communicating ------------------------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process writes files: exactly one does, the same as Orbax's primary."""
    return n_processes() == 1 or jax.process_index() == 0


def is_first() -> bool:
    """Whether this process prints: the first by number, whose output users follow.

    On a TPU slice that is worker 0. It need not be the main process: the runtime has its own numbering.
    """
    return _state().process_id in (None, 0)


def n_processes() -> int:
    """Number of processes that run this program together."""
    return _state().num_processes


def barrier(name: str, seconds: float = LIMIT_SECONDS) -> None:
    """Wait until every process gets here.

    Raises:
      MachineError: not all arrived in time; the message contains the name.
    """
    if n_processes() > 1:
        _meet(_next(name), name, seconds)


def agree(flag: bool) -> bool:
    """True on every process if True on any. Takes about a millisecond; does not wait for the devices."""
    if n_processes() == 1:
        return flag
    key, client = _next("agree"), _state().client
    if flag:
        client.key_value_set(f"{key}/{_state().process_id}", "1")
    _meet(key + "/here", "agree", LIMIT_SECONDS)
    return bool(client.key_value_dir_get(key + "/"))


def broadcast(value: Any, seconds: float = LIMIT_SECONDS) -> Any:
    """Process 0's value on every process; any JSON value."""
    if n_processes() == 1:
        return value
    key, client = _next("broadcast"), _state().client
    if is_main():
        client.key_value_set(key, json.dumps(value))
    try:
        return json.loads(client.blocking_key_value_get(key, round(1000 * seconds)))
    except jax.errors.JaxRuntimeError as error:
        raise MachineError(f"no message from process 0 for {seconds:g} s: {_first_line(error)}") from None


def whole(tree: Any) -> Any:
    """The tree as numpy arrays on every process; arrays split over processes are gathered one by one."""

    def gather(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.device_get(tree) if n_processes() == 1 else jax.tree.map(gather, tree)


def check_shared(folder: str | Path, seconds: float = 30) -> None:
    """Check that every process sees what process 0 writes to this folder, which is created if missing.

    All processes write parts of a checkpoint and read them when resuming, so separate folders would lose the
    run.

    Raises:
      UserError: some process does not see it.
    """
    if n_processes() == 1:
        return
    folder = Path(folder)
    token = folder / broadcast(f".shared-{uuid.uuid4().hex}")
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    barrier("shared folder")
    deadline = time.monotonic() + seconds
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = agree(not seen)
    if is_main():
        token.unlink()
    if blind:
        raise UserError(
            f"results_dir {folder}: not every host sees what process 0 writes there; the hosts need a"
            " shared folder, such as an NFS mount"
        )


def check_same(values: dict[str, Any], what: str) -> None:
    """Check that every process has the same (JSON) values as process 0: one run, not several.

    Raises:
      UserError: some process has different ones; raised there, with their names.
    """
    if n_processes() == 1:
        return
    own = json.loads(json.dumps(values))
    main = broadcast(own)
    if agree(own != main):
        names = [name for name in {**main, **own} if main.get(name) != own.get(name)]
        where = f"this host differs in {', '.join(names)}" if names else "another host differs"
        raise UserError(
            f"{what}: not the same on every host: {where}; give every host the same command and files"
        )


# --- Failing together ---------------------------------------------------------------------------------------


def _tell_others(message: str, exit_code: int) -> None:
    """Announce that this process is ending with an error; it then ends without waiting for the others."""
    with suppress(jax.errors.JaxRuntimeError):  # process 0 is gone: there is no one left to tell
        _state().client.key_value_set(f"{_FAILED}/{_state().process_id}", json.dumps([message, exit_code]))
        _state().client.wait_at_barrier(_FAILED, 5000)  # until all know: process 0 holds the announcement
    _leave(exit_code)


@contextmanager
def on_other_failure(call: Callable[[str], None]) -> Iterator[None]:
    """Within the context, `call(message)` runs if another process fails, just before this one ends too."""
    _listeners.append(call)
    try:
        yield
    finally:
        _listeners.remove(call)


def _watch_others() -> None:
    """Start polling for other hosts' announcements once a second, until this process ends normally."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(ended,), name="other hosts", daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join()

    atexit.register(stop)


def _watch(ended: threading.Event) -> None:
    client, own = _state().client, _state().process_id
    while not ended.wait(1.0):
        try:
            failed = client.key_value_dir_get(_FAILED + "/")
        except jax.errors.JaxRuntimeError:
            _end("process 0 is gone; its log has the reason", MachineError.exit_code)
        if any(int(key.rpartition("/")[2]) == own for key, _ in failed):
            return  # this process is ending by itself
        if failed:
            key, text = failed[0]
            message, exit_code = json.loads(text)
            with suppress(jax.errors.JaxRuntimeError):  # the failed process may not wait
                client.wait_at_barrier(_FAILED, 5000)
            text = f"process {key.rpartition('/')[2]}: {message}"
            for call in list(_listeners):
                call(text)
            _end(text, exit_code)


def _end(message: str, exit_code: int) -> NoReturn:
    """Exit now, from any thread: the main one may be inside a collective that never returns."""
    sys.stderr.write(f"error: {message}\n")
    _leave(exit_code)


def _leave(exit_code: int) -> NoReturn:
    """Exit without running exit handlers: one of them waits for the other hosts."""
    if _state().process_id == 0:  # the runtime aborts the others once the process with the service is gone
        time.sleep(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _meet(key: str, name: str, seconds: float) -> None:
    try:
        _state().client.wait_at_barrier(key, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise MachineError(
            f"not all hosts reached '{name}' within {seconds:g} s: {_first_line(error)}"
        ) from None


def _next(name: str) -> str:
    """A key unused by earlier calls. Calls with different names may come from different threads."""
    _calls[name] += 1
    return f"jaxlora/{name}/{_calls[name]}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _state() -> Any:
    # JAX has no public API for its coordination service; Orbax uses the same.
    from jax._src import distributed

    return distributed.global_state
