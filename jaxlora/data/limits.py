"""Bounds on the processor time and memory of code that came with a model, such as a chat template.

    with bounded(seconds=10, memory=2**30):
        text = template.render(...)

Jinja's sandbox keeps a template from reaching Python, but not from looping or from growing a text for ever.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/proc/self/statm")  # its first number: pages of address space


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Raise `TimeoutError` after so much processor time, `MemoryError` at so many more bytes.

    Signals reach the main thread only: in another one, nothing is bounded. Memory is bounded on Linux.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    # Not SIGPROF: the TPU runtime sends that one to itself, a hundred times a second. And again and again,
    # because Jinja's optimizer drops the first.
    handler = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if _MEMORY.exists() and soft == resource.RLIM_INFINITY:
        used = int(_MEMORY.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, handler)
