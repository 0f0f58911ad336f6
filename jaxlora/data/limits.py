"""Limit the CPU time and memory of code that comes with a model, such as a chat template.

    with bounded(seconds=10, memory=2**30):
        text = template.render(...)

Jinja's sandbox keeps a template from reaching Python, but not from looping or growing a string forever.
"""

from __future__ import annotations

import ctypes
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/proc/self/statm")  # its first number is the address space in pages
_EVERY = 0.1  # seconds between repeated signals, because Jinja's optimizer swallows the first
# The memory limit is per process, so two threads must not interleave setting and restoring it.
_one_at_a_time = threading.RLock()


class _Late(TimeoutError):
    """Time is up. Its constructor takes no arguments, as required of an exception sent to another thread."""


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Raise `TimeoutError` after `seconds` of CPU time, or `MemoryError` after `memory` additional bytes.

    Works in every thread; one block runs at a time. Outside the main thread, the thread's own CPU time
    counts. Memory is limited on Linux only, for the whole process; a stricter shell limit (`ulimit -v`) stays
    in force.
    """
    is_main = threading.current_thread() is threading.main_thread()
    with _one_at_a_time:
        try:
            with _memory_limit(memory), (_by_signal if is_main else _by_watcher)(seconds):
                yield
        except _Late:
            raise TimeoutError(f"it took more than {seconds:g} s") from None


@contextmanager
def _memory_limit(memory: int) -> Iterator[None]:
    if not _MEMORY.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(_MEMORY.read_text().split()[0]) * resource.getpagesize() + memory
    limits = [limit, *(given for given in (soft, hard) if given != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _by_signal(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise _Late

    # Not SIGPROF: the TPU runtime sends itself that signal a hundred times a second.
    handler = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _EVERY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


@contextmanager
def _by_watcher(seconds: float) -> Iterator[None]:
    """For threads other than the main one, which signals do not reach: a watcher thread interrupts them."""
    thread = threading.get_ident()
    used = _processor_clock(thread)
    end = used() + seconds
    finished, lock = threading.Event(), threading.Lock()

    def watch() -> None:
        while not finished.wait(max(_EVERY, min(1.0, (end - used()) / 2))):
            with lock:
                if not finished.is_set() and used() >= end:
                    _send(thread, _Late)

    watcher = threading.Thread(target=watch, name="time limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        try:
            finished.set()
        finally:  # again, in case the interruption strikes right here; the next one is far off
            finished.set()
            with lock:
                _send(thread, None)  # cancel one that was sent but has not arrived yet


def _processor_clock(thread: int) -> Callable[[], float]:
    """A clock of the thread's CPU time in seconds; wall time on systems without one."""
    if sys.platform != "linux":
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def _send(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in a thread at its next Python instruction; None cancels a pending one."""
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
