"""Progress bars and messages on the terminal, all through one rich console on standard error.

with progress_bar("loading", total=399, unit="tensors") as advance:
    advance(1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


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
