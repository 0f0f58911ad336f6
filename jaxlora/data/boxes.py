r"""Find the last `\boxed{...}` of a solution by either of the study's two rules.

    last_box(r"\boxed{1} or \boxed{\frac{1}{2}}")   # r"\frac{1}{2}"
    extract_boxed(r"so \boxed {4}")                 # "4"; last_box finds none here

The dataset's acceptance gate looks for the literal `\boxed{`; scoring also allows white space before the
brace. Otherwise the two agree: the last opening counts, braces are matched, and if that box is never closed
there is no answer, whatever came before it.
"""

from __future__ import annotations

import re

_LITERAL = "\\boxed{"
_SPACED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"[{}]")


def last_box(text: str) -> str | None:
    r"""The content of the last literal `\boxed{`, or None if there is none or it is unclosed."""
    start = text.rfind(_LITERAL)
    return None if start < 0 else _up_to_closing_brace(text, start + len(_LITERAL))


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{`, allowing white space before the brace; None as in `last_box`."""
    start = None
    for match in _SPACED.finditer(text):
        start = match.end()
    return None if start is None else _up_to_closing_brace(text, start)


def _up_to_closing_brace(text: str, start: int) -> str | None:
    """The text from `start`, just after an opening brace, up to the brace that closes it."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return None
