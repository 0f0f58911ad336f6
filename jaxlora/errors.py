"""Errors that a user can act on, and the one place where they are turned into an exit code.

raise UserError("lora.rank is 0; it must be at least 1")     # -> "error: lora.rank is 0; ...", exit code 2
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave: one line that names it and says what to do. Exit code 2."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; print a `UserError` as one line on stderr and exit with code 2."""
    try:
        code = main()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code or 0)
