"""Errors that a user can act on, and the one place where they are turned into an exit code.

raise UserError("lora.rank is 0; it must be at least 1")     # -> "error: lora.rank is 0; ...", exit code 2
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave: one line that names it and says what to do. Exit code 2."""

    exit_code = 2


class MachineError(Exception):
    """Something around the program failed, such as another host: one line. Exit code 1: try again."""

    exit_code = 1


# Called with the message and the exit code before a failed process ends (jaxlora.hosts tells the others).
on_failure: list[Callable[[str, int], None]] = []


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; print a `UserError` or `MachineError` as one line on stderr and exit."""
    try:
        code = main()
    except (UserError, MachineError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        _failed(message, error.exit_code)
        raise SystemExit(error.exit_code) from None
    except (Exception, KeyboardInterrupt) as error:
        if on_failure:
            traceback.print_exc()
            _failed(" ".join(f"{type(error).__name__}: {error}".split()), 1)
        raise
    raise SystemExit(code or 0)


def _failed(message: str, exit_code: int) -> None:
    for call in on_failure:
        call(message, exit_code)
