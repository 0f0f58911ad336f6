"""Keys and tokens are kept out of everything that is written or printed.

    without_secrets("logging in with hf_AbCd...")     # "logging in with <secret>"

What counts as one: the value of an environment variable whose name says so (`HF_TOKEN`, `TINKER_API_KEY`,
`AWS_SECRET_ACCESS_KEY`), text in the form of a well-known token, and the password and query of an address.
"""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|ACCESS_KEY_ID|PRIVATE_KEY)$", re.IGNORECASE)
_SHORTEST = 8  # a shorter value would be found in ordinary text
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|tml-[A-Za-z0-9_-]{16,}|gh[opsu]_[A-Za-z0-9]{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|ya29\.[A-Za-z0-9_-]{20,}|sk-[A-Za-z0-9_-]{20,})"
)
_PASSWORD = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_QUERY = re.compile(r"(?<=://)([^\s?'\"]+\?)[^\s'\"]+")


def without_secrets(text: str) -> str:
    """The text with each secret replaced by `<NAME>` of its variable, or by `<secret>`."""
    for name, value in _secret_variables():
        text = text.replace(value, f"<{name}>")
    text = _PASSWORD.sub("<secret>", _TOKENS.sub("<secret>", text))
    return _QUERY.sub(r"\1<secret>", text)


def holds_secret(text: str) -> bool:
    """Whether the text holds a key or a token."""
    return without_secrets(text) != text


def _secret_variables() -> list[tuple[str, str]]:
    """Name and value of each secret in the environment, the longest first: one may be part of another."""
    found = [(k, v) for k, v in os.environ.items() if _NAMES.search(k) and len(v) >= _SHORTEST]
    return sorted(found, key=lambda pair: -len(pair[1]))
