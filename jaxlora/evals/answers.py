r"""Compare an answer with the reference, in two ways.

    strict_match(r"\$460", "460")                 # False: the study's score compares decimals or text
    numeric_match(r"\$460", "460")                # True: the same number in another format

The strict score is the study's and decides every result. The numeric score is reported next to it and shows
how much of a difference is only a matter of format. Both are pure functions of two short strings; they use
exact arithmetic, never evaluate their input, and take time linear in its length.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

_OUTER_MATH = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def normalize(answer: str) -> str:
    r"""The study's normal form of an answer.

    Strip; drop one pair of outer math delimiters; delete `\left` and `\right`; rewrite `\tfrac` and `\dfrac`
    to `\frac`; collapse white space.
    """
    answer = answer.strip()
    for opening, closing in _OUTER_MATH:
        if (
            len(answer) >= len(opening) + len(closing)
            and answer.startswith(opening)
            and answer.endswith(closing)
        ):
            answer = answer[len(opening) : -len(closing)]
            break
    answer = answer.replace(r"\left", "").replace(r"\right", "")
    answer = answer.replace(r"\tfrac", r"\frac").replace(r"\dfrac", r"\frac")
    return " ".join(answer.split())


def strict_match(prediction: str, reference: str) -> bool:
    """The study's score: equality as decimals if both sides are decimals, else as normalised text.

    Python's `Decimal` determines what a decimal is. NaN, infinities, numbers too large for a float and empty
    text equal nothing, not even themselves.
    """
    prediction, reference = normalize(prediction), normalize(reference)
    if _is_non_number(prediction) or _is_non_number(reference):
        return False
    left, right = _decimal(prediction), _decimal(reference)
    if left is not None and right is not None:
        return left == right
    return prediction == reference


def numeric_match(prediction: str, reference: str) -> bool:
    """Every strict match, plus equal numbers after dropping currency, percent signs, separators and units."""
    if strict_match(prediction, reference):
        return True
    left, right = read_number(prediction), read_number(reference)
    return left is not None and left == right


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def _is_non_number(normalized: str) -> bool:
    number = _decimal(normalized)
    if not normalized or (number is not None and not number.is_finite()):
        return True
    try:
        return math.isinf(float(normalized))
    except ValueError:
        return False  # ordinary text, compared as text


# --- Reading a number ---------------------------------------------------------------------------------------

_MAX_LENGTH = 300  # longer than any answer; the bound keeps the exact arithmetic small
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DROPPED = "\x00"  # marks a dropped \text{...}: `5\text{ m}^2` has a unit, it is not 5 squared

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_VALUE = re.compile(
    r"(?P<sign>[+-]?)\s*"
    rf"(?:(?:(?P<whole>{_INTEGER})\s+)?(?P<top>{_NUMBER})\s*/\s*(?P<bottom>[+-]?{_NUMBER})"
    rf"|(?P<decimal>{_NUMBER}(?:[eE][+-]?[0-9]{{1,3}})?))"
)

# Words that change the value or join two values: a number followed by one of them is a different number.
_NOT_UNITS = re.compile(
    "hundreds?|thousands?|millions?|billions?|trillions?|half|halves|thirds?|fourths|fifths?|sixths?|eighths?"
    "|tenths?|hundredths?|squared|cubed|and|or|plus|minus|nan|inf|infinity",
    re.IGNORECASE,
)
_ONE_LETTER_UNITS = frozenset("mglLhsCF")  # `5 m` is a length; `5x`, `5k` and `5i` are not the number 5


def read_number(answer: str) -> Fraction | None:
    r"""The single number that an answer states, exactly; None if there is none.

    Reads decimals, `a/b`, `\frac{a}{b}` and mixed numbers. Drops `$`, `\$`, `%`, well-formed thousands
    separators (`,`, `{,}`, `\,`), `\text{...}` and units after the number. If anything else is left over (a
    second number, an operator, a variable, a magnitude such as "million"), the answer is not a number.
    """
    if len(answer) > _MAX_LENGTH:
        return None
    text = _without_decoration(normalize(answer))
    value = _VALUE.match(text)
    if value is None or not _is_unit(text[value.end() :]):
        return None
    if value["decimal"]:
        number = _exact(value["decimal"])
    else:
        bottom = _exact(value["bottom"])
        if bottom == 0:
            return None
        number = _exact(value["top"]) / bottom
        if value["whole"]:
            if not 0 <= number < 1:
                return None  # `2 3/2` is not a mixed number
            number += _exact(value["whole"])
    try:
        float(number)
    except OverflowError:
        return None
    return -number if value["sign"] == "-" else number


def _exact(number: str) -> Fraction:
    return Fraction(Decimal(number.replace(",", "")))


def _without_decoration(text: str) -> str:
    """Rewrite an answer as `number unit`, with fractions as `a/b` and thousands separators as commas."""
    if whole := _TEXT.fullmatch(text):
        text = whole[1]  # it is all text, as in \text{3 hours}
    text = text.replace("\u2212", "-").replace("\xa0", " ")
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\,|,?\\!)(?=[0-9]{3}(?![0-9]))", ",", text)
    text = re.sub(r"\\[,;:! ]|~|\\?[$%]", " ", text)
    text = _TEXT.sub(lambda part: f" {part[1]} " if _carries_value(part[1]) else _DROPPED, text)
    text = re.sub(r"\\frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|([0-9])\s*([0-9]))", r" \1\3/\2\4 ", text)
    return text.strip(" " + _DROPPED)


def _is_unit(rest: str) -> bool:
    """Whether what follows a number is empty, or consists of words and signs that only name its unit."""
    rest = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\circ|\\degree", "°", rest)
    rest = re.sub(rf"(?<=[^\W\d_]|{_DROPPED})\s*\^\s*(?:\{{-?[0-9]\}}|-?[0-9])", "", rest)  # the 2 of cm^2
    if not rest.strip(" ."):
        return True
    if re.search(rf"[^\w\s/.°¢{_DROPPED}-]|[\d_]", rest) or not re.search(rf"[^\W\d_]|[°¢{_DROPPED}]", rest):
        return False
    return all(
        not _NOT_UNITS.fullmatch(word) and (len(word) > 1 or word in _ONE_LETTER_UNITS)
        for word in _words(rest)
    )


def _carries_value(text: str) -> bool:
    return bool(re.search(r"\d", text)) or any(_NOT_UNITS.fullmatch(word) for word in _words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)
