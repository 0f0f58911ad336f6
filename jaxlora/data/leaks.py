"""Find benchmark questions in training rows, even where they stand in another turn or between other words.

    index = QuestionIndex([("gsm8k-0000", question), ...])
    index.find([user_turn, system_text], problem=user_turn)   # [("gsm8k-0000", "contained")] or []

Three rules, of which the strictest that holds is named:

- `equal`: the study's own. The row's problem and the question are the same canonical text.
- `same_words`: one text of the row is the question but for case, punctuation and white space.
- `contained`: the question stands inside a text of the row, whatever the case, punctuation and white space.
  Only for questions of at least `CONTAINED_WORDS` words and `CONTAINED_LETTERS` letters: "What is 2 + 3?"
  stands in many texts that leak nothing.

In formulas and short questions, the punctuation that carries meaning counts: 2 + 3 is not 2 - 3.

A row is looked up, not compared with every question: each question is filed under its rarest word, and only
a row that has all of a question's words is normalised and searched. A million rows take about a minute.
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
WORDY = 15  # different words of a question that is recognised by its words alone

# Scripts that write without spaces: there, each character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_LETTERS = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+")
_OPERATOR_MARK = "\x00"  # put before what `_OPERATOR` finds
_ASCII_LETTERS = re.compile(r"[a-z]+")
_WORD = re.compile(rf"\d+(?:\.\d+)?|[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+|{_OPERATOR_MARK}.")

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]")
_OUTER_PUNCTUATION = re.compile(r"^[\W_]+|[\W_]+$")
_ALPHANUMERIC = re.compile(r"[^\W_]+")
_APOSTROPHES = re.compile("['`\u00b4\u2018\u2019\u02bc]")
_DASHES = re.compile("[\u2010-\u2015\u2212]")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
# An operator stands between two operands. A hyphen, a slash or a mark of emphasis between words is none.
_OPERATOR = re.compile(r"(?<=[0-9a-z)\]}$])(\s?)([-+/^=<>]|\*(?!\*))(?=\s?[-(\\{$]*(?:\d|[b-hj-z](?![a-z])))")


@dataclass(frozen=True)
class _Question:
    """A question as the rules see it."""

    example_id: str
    anchors: frozenset[str]  # words that every form of it has, for the look-up
    normal: str  # what is compared, made by `_letters_only` or by `_words`
    by_words: bool  # by which of the two
    long: bool  # long enough for containment to mean something


def _plain(text: str) -> str:
    """NFKC, lower case, without characters that nobody sees."""
    if text.isascii():
        return text.lower()
    # Before NFKC, which makes a space and a combining mark of the acute accent.
    text = _APOSTROPHES.sub("'", text)
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).lower())


def _runs(plain: str) -> set[str]:
    """All runs of letters."""
    return set((_ASCII_LETTERS if plain.isascii() else _LETTERS).findall(plain))


def _anchors(plain: str) -> frozenset[str]:
    """The words that stay runs of letters whichever punctuation is changed: `eggs.`, but not `well-known`."""
    tokens = (_OUTER_PUNCTUATION.sub("", token) for token in plain.split())
    return frozenset(run for token in tokens if token.isalpha() for run in _LETTERS.findall(token))


def _letters_only(plain: str) -> str:
    """Letters and digits without anything between them."""
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
    # Of a formula with a few words around it, the operators are what tells it from its neighbours.
    by_words = not long or (_OPERATOR_MARK in words and len(anchors) < WORDY)
    return _Question(example_id, anchors, words if by_words else letters, by_words, long)


class QuestionIndex:
    """The questions of a benchmark, filed so that a row can be looked up in microseconds."""

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
        """`(example id, rule)` of each question that the row holds, in the order of the rules.

        Args:
          texts: every text of the row, turn by turn.
          problem: what the study's rule compares: the user turns, joined by newlines.
          key: `problem_key(problem)`, if the caller has it.
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
