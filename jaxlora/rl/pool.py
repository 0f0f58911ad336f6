"""Worker processes, with a hard time limit, for graders that may hang, crash or print.

    with Pool("math", time_limit_s=1.0) as pool:
        pool.run([{"raw": {}, "answer": "2", "text": "\\boxed{2}"}])     # [(1.0, None)]: value, or why none

A server process is started with light imports, never forked from a process with JAX in it. It forks workers
that inherit what it has imported, gives each one job at a time, and kills a worker that exceeds the limit;
the replacement is ready in milliseconds. Messages are JSON. Server and workers end when the parent does,
however it ends: the server's input pipe closes, and the kernel kills the workers along with the server.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jaxlora.rl.grading import Job, as_number, scorer
from jaxlora.runtime.errors import MachineError, UserError, one_line

Outcome = tuple[float | None, str | None]  # the value, or None and a short reason
START_SECONDS = 120.0  # for importing a user's function
MAX_WORKERS = 16
MEMORY_BYTES = 4 * 2**30  # per worker, for the built-in graders
BUILT_IN = ("math", "reasoning_gym")
TIME_LIMIT, DIED = "time limit", "worker died"
_PR_SET_PDEATHSIG = 1
_START = "import json, sys; job = json.loads(sys.argv[1]); sys.path[:] = job.pop('path')\n"
_START += "from jaxlora.rl.pool import serve; serve(**job)"


class Pool:
    """Workers for one grader. Runs one batch at a time; safe to call from any thread.

    Args:
      name: `math`, `reasoning_gym`, or `module:function`.
      workers: at most this many; None: one per core.
    """

    def __init__(self, name: str, time_limit_s: float, workers: int | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = workers or min(MAX_WORKERS, max(2, cores))
        self._settings = {"name": name, "time_limit_s": time_limit_s, "workers": count}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Pool:
        with self._lock:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of every job, in order.

        Raises:
          UserError: the grader cannot be loaded.
          MachineError: the server was killed twice.
        """
        if not jobs:
            return []
        line = json.dumps(list(jobs), default=str).encode() + b"\n"
        with self._lock:
            try:
                for last in (False, True):
                    self._start()
                    try:
                        answer = self._ask(line)
                        break
                    except (OSError, EOFError):
                        self._stop()
                        if last:
                            raise MachineError("the process that grades answers was killed twice") from None
            except BaseException:  # interrupted midway: a late reply would be taken for the next answer
                self._stop()
                raise
        return [(value, reason) for value, reason in answer]

    def close(self) -> None:
        """End server and workers."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        path = [os.getcwd(), *(entry for entry in sys.path if entry)]
        words = [sys.executable, "-c", _START, json.dumps({"path": path, **self._settings})]
        # A grader that uses JAX itself must not take the accelerator, and one thread per worker is enough.
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        try:
            self._read()
        except EOFError:
            self._stop()
            raise MachineError("the process that grades answers failed to start; see above") from None
        except BaseException:
            self._stop()
            raise

    def _ask(self, line: bytes) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        answer = json.loads(line)
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def _stop(self) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.close()  # the server ends its workers, then itself
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


# --- In the server ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Worker:
    """A forked process, the socket to it, and its current job."""

    pid: int
    socket: socket.socket
    deadline: float
    job: int | None = None  # None: idle
    ready: bool = False


class Stopped(Exception):
    """The parent is gone."""


def serve(name: str, time_limit_s: float, workers: int) -> None:
    """Read lines of jobs and write lines of outcomes until there are no more."""
    # Signals are for the parent: it saves, and closes the pipe when it ends. Unlike SIG_IGN, a no-op handler
    # is not inherited by programs that a grader starts.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    logging.disable(logging.CRITICAL)
    # What graders print must not get in between the answers, and graders have no input.
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    server = Server(name, time_limit_s, workers, requests.fileno(), answers.fileno())

    def write(value: Any) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    try:
        try:
            server.first()
        except UserError as error:
            write(one_line(error))
            return
        write([])
        while line := _read_line(requests):
            try:
                write(server.run(json.loads(line)))
            except UserError as error:
                write(one_line(error))
                return
    except (Stopped, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        server.end()
        os._exit(0)  # nothing that a grader left behind may keep this process alive


class Server:
    """The workers of a server, and which job each has."""

    def __init__(self, name: str, time_limit_s: float, most: int, requests: int, answers: int):
        self.name, self.limit, self.most = name, time_limit_s, most
        self.private = (requests, answers)
        self.score = scorer(name) if name in BUILT_IN else None
        self.workers: list[Worker] = []
        self.select = selectors.DefaultSelector()
        self.select.register(requests, selectors.EVENT_READ)

    def first(self) -> None:
        """Start one worker and wait until it is ready, which shows whether the grader can be loaded."""
        worker = self.fork()
        while not worker.ready:
            self.wait([], {})

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Give every job to a worker; returns once all have an outcome."""
        waiting, outcomes = deque(range(len(jobs))), dict[int, Outcome]()
        while len(outcomes) < len(jobs):
            for worker in [one for one in self.workers if one.ready and one.job is None]:
                if not waiting:
                    break
                worker.job = waiting.popleft()
                worker.deadline = time.monotonic() + self.limit
                with suppress(OSError):  # if it died, its socket will report that next
                    _send(worker.socket, jobs[worker.job])
            starting = sum(not worker.ready for worker in self.workers)
            for _ in range(min(len(waiting) - starting, self.most - len(self.workers))):
                self.fork()
            self.wait(waiting, outcomes)
        return [outcomes[i] for i in range(len(jobs))]

    def wait(self, waiting: Any, outcomes: dict[int, Outcome]) -> None:
        """Collect workers' answers, and kill those that exceed their time limit."""
        busy = [worker for worker in self.workers if not worker.ready or worker.job is not None]
        ahead = min((worker.deadline for worker in busy), default=time.monotonic() + 60) - time.monotonic()
        for key, _ in self.select.select(max(0.0, ahead)):
            if key.data is None:
                raise Stopped  # nothing is sent during a batch, so the pipe has closed
            self.take(key.data, outcomes)
        now = time.monotonic()
        for worker in [one for one in busy if one in self.workers and one.deadline <= now]:
            if not worker.ready:
                raise UserError(f"{self.name} was not imported within {START_SECONDS:g} s")
            if worker.job is not None:
                outcomes[worker.job] = (None, TIME_LIMIT)
                self.kill(worker)

    def take(self, worker: Worker, outcomes: dict[int, Outcome]) -> None:
        """Handle one message from a worker; no message means that it died."""
        message = _receive(worker.socket)
        if message is None:
            if not worker.ready:
                raise UserError(f"{self.name}: the process importing it died")
            if worker.job is not None:
                outcomes[worker.job] = (None, DIED)
            self.kill(worker)
        elif not worker.ready:
            if message:
                raise UserError(message)
            worker.ready = True
        elif worker.job is not None:
            outcomes[worker.job] = (message[0], message[1])
            worker.job = None

    def fork(self) -> Worker:
        """Fork a new worker."""
        ours, theirs = socket.socketpair()
        if (pid := os.fork()) == 0:
            try:
                for other in (ours, *(worker.socket for worker in self.workers)):
                    other.close()
                for descriptor in self.private:
                    os.close(descriptor)
                work(self.name, self.score, theirs)
            finally:
                os._exit(1)
        theirs.close()
        worker = Worker(pid, ours, time.monotonic() + START_SECONDS)
        self.workers.append(worker)
        self.select.register(ours, selectors.EVENT_READ, worker)
        return worker

    def kill(self, worker: Worker) -> None:
        """Kill a worker and everything it started."""
        for end in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                end(worker.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(worker.pid, 0)
        self.select.unregister(worker.socket)
        worker.socket.close()
        self.workers.remove(worker)

    def end(self) -> None:
        """Kill all workers."""
        for worker in list(self.workers):
            self.kill(worker)


# --- In a worker --------------------------------------------------------------------------------------------


def work(name: str, score: Callable[[Job], Any] | None, link: socket.socket) -> None:
    """Score jobs until the socket closes."""
    os.setpgid(0, 0)  # a process group of its own, so that what a grader starts ends with it
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if name in BUILT_IN:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if score is None:
        try:
            score = scorer(name)
        except UserError as error:
            _send(link, one_line(error))
            return
    _send(link, "")
    while (job := _receive(link)) is not None:
        _send(link, outcome(score, job))


def outcome(score: Callable[[Job], Any], job: Mapping[str, Any]) -> Outcome:
    """The score of a job, or a short reason why there is none, whatever the grader does."""
    try:
        value = score(job)
    except BaseException as error:  # also SystemExit and RecursionError
        return None, f"raised {type(error).__name__}"
    try:
        return as_number(value), None
    except ValueError as error:
        return None, str(error)
    except BaseException:  # raised by the value's own methods
        return None, f"returned {type(value).__name__}"


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _send(link: socket.socket, value: Any) -> None:
    content = json.dumps(value).encode()
    link.sendall(len(content).to_bytes(8, "big") + content)


def _receive(link: socket.socket) -> Any:
    """The next message; None at the end."""
    if (head := _exactly(link, 8)) is None or (
        content := _exactly(link, int.from_bytes(head, "big"))
    ) is None:
        return None
    return json.loads(content)


def _exactly(link: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = link.recv(min(1 << 20, size - len(parts)))
        except OSError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


def _read_line(requests: Any) -> bytes:
    """Read a whole line; empty at the end of the pipe. Unbuffered, so that `select` sees unread data."""
    parts = bytearray()
    while not parts.endswith(b"\n"):
        if not (part := requests.read(1 << 20)):
            return b""
        parts += part
    return bytes(parts)
