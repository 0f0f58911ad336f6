r"""The review page takes time linear in its text, and draws the formulas that a single pattern would find."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from jaxlora.data import mathml
from jaxlora.data.mathml import LONGEST_FORMULA, text_to_html
from jaxlora.data.review import control_token_marker

ENDLESS = [
    r"\[ ",
    r"\( ",
    r"\begin{cases}",
    "$$ ",
    "$a ",
    "$",
    r"\boxed{",
    r"\boxed{{}",
    r"\[\(\begin{align*}$ ",
    r"\begin{align}\begin{cases}\begin{gather}",
]


@pytest.mark.parametrize("piece", ENDLESS)
def test_openings_that_nothing_closes_take_little_time(piece):
    text = piece * (120_000 // len(piece))
    start = time.process_time()
    html = text_to_html(text)
    assert time.process_time() - start < 5  # a search to the end from each opening took a minute
    assert Markup(html).unescape().replace("<code class=tex>", "").replace("</code>", "") == text


def test_a_formula_of_any_length_takes_little_time():
    for text in ("$$" + "x^{" * 900 + "}" * 900 + "$$", "$$" + r"\frac{1}{2}" * 40_000 + "$$"):
        start = time.process_time()
        assert "<code class=tex>" in text_to_html(text)
        assert time.process_time() - start < 5
    assert "<mi>" in text_to_html("$$" + "x" * LONGEST_FORMULA + "$$")


PIECES = ["$", "$$", r"\[", r"\]", r"\(", r"\)", "x", "2", " ", "\n", "{", "}", r"\boxed{", r"\$", "\\"]
PIECES += [r"\begin{cases}", r"\end{cases}", r"\begin{align*}", r"\end{align*}"]


@given(st.lists(st.sampled_from(PIECES), max_size=14))
def test_the_formulas_are_those_of_the_pattern_without_the_memory(pieces):
    """The plain definition: at each place, the first kind of formula that matches."""
    pattern = re.compile(
        r"\$\$[^$]+\$\$|\\\[.+?\\\]|\\\(.+?\\\)"
        r"|\\begin\{(?P<name>cases|align\*)\}.+?\\end\{(?P=name)\}"
        r"|(?<![\\$])\$[^\s$](?:[^$\n]{0,600}?[^\s$\\])?\$(?!\d)"
        r"|\\boxed\{(?:[^{}\n]|\{(?:[^{}\n]|\{[^{}\n]*\})*\})*\}",
        re.DOTALL,
    )
    text = "".join(pieces)
    found = [(formula.start, formula.end) for formula in mathml._formulas(text)]
    assert found == [match.span() for match in pattern.finditer(text)]


def test_marks_of_many_special_tokens_are_made_once():
    mark = control_token_marker([f"<|token {i}|>" for i in range(10_000)])
    start = time.process_time()
    for _ in range(2000):
        page = mark("<b> <|token 7|>\n")
    assert time.process_time() - start < 5
    assert page == "&lt;b&gt; <b class=control>&lt;|token 7|&gt;</b><i class=newline>↵</i>\n"
