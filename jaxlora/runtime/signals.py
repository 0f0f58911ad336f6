"""Requests to stop: SIGTERM, as sent before a spot machine is preempted, and Ctrl-C.

    with stop_signals() as stop:
        load()                       # a signal here ends the process at once: nothing to save yet
        with stop.saving(25.0) as begin:
            begin()                  # from here on the caller polls `stop.signum`, and saves
            ...

The exit code is 75 after SIGTERM and 130 after Ctrl-C. A signal is noticed even while the main thread
compiles a program: its number is written into a pipe, and a thread waits on the other end. When the grace
period after a SIGTERM is over, or on a second Ctrl-C, the process ends wherever it is; every file is
published completely or not at all, so this is as harmless as a kill.

This is for a process of our own. When called from a user's notebook or program (`ends_process=False`), only
the first signal while there is something to save is handled; any other has its previous effect. Python
delivers signals only to the main thread: elsewhere none is handled, and a caller may set `signum` on its own
`Stop`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from jaxlora.runtime.errors import on_failure

PREEMPTED = 75  # stopped by SIGTERM: start the same command again
INTERRUPTED = 130  # stopped by Ctrl-C
_CODES: dict[int, int] = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}
_STOPPING = "stopping after this step; the run is saved and resumes with the same command"


class Interrupted(Exception):
    """Training was stopped by signal `signum` and has saved; `exit_code` is for the process."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}; the same command resumes")
        self.signum = signum
        self.exit_code = _CODES[signum]


class Stop:
    """The requests so far, and the effect of a further signal."""

    def __init__(self, ends_process: bool = False) -> None:
        self.signum: int | None = None  # the first signal
        self._ends_process = ends_process
        self._grace: float | None = None  # None: nothing to save, so a signal ends the process at once
        self._timer: threading.Timer | None = None

    @contextmanager
    def saving(self, grace_seconds: float) -> Iterator[Callable[[], None]]:
        """Yield `begin`: from its first call to the end of the block, a signal only sets `signum`, and after
        a SIGTERM the process has `grace_seconds` to end."""
        ends = False

        def begin() -> None:
            self._grace = grace_seconds

        try:
            yield begin
        except Interrupted:
            ends = self._ends_process  # a thread that compiles a program could hold it up beyond its time
            raise
        finally:
            self._grace = None
            if self._timer is not None and not ends:
                self._timer.cancel()
        if self.signum is not None and self._ends_process:  # it came after the last check
            self._leave("stopped; the same command resumes from here")

    def taken(self, signum: int) -> bool:
        """Whether to handle a signal in a process not ours: the first while there is something to save."""
        if self._grace is None or self.signum is not None:
            return False
        self.signum = signum
        _say(_STOPPING)
        return True

    def received(self, signum: int) -> None:
        """Act on a signal; called in a separate thread."""
        again, self.signum = self.signum is not None, self.signum or signum
        if self._grace is None:
            self._leave("stopped; nothing was lost, and the same command resumes")
        if again and signum == signal.SIGINT:
            self._leave("stopped at once; the same command resumes from the last checkpoint")
        if not again:
            _say(_STOPPING)
        if signum == signal.SIGTERM and self._timer is None:
            self._timer = threading.Timer(self._grace, self._late, [self._grace])
            self._timer.daemon = True
            self._timer.start()

    def _late(self, grace: float) -> None:
        if self._grace is None:  # saved, and said so
            sys.stdout.flush()
            os._exit(PREEMPTED)
        self._leave(
            f"stopped {grace:g} s after the signal, before a save was complete;"
            " the same command resumes from the checkpoint before"
        )

    def _leave(self, message: str) -> NoReturn:
        _say(message)
        assert self.signum is not None
        for call in on_failure:
            call(message, _CODES[self.signum])
        os._exit(_CODES[self.signum])


@contextmanager
def stop_signals(ends_process: bool = True) -> Iterator[Stop]:
    """Handle SIGTERM and Ctrl-C; outside the main thread, report that this is impossible.

    Args:
      ends_process: whether we may end the process; see above.
    """
    stop = Stop(ends_process)
    if threading.current_thread() is not threading.main_thread():
        _say("outside the main thread a signal stops at once; only saved work can be resumed")
        yield stop
        return
    with _watched(stop) if ends_process else _shared(stop):
        yield stop


@contextmanager
def _shared(stop: Stop) -> Iterator[None]:
    """Handle the signals that `stop` takes, and leave the others to their previous handlers."""

    def handle(signum: int, _frame: object) -> None:
        if not stop.taken(signum):
            signal.signal(signum, previous[signum] or signal.SIG_DFL)
            signal.raise_signal(signum)

    previous = {signum: signal.signal(signum, handle) for signum in _CODES}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler or signal.SIG_DFL)


@contextmanager
def _watched(stop: Stop) -> Iterator[None]:
    """Pass every signal to `stop` from a thread that runs whatever the main thread is doing."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1)[0]:
            if number in _CODES:
                stop.received(number)

    thread = threading.Thread(target=watch, name="stop signals", daemon=True)
    thread.start()
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {signum: signal.signal(signum, lambda *_: None) for signum in _CODES}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous_writer)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def _say(message: str) -> None:
    # Not through rich: the main thread may hold its lock. Its progress bar hides the cursor.
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"\n{show_cursor}{message}\n".encode())
