"""Find benchmark questions in training rows, even in other turns or embedded in longer text.

    index = QuestionIndex([("gsm8k-0000", question), ...])
    index.find([user_turn, system_text], problem=user_turn)   # [("gsm8k-0000", "contained")] or []

There are three rules; the strictest one that matches is reported:

- `equal`: the study's own. The row's problem and the question are the same canonical text.
- `same_words`: a text of the row equals the question except for case, punctuation and white space.
- `contained`: a text of the row contains the question, ignoring case, punctuation and white space. Only for
  questions of at least `CONTAINED_WORDS` words and `CONTAINED_LETTERS` letters: "What is 2 + 3?" occurs in
  many texts that leak nothing.

In formulas and short questions, punctuation that carries meaning counts: 2 + 3 is not 2 - 3.

A row is not compared with every question: questions are indexed by their rarest word, and a row is normalised
and searched only if it has all words of some question. A million rows take about a minute.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap

from jaxlora.data.curation import problem_key

EQUAL, SAME_WORDS, CONTAINED = LEAK_RULES = ("equal", "same_words", "contained")
CONTAINED_WORDS, CONTAINED_LETTERS = 8, 30
WORDY = 15  # a question with this many different words is recognised by its words alone

# Scripts written without spaces, where each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_LETTERS = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+")
_OPERATOR_MARK = "\x00"  # inserted before each match of `_OPERATOR`
_ASCII_LETTERS = re.compile(r"[a-z]+")
_WORD = re.compile(rf"\d+(?:\.\d+)?|[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|{_OPERATOR_MARK}.")

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]")
_OUTER_PUNCTUATION = re.compile(r"^[\W_]+|[\W_]+$")
_ALPHANUMERIC = re.compile(r"[^\W_]+")
_APOSTROPHES = re.compile("['`\u00b4\u2018\u2019\u02bc]")
_DASHES = re.compile("[\u2010-\u2015\u2212]")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
# An operator has an operand on each side. A hyphen, slash or emphasis mark between words is not one.
_OPERATOR = re.compile(r"(?<=[0-9a-z)\]}$])(\s?)([-+/^=<>]|\*(?!\*))(?=\s?[-(\\{$]*(?:\d|[b-hj-z](?![a-z])))")


@dataclass(frozen=True)
class _Question:
    """A question in the form that the rules compare."""

    example_id: str
    anchors: frozenset[str]  # words that every variant of it contains, for the lookup
    normal: str  # the text to compare, made by `_letters_only` or `_words`
    by_words: bool  # whether `normal` was made by `_words`
    long: bool  # long enough for containment to be meaningful


def _plain(text: str) -> str:
    """NFKC, lower case, without invisible characters."""
    if text.isascii():
        return text.lower()
    # Before NFKC, which turns an acute accent into a space and a combining mark.
    text = _APOSTROPHES.sub("'", text)
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).lower())


def _runs(plain: str) -> set[str]:
    """All runs of letters."""
    return set((_ASCII_LETTERS if plain.isascii() else _LETTERS).findall(plain))


def _anchors(plain: str) -> frozenset[str]:
    """The words that remain runs of letters whatever the punctuation: `eggs.`, but not `well-known`."""
    tokens = (_OUTER_PUNCTUATION.sub("", token) for token in plain.split())
    return frozenset(run for token in tokens if token.isalpha() for run in _LETTERS.findall(token))


def _letters_only(plain: str) -> str:
    """Letters and digits with everything between them removed."""
    return "".join(_ALPHANUMERIC.findall(plain))


def _words(plain: str) -> str:
    """Words, numbers and operators in order, with one space before, between and after them."""
    text = " ".join(_DASHES.sub("-", plain).replace("\u00d7", "*").replace("\u00f7", "/").split())
    text = _THOUSANDS.sub("", text.replace("'", "").replace("`", ""))
    text = _OPERATOR.sub(rf"\1{_OPERATOR_MARK}\2", text)
    return f" {' '.join(_WORD.findall(text))} "


def _file(example_id: str, text: str) -> _Question:
    plain = _plain(text)
    words, letters, anchors = _words(plain), _letters_only(plain), _anchors(plain)
    long = words.count(" ") > CONTAINED_WORDS and len(letters) >= CONTAINED_LETTERS
    # A formula with few words around it differs from similar questions only in its operators.
    by_words = not long or (_OPERATOR_MARK in words and len(anchors) < WORDY)
    return _Question(example_id, anchors, words if by_words else letters, by_words, long)


class QuestionIndex:
    """The questions of a benchmark, indexed so that a row can be looked up in microseconds."""

    def __init__(self, questions: Sequence[tuple[str, str]]) -> None:
        self._equal: dict[bytes, list[str]] = {}
        for example_id, text in questions:
            self._equal.setdefault(problem_key(text), []).append(example_id)
        filed = [question for question in starmap(_file, questions) if question.normal.strip()]
        self.short_questions = len(questions) - sum(question.long for question in filed)
        frequency = Counter(word for question in filed for word in question.anchors)
        self._by_rarest: dict[str, list[_Question]] = {}
        self._without_anchors: list[_Question] = []
        for question in filed:
            if question.anchors:
                rarest = min(question.anchors, key=lambda word: (frequency[word], -len(word), word))
                self._by_rarest.setdefault(rarest, []).append(question)
            else:
                self._without_anchors.append(question)
        self._rarest = frozenset(self._by_rarest)

    def find(self, texts: Iterable[str], problem: str, key: bytes | None = None) -> list[tuple[str, str]]:
        """`(example id, rule)` for each question found in the row, strictest rule first.

        Args:
          texts: every text of the row, turn by turn.
          problem: what the study's rule compares: the user turns, joined by newlines.
          key: `problem_key(problem)`, if the caller already has it.
        """
        hits = dict.fromkeys(self._equal.get(key or problem_key(problem), ()), EQUAL)
        for text in dict.fromkeys((problem, *texts)):
            for example_id, rule in self._search(text):
                known = hits.get(example_id, CONTAINED)
                hits[example_id] = min(known, rule, key=LEAK_RULES.index)
        return sorted(hits.items(), key=lambda hit: LEAK_RULES.index(hit[1]))

    def _search(self, text: str) -> list[tuple[str, str]]:
        plain = _plain(text)
        runs = _runs(plain)
        candidates = [
            question
            for word in runs & self._rarest
            for question in self._by_rarest[word]
            if question.anchors <= runs
        ]
        candidates += self._without_anchors
        if not candidates:
            return []
        normal = {True: _words(plain), False: _letters_only(plain)}
        found = []
        for question in candidates:
            if question.normal == normal[question.by_words]:
                found.append((question.example_id, SAME_WORDS))
            elif question.long and question.normal in normal[question.by_words]:
                found.append((question.example_id, CONTAINED))
        return found
