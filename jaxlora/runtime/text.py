r"""Sanitise text before it is shown or written: remove keys and tokens, and escape terminal codes.

    without_secrets("logging in with hf_AbCd...")     # "logging in with <secret>"
    harmless("red \x1b[31m and \u202eback")         # "red \\x1b[31m and \\u202eback", as visible characters

Secrets are values of environment variables with telling names (`HF_TOKEN`, `TINKER_API_KEY`,
`AWS_SECRET_ACCESS_KEY`), text in the form of well-known tokens, and the password and query of an address. An
escape sequence can recolour a screen, retitle a window or overwrite earlier output, and a bidirectional
override changes the displayed order of letters. Both occur in rows and questions.
"""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|ACCESS_KEY_ID|PRIVATE_KEY)$", re.IGNORECASE)
_SHORTEST = 8  # a shorter value could occur in ordinary text
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|tml-[A-Za-z0-9_-]{16,}|gh[opsu]_[A-Za-z0-9]{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|ya29\.[A-Za-z0-9_-]{20,}|sk-[A-Za-z0-9_-]{20,})"
)
_PASSWORD = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_QUERY = re.compile(r"(?<=://)([^\s?'\"]+\?)[^\s'\"]+")
# Control characters except newline and tab, surrogates, and marks that reorder or hide text. The zero-width
# joiner is kept: emoji use it.
_DANGEROUS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def without_secrets(text: str) -> str:
    """The text with each secret replaced by the `<NAME>` of its variable, or by `<secret>`."""
    for name, value in _secret_variables():
        text = text.replace(value, f"<{name}>")
    text = _PASSWORD.sub("<secret>", _TOKENS.sub("<secret>", text))
    return _QUERY.sub(r"\1<secret>", text)


def holds_secret(text: str) -> bool:
    """Whether the text contains a key or a token."""
    return without_secrets(text) != text


def _secret_variables() -> list[tuple[str, str]]:
    """Name and value of each secret in the environment, longest first, as one may be part of another."""
    found = [(k, v) for k, v in os.environ.items() if _NAMES.search(k) and len(v) >= _SHORTEST]
    return sorted(found, key=lambda pair: -len(pair[1]))


def harmless(text: str) -> str:
    r"""The text with everything that a terminal would act on, not display, written as an escape (`\x1b`).

    Newlines and tabs are kept. The result can be encoded as UTF-8.
    """
    return _DANGEROUS.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)
