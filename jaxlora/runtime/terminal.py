r"""Text from files and from models, made harmless for a terminal.

    harmless("red \x1b[31m and \u202eback")     # "red \\x1b[31m and \\u202eback", as visible characters

An escape sequence can recolour a screen, retitle a window or overwrite what was printed before it, and a
bidirectional override shows letters in another order than they stand in. Both arrive in rows and questions.
"""

from __future__ import annotations

import re

# Control characters except newline and tab, surrogates, and marks that reorder or hide text. A zero-width
# joiner stays: emoji are made with it.
_DANGEROUS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def harmless(text: str) -> str:
    r"""The text with everything that a terminal would obey instead of show written as an escape (`\x1b`).

    Newlines and tabs are kept. The result can be encoded as UTF-8.
    """
    return _DANGEROUS.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)
