"""Progress bars and messages on the terminal, all through a single rich console on standard error.

with progress_bar("loading", total=399, unit="tensors") as advance:
    advance(1)

In a file or a pipe, where nothing can be redrawn, timestamped lines replace the bar, at most one every
`EVERY` seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between progress lines without a terminal
LOG_WIDTH = 140  # columns assumed for a file or a pipe, so that tables fit


def make_console(stderr: bool) -> Console:
    """A console as wide as its terminal, or `COLUMNS`, or `LOG_WIDTH` if there is neither."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else LOG_WIDTH
    return Console(stderr=stderr, highlight=False, width=width)


console = make_console(stderr=True)


class Heartbeat:
    """Tells when the next progress line is due: `EVERY` seconds after the start or the last line."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether a line is due; if so, the next one is due `EVERY` seconds from now."""
        now = time.monotonic()
        if now - self._last < EVERY:
            return False
        self._last = now
        return True


def say(text: str) -> None:
    """Print a progress message; without a terminal, with the time."""
    if not console.is_terminal:
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(title: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar that disappears when done; yields a function that advances it. Without a total, it counts."""
    if not console.is_terminal:
        yield _lines(title, total, unit)
        return
    columns = (
        TextColumn("{task.description}", markup=False),  # file names may look like markup
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda n: progress.advance(task, n)


def _lines(title: str, total: int | None, unit: str) -> Callable[[int], None]:
    """The function that advances a bar that cannot be drawn."""
    heartbeat, done = Heartbeat(), 0
    of_all = "" if total is None else f" of {total:,}"

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if heartbeat.due():
            say(f"{title}: {done:,}{of_all} {unit}")

    return advance
