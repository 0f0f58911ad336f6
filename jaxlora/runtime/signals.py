"""Being asked to stop: SIGTERM, as before a spot machine is taken away, and Ctrl-C.

    with stop_signals() as stop:
        load()                       # a signal here ends the process at once: there is nothing to save
        with stop.saving(25.0) as begin:
            begin()                  # from here on the caller looks at `stop.signum`, and saves
            ...

The exit code is 75 after SIGTERM and 130 after Ctrl-C. A signal is seen even while the main thread compiles a
program: the system writes its number into a pipe, and a thread waits on the other end. When the grace after a
SIGTERM is over, or Ctrl-C comes a second time, the process ends wherever it is; every file that it writes is
published whole or not at all, so that this is as harmless as a kill.
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


class Interrupted(Exception):
    """Training was asked to stop and has saved; `signum` says by what, `exit_code` is for the process."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}; the same command resumes")
        self.signum = signum
        self.exit_code = _CODES[signum]


class Stop:
    """What has been asked so far, and what a further signal would do."""

    def __init__(self) -> None:
        self.signum: int | None = None  # the first signal
        self._grace: float | None = None  # None: nothing to save, a signal ends the process at once
        self._timer: threading.Timer | None = None

    @contextmanager
    def saving(self, grace_seconds: float) -> Iterator[Callable[[], None]]:
        """Yields `begin`: from its first call to the end of the block, a signal only sets `signum`, and after
        a SIGTERM the process has `grace_seconds` to end."""

        def begin() -> None:
            self._grace = grace_seconds

        try:
            yield begin
        finally:
            self._grace = None
            if self._timer is not None:
                self._timer.cancel()
        if self.signum is not None:  # it came after the last look
            self._leave("stopped; the same command goes on from here")

    def received(self, signum: int) -> None:
        """Act on a signal; called on a thread of its own."""
        again, self.signum = self.signum is not None, self.signum or signum
        if self._grace is None:
            self._leave("stopped; nothing was lost, and the same command goes on")
        if again and signum == signal.SIGINT:
            self._leave("stopped at once; the same command resumes from the last checkpoint")
        if not again:
            _say("stopping after this step; the run is saved and resumes with the same command")
        if signum == signal.SIGTERM and self._timer is None:
            self._timer = threading.Timer(self._grace, self._late, [self._grace])
            self._timer.daemon = True
            self._timer.start()

    def _late(self, grace: float) -> None:
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
def stop_signals() -> Iterator[Stop]:
    """Take over SIGTERM and Ctrl-C. Call it on the main thread."""
    stop = Stop()
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
        yield stop
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
