r"""Promises of the answer scores: extraction, the study's strict score, and the numeric score beside it."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data.boxes import extract_boxed
from jaxlora.evals.answers import normalize, numeric_match, read_number, strict_match

# --- Extraction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed {18}", "18"),
        ("\\boxed\n {18}", "18"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{a {b} c}} }", r"\text{a {b} c}"),
        (r"\boxed{ 7 }", " 7 "),
        (r"\boxed{}", ""),
        (r"\boxed{outer \boxed{inner} }", "inner"),
    ],
)
def test_extraction_takes_the_last_box_by_brace_matching(text, payload):
    assert extract_boxed(text) == payload


@pytest.mark.parametrize(
    "text",
    ["", "the answer is 18", r"\boxed 18", r"boxed{18}", r"\boxed{18", r"\boxed{\frac{1}{2}", r"\fbox{18}"],
)
def test_no_complete_box_is_a_failed_extraction(text):
    assert extract_boxed(text) is None


def test_an_unclosed_last_box_fails_and_earlier_boxes_do_not_count():
    assert extract_boxed(r"\boxed{18} and again \boxed{1") is None


# --- Normalisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("  18 ", "18"),
        ("$18$", "18"),
        (r"\(18\)", "18"),
        (r"\[ 18 \]", "18"),
        ("$$18$$", "$18$"),  # one pair only
        ("$", "$"),
        (r"\left( 1,  2 \right)", "( 1, 2 )"),
        (r"\tfrac{1}{2}", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        ("a \n\t b", "a b"),
        (r"\$460", r"\$460"),
    ],
)
def test_normalisation_follows_the_study(answer, normalized):
    assert normalize(answer) == normalized


# --- Strict score -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("018", "18"),
        ("+18", "18"),
        ("1.8e1", "18"),
        ("$18$", "18"),
        ("-0.50", "-.5"),
        ("70,000", "70,000"),  # text against text
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        ("3  apples", "3 apples"),
    ],
)
def test_strict_accepts_equal_decimals_and_equal_text(prediction, reference):
    assert strict_match(prediction, reference)
    assert numeric_match(prediction, reference)  # every strict match counts in the numeric score


FORMAT_ONLY = [
    (r"\$460", "460"),
    ("70,000", "70000"),
    (r"50\%", "50"),
    ("70000", "70,000"),
    ("70{,}000", "70000"),
    (r"70\,000", "70000"),
    (r"1{,}234{,}567.5", "1234567.5"),
    (r"\$1,234.50", "1234.5"),
    (r"-\$5", "-5"),
    ("\u22125", "-5"),
    ("$460", "460"),
    ("460$", "460"),
    ("50%", "50"),
    (r"18\text{ dollars}", "18"),
    (r"18 \text{ dollars}", "18"),
    (r"\text{Total: } 18", "18"),
    (r"\text{18 dollars}", "18"),
    (r"18 \, \text{m}^2", "18"),
    (r"18\mathrm{cm}^{3}", "18"),
    ("18 dollars", "18"),
    ("18 dollars.", "18"),
    ("18 km/h", "18"),
    ("18 m", "18"),
    (r"18^\circ", "18"),
    (r"18^{\circ}\text{C}", "18"),
    (r"18 \frac{\text{miles}}{\text{hour}}", "18"),
    ("18.", "18"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{1}{2}", ".50"),
    (r"\frac12", "0.5"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"\frac{-1}{2}", "-1/2"),
    ("1/2", "0.5"),
    (r"\frac{1}{-2}", "-0.5"),
    ("10/4 cups", "2.5"),
    ("2 1/2", "2.5"),
    (r"2\frac{1}{2}", "5/2"),
    (r"-2\frac{1}{2} \text{ hours}", "-2.5"),
    (r"\frac{1,000}{4}", "250"),
    ("{18}", "{18}"),
]


@pytest.mark.parametrize(("prediction", "reference"), FORMAT_ONLY)
def test_numeric_accepts_the_same_number_in_another_format(prediction, reference):
    assert numeric_match(prediction, reference)
    assert numeric_match(reference, prediction)


@pytest.mark.parametrize(
    ("prediction", "reference"), [(r"\$460", "460"), ("70,000", "70000"), (r"50\%", "50")]
)
def test_strict_keeps_format_differences_wrong(prediction, reference):
    assert not strict_match(prediction, reference)


# --- Numeric score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("19", "18"),
        ("", "18"),
        ("   ", "18"),
        (r"\text{}", "18"),
        (r"\$", "18"),
        ("1,2", "12"),  # a list, not a separator
        ("1,2345", "12345"),
        ("12,34", "1234"),
        ("18, 19", "18"),
        ("18 19", "18"),
        ("1 8", "18"),
        ("5%5", "55"),
        ("18-1", "18"),
        ("18 + x", "18"),
        ("5x", "5"),
        ("x = 5", "5"),
        ("5k", "5"),
        (r"5\pi", "5"),
        ("5 million", "5"),
        (r"5 \text{ million}", "5"),
        ("5 and a half", "5"),
        ("5^2", "5"),
        ("5^2", "25"),
        (r"5\text{ squared}", "5"),
        ("5!", "5"),
        ("5:30", "5"),
        (r"\frac{1}{0}", "0"),
        ("1/2/3", "1/2"),
        ("2 3/2", "3.5"),
        (r"\frac{1}{2}3", "1/23"),
        (r"\frac{1+2}{3}", "1"),
        ("5/", "5"),
        ("--5", "5"),
        ("five", "5"),
        ("0x10", "16"),
        ("(18)", "-18"),
        ("0.5", r"50\%"),
    ],
)
def test_numeric_rejects_what_is_not_the_same_number(prediction, reference):
    assert not numeric_match(prediction, reference)
    assert not numeric_match(reference, prediction)


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "nan",
        "-nan",
        "sNaN",
        "inf",
        "-Infinity",
        "1e999",
        "-1e400",
        "1e99999999999",
        "9" * 400,
        "",
        " ",
        "$$",
    ],
)
def test_a_non_number_equals_nothing_not_even_itself(text):
    for score in (strict_match, numeric_match):
        assert not score(text, text)
        assert not score(text, "18")
        assert not score("18", text)


def test_a_decimal_too_small_for_a_float_is_still_exact():
    assert not numeric_match("0", "1e-400")
    assert not numeric_match("9007199254740993", "9007199254740992")


# --- Nothing hangs, nothing raises --------------------------------------------------------------------------

FRAGMENTS = [
    *(
        "\\boxed{",
        "\\boxed",
        "{",
        "}",
        "$",
        "\\$",
        "%",
        "\\%",
        ",",
        "{,}",
        "\\,",
        "\\!",
        ".",
        "-",
        "+",
        "/",
        "^",
    ),
    *(
        "\\frac",
        "\\text{",
        "\\left",
        "\\right",
        "\\(",
        "\\)",
        " ",
        "\n",
        "1",
        "23",
        "000",
        "e",
        "E9",
        "nan",
        "inf",
    ),
    *("x", "m", "cm", "million", "\x00", "\u0663", "²", "½", "_", "1e999999999", "9" * 50),
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=25).map("".join))
def test_any_text_is_scored_without_an_exception(text):
    extract_boxed(text)
    number = read_number(text)
    assert number is None or isinstance(number, Fraction)
    for reference in ("18", "1,000", text):
        assert numeric_match(text, reference) >= strict_match(text, reference)
        assert strict_match(text, reference) == strict_match(reference, text)
        assert numeric_match(text, reference) == numeric_match(reference, text)


@settings(max_examples=150, deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3))
def test_every_way_to_write_a_number_reads_as_that_number(number):
    exact = Fraction(number)
    sign = "-" if number < 0 else ""
    grouped = f"{abs(number):,}"
    for text in (
        f"{number}",
        f"{sign}{grouped}",
        f"{sign}\\${grouped}",
        f"{sign}{grouped.replace(',', '{,}')}\\%",
        f"{sign}{grouped.replace(',', chr(92) + ',')}\\text{{ units}}",
        f"$\\frac{{{number * 7}}}{{7}}$",
    ):
        assert read_number(text) == exact, text
        assert numeric_match(text, str(Decimal(number)))
    assert not numeric_match(str(number), str(number + 1))


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "\\boxed " * 30_000,
        "\\boxed" + " " * 100_000,
        "\\boxed{" * 30_000,
        "1" * 100_000,
        "1," * 140,
        "1 " * 140,
        "1" + "aa-" * 95,
        "\\frac{" * 50,
        "5" + "\\text{m}" * 30 + "!",
        "1e99999999",
    ],
)
def test_hostile_text_takes_no_time(text):
    start = time.perf_counter()
    extract_boxed(text)
    numeric_match(text, "18")
    numeric_match(text, text)
    assert time.perf_counter() - start < 1.0


# --- Against an independent reader --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [r"\$460", "70,000", "70{,}000", r"\frac{1}{2}", r"18\text{ dollars}", "-3.25"]
)
def test_math_verify_agrees_on_plain_numbers(answer):
    math_verify = pytest.importorskip("math_verify")
    number = read_number(answer)
    gold = math_verify.parse(f"${number}$", parsing_timeout=None)
    parsed = math_verify.parse(f"$\\boxed{{{answer}}}$", parsing_timeout=None)
    assert math_verify.verify(gold, parsed, timeout_seconds=None)


def test_every_gsm8k_reference_is_a_number_and_matches_itself(shared: Path):
    for split in ("train", "test"):
        with open(shared / "data" / "gsm8k" / f"{split}.jsonl", encoding="utf-8") as rows:
            for row in rows:
                reference = json.loads(row)["answer"].rsplit("####", 1)[1].strip()
                assert strict_match(reference, reference)
                assert read_number(reference) == Fraction(reference.replace(",", ""))
