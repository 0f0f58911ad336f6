r"""Rules to extract and compare answers for files that are not in GSM8K's form: `eval.rule`.

    rule = rule_named("last_number")          # boxed | last_number | exact | regex:PATTERN
    rule.found("so 3 + 4 = 7.")               # "7"; None: no answer
    rule.right("7", "7.0")                    # True

A reference is read by the same rule if it contains what the rule looks for (`#### 7`, `\boxed{7}`), and is
otherwise used whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from jaxlora.data.boxes import extract_boxed
from jaxlora.data.limits import bounded
from jaxlora.evals.answers import numeric_match, read_number, strict_match
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import say

SECONDS, MEMORY = 1.0, 2**30  # limits of CPU time and bytes for a search in one answer
NAMES = ("boxed", "last_number", "exact", "regex:PATTERN")
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:\s*/\s*\d+(?:\.\d+)?)?"
)


@dataclass(frozen=True)
class Rule:
    """How to extract a prediction from an answer, and when it is right."""

    name: str
    found: Callable[[str], str | None]
    right: Callable[[str, str], bool] = strict_match

    def reference(self, answer: str) -> str:
        """The reference, extracted from the file's answer."""
        marked = answer.rsplit("####", 1)[-1] if self.name in ("boxed", "last_number") else answer
        return (self.found(marked) or marked).strip()


def rule_named(name: str) -> Rule:
    """The rule with this name.

    Raises:
      UserError: there is none, or its pattern is not a regular expression.
    """
    if name == "boxed":
        return Rule(name, extract_boxed)
    if name == "last_number":
        return Rule(name, last_number, numeric_match)
    if name == "exact":
        return Rule(name, lambda text: text.strip() or None, _same_words)
    if name.startswith("regex:") and name != "regex:":
        try:
            pattern = re.compile(name.removeprefix("regex:"), re.MULTILINE)
        except re.error as error:
            raise UserError(f"config.eval.rule: {name!r:.100} is not a regular expression: {error}") from None
        return Rule(name, lambda text: _last_match(pattern, text))
    raise UserError(f"config.eval.rule: {name!r:.80} is not known; give one of {', '.join(NAMES)}")


def last_number(text: str) -> str | None:
    """The last number in a text, including its sign, separators, and a fraction's denominator."""
    numbers = [match.group() for match in _NUMBER.finditer(text) if read_number(match.group()) is not None]
    return numbers[-1] if numbers else None


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last non-empty match, or its first group if the pattern has groups.

    A pattern such as `(a+)+$` may search for years; if it takes too long on an answer, a message says so and
    no answer is found.
    """
    try:
        with bounded(SECONDS, MEMORY):
            found = [match.group(1 if pattern.groups else 0) for match in pattern.finditer(text)]
    except (TimeoutError, MemoryError):
        say(f"regex:{pattern.pattern:.80} took more than {SECONDS:g} s: no answer is found in {text!r:.60}")
        return None
    return next((text for text in reversed(found) if text), None)


def _same_words(given: str, right: str) -> bool:
    return given.split() == right.split()
