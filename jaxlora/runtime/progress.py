"""Progress bars and messages on the terminal, all through one rich console on standard error.

with progress_bar("loading", total=399, unit="tensors") as advance:
    advance(1)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_WIDTH = 140  # columns of a file or a pipe, which has none of its own: tables stay whole


def make_console(stderr: bool) -> Console:
    """A console as wide as its terminal, or `COLUMNS`, or `LOG_WIDTH` where there is neither."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else LOG_WIDTH
    return Console(stderr=stderr, highlight=False, width=width)


console = make_console(stderr=True)


@contextmanager
def progress_bar(title: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar that disappears when the work is done; yields a function that advances it. No total: a count."""
    columns = (
        TextColumn("{task.description}", markup=False),  # names of files may look like markup
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda n: progress.advance(task, n)
