"""Sums and differences of small numbers: a finite family of problems, each assigned to one split.

    rows = arithmetic("arithmetic:train?digits=2,1")     # What is 47 + 8?

The split of a problem is decided by the problem's hash alone, so the training problems never include a test
problem. Each question is preceded by two solved problems, which are in no split, to show the form of an
answer.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

from jaxlora.runtime.errors import UserError

SOURCE = "arithmetic:"
TEST_PERCENT = 25
SPLITS = ("train", "test")
MOST = 200_000  # problems in a family, at most
_HINT = "write arithmetic:train?digits=2,1 (or test), with 2 to 4 numbers of 1 to 3 digits"


def arithmetic(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The problems of one split with their ids, always in the same order.

    Args:
      path: `arithmetic:SPLIT?digits=N,N,...`, the digits of each number; no partial result is negative.

    Raises:
      UserError: there is no such split or family.
    """
    split, _, options = path.removeprefix(SOURCE).partition("?")
    name, _, digits = options.partition("=")
    parts = digits.split(",")
    if split not in SPLITS or name != "digits" or not 2 <= len(parts) <= 4 or not set(parts) <= set("123"):
        raise UserError(f"{path}: is not a family of problems; {_HINT}")
    family = _family(path, [int(part) for part in parts])
    shown = [next(one for one in family if other not in one[0]) for other in "-+"]
    before = [turn for expression, value in shown for turn in _turns(expression, f"{expression} = {value}.")]
    for expression, value in family:
        if (expression, value) not in shown and (_bucket(expression) < TEST_PERCENT) == (split == "test"):
            asked = [*before, _turns(expression, "")[0]]
            yield expression, {"id": expression, "prompt": asked, "answer": str(value)}


def _turns(expression: str, answer: str) -> list[dict[str, str]]:
    asked = {"role": "user", "content": f"What is {expression}?"}
    return [asked, {"role": "assistant", "content": answer}]


def _family(path: str, digits: list[int]) -> list[tuple[str, int]]:
    """All expressions whose numbers have these digits, shuffled, with their values."""
    ranges = [range(10 ** (n - 1), 10**n) for n in digits]
    size = 2 ** (len(digits) - 1)
    for one in ranges:
        size *= len(one)
    if size > MOST:
        raise UserError(f"{path}: has {size:,} problems, but at most {MOST:,} are allowed; give fewer digits")
    found = []
    for signs in itertools.product("+-", repeat=len(digits) - 1):
        for numbers in itertools.product(*ranges):
            text, value, least = str(numbers[0]), numbers[0], numbers[0]
            for sign, number in zip(signs, numbers[1:], strict=True):
                text += f" {sign} {number}"
                value += number if sign == "+" else -number
                least = min(least, value)
            if least >= 0:
                found.append((text, value))
    random.Random(0).shuffle(found)
    return found


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
