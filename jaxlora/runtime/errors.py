"""Errors that a user can act on, and the single place where they become an exit code.

raise UserError("lora.rank is 0; it must be at least 1")    # -> "error: lora.rank is 0; ...", exit code 2
add_number(parser, "--steps", default=24)                   # --steps 0 gives such a line, in any tool
"""

from __future__ import annotations

import argparse
import errno
import math
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from jaxlora.runtime.text import harmless, without_secrets

LONGEST = 1000  # characters of the line shown to the user
# An unusable path is the user's mistake; other disk errors may be temporary.
_PATH_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
_PATH_ERRORS |= {errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY}


class UserError(Exception):
    """A mistake in the user's input: one line that names it and says what to do. Exit code 2."""

    exit_code = 2


class MachineError(Exception):
    """A failure outside the program, such as of another host, in one line. Exit code 1: try again."""

    exit_code = 1


# Called with message and exit code before a failed process ends (hosts.py uses it to tell the other hosts).
on_failure: list[Callable[[str, int], None]] = []


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; print a `UserError` or `MachineError` as one line on stderr and exit.

    Any other error ends the process as in plain Python, but its traceback is printed without keys and tokens,
    since the log may end up in a bucket or a public issue. The same applies to errors in threads.
    """
    sys.excepthook = _print_traceback
    threading.excepthook = lambda failed: _print_traceback(*failed[:3])
    try:
        code = _path_errors(main)
    except (UserError, MachineError) as error:
        message = one_line(error)
        print(f"error: {message}", file=sys.stderr)
        _failed(message, error.exit_code)
        raise SystemExit(error.exit_code) from None
    except (Exception, KeyboardInterrupt) as error:
        if on_failure:
            _print_traceback(type(error), error, error.__traceback__)
            _failed(f"{type(error).__name__}: {one_line(error)}", 1)
        raise
    raise SystemExit(code or 0)


def add_number(
    parser: argparse.ArgumentParser,
    option: str,
    kind: type[int] | type[float] = int,
    *,
    zero: bool = False,
    most: float = 2**31 - 1,
    **settings: Any,
) -> None:
    """Add an option whose value is a number above zero, or at least zero with `zero`, and at most `most`.

    The default is not checked. Any other value is a `UserError` when the command line is parsed.
    """

    def number(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 < value <= most or (zero and value == 0)):
            what = "whole number" if kind is int else "number"
            limit = f"<= {most:,}" if value > most else ">= 0" if zero else "> 0"
            raise UserError(f"{option}: {text!r} is not allowed; give a {what} {limit}")
        return value

    parser.add_argument(option, type=number, **settings)


def one_line(error: BaseException) -> str:
    """The error's text as one short line without control characters, keys or tokens."""
    text = " ".join(without_secrets(str(error)).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 4]} ..."


def _print_traceback(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """Print a traceback like Python, but without secrets and terminal escapes."""
    if kind is not SystemExit:  # in a thread: it ends quietly
        text = "".join(traceback.format_exception(kind, error, trace))
        print(harmless(without_secrets(text)), file=sys.stderr, end="", flush=True)


def _path_errors(main: Callable[[], int | None]) -> int | None:
    try:
        return main()
    except OSError as error:
        if error.filename is None or error.errno not in _PATH_ERRORS:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from None


def _failed(message: str, exit_code: int) -> None:
    for call in on_failure:
        call(message, exit_code)
