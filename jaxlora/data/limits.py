"""Bounds on the processor time and memory of code that came with a model, such as a chat template.

    with bounded(seconds=10, memory=2**30):
        text = template.render(...)

Jinja's sandbox keeps a template from reaching Python, but not from looping or from growing a text for ever.
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

_MEMORY = Path("/proc/self/statm")  # its first number: pages of address space
_EVERY = 0.1  # seconds between reminders: Jinja's optimizer drops the first
# The memory limit belongs to the process, so two threads must not set and restore it across each other.
_one_at_a_time = threading.RLock()


class _Late(TimeoutError):
    """The time is over. A class without arguments: that is all that can be sent to another thread."""


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Raise `TimeoutError` after so much processor time, `MemoryError` at so many more bytes.

    Works in every thread; one block runs at a time. Outside the main thread the time is the thread's own.
    Memory is bounded on Linux, for the whole process, and a stricter limit of the shell (`ulimit -v`) stays.
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

    # Not SIGPROF: the TPU runtime sends that one to itself, a hundred times a second.
    handler = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _EVERY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


@contextmanager
def _by_watcher(seconds: float) -> Iterator[None]:
    """For the other threads, which no signal reaches: one more thread watches the clock and interrupts."""
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
        finally:  # again, because the interruption may strike just there; the next one is far away
            finished.set()
            with lock:
                _send(thread, None)  # one that was sent and has not arrived must not strike later


def _processor_clock(thread: int) -> Callable[[], float]:
    """Seconds of processor time of a thread; of the wall where the system does not tell."""
    if sys.platform != "linux":
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def _send(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in a thread at its next Python instruction; None takes a waiting one back."""
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
