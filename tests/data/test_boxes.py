r"""The two rules for a boxed answer share their brace matching and give what the study's own loops give."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data import boxes


def by_letter(text: str, start: int) -> str | None:
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


@given(st.lists(st.sampled_from(["\\boxed", "{", "}", " ", "\n", "4", "\\boxed{", "x"]), max_size=30))
def test_both_rules_agree_with_counting_letter_by_letter(pieces):
    text = "".join(pieces)
    literal = text.rfind("\\boxed{")
    assert boxes.last_box(text) == (None if literal < 0 else by_letter(text, literal + len("\\boxed{")))
    ends = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    assert boxes.extract_boxed(text) == (by_letter(text, ends[-1]) if ends else None)


@pytest.mark.parametrize(
    ("text", "literal", "spaced"),
    [
        (r"\boxed{1} then \boxed {2}", "1", "2"),
        (r"\boxed{1} then \boxed{2", None, None),
        (r"\boxed{1} then \boxed {2", "1", None),
        (r"\boxed{a\boxed{b}}", "b", "b"),
        ("nothing", None, None),
    ],
)
def test_where_the_rules_differ(text, literal, spaced):
    assert (boxes.last_box(text), boxes.extract_boxed(text)) == (literal, spaced)
