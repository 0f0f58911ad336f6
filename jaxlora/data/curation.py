r"""The dataset's rules: which rows are accepted, and how they are identified, grouped and split.

    reject_reason(problem, solution, expected_answer)      # None, or "missing_box", "boxed_mismatch", ...
    row_id("math", problem, expected_answer)               # 20 hex digits
    canonical_problem("What is\u3000２+3?")                # "what is 2+3?"
    split_by_problem([(rows, keys), (more_rows, more_keys)])     # which row goes where, and in which order

Pure functions of text and lists; `jaxlora.data.build` reads and writes the files.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as _encode  # text as JSON, with non-ASCII characters kept
from typing import Generic, TypeVar

from jaxlora.data.boxes import last_box
from jaxlora.data.render import SYSTEM_PROMPT

SOURCES = ("gsm8k", "math")
SEED = 20260420
VALIDATION_SHARE = 0.1
FIELDS = ("problem", "generated_solution", "expected_answer", "problem_source")
REASONS = ("missing_box", "boxed_mismatch", "suspicious_pattern", "problem_pattern")

# Solutions that give up, guess, or argue with the question. Matched against the lower-cased solution.
SUSPICIOUS_PHRASES = (
    "cannot spend more than",
    "cannot be accurately completed",
    "cannot be accurately provided",
    "cannot directly calculate or deduce",
    "doesn't align with the logical outcome",
    "i must provide an answer",
    "need for numerical or graphical methods",
    "without further clarification",
    "without further specific steps",
    "acknowledging the complexity",
    "more sophisticated mathematical approach",
    "set the value to 100",
    "strictly interpreting",
    "would technically not have any money left",
    "must be an integer",
    "seems to be looking for",
)

# Problems that still carry the prompt that generated them. Matched against the lower-cased problem.
PROBLEM_START = re.compile(r"\s*problem\s*:")
PROBLEM_PHRASES = re.compile(
    r"\b(?:"  # each phrase starts a word, so it is tried once per word rather than once per letter
    + "|".join(
        (
            r"new problem\s*:",
            r"the new problem is\s*:",
            r"here is a new problem\s*:",
            r"write another problem\b",
            r"another problem inspired by this one\b",
            r"inspired by this one\b",
            r"consider the next problem\b",
            r"let the students\b",
            r"solve this problem independently\b",
            r"create a new problem\b",
            r"reasoning skill for creating a new problem\b",
            r"let's modify it to create a new problem\b",
            r"this question is identical to the previous one\b",
            r"note: do not go over the length\b",
            r"no similar problem needed\b",
        )
    )
    + ")"
)

_SYSTEM = _encode(SYSTEM_PROMPT)


def normal_answer(answer: str) -> str:
    r"""The form in which the box and the expected answer are compared.

    All white space is removed, then `\left` and `\right` are deleted, then `\tfrac` is rewritten to `\frac`.
    """
    bare = "".join(answer.split()).replace("\\left", "").replace("\\right", "")
    return bare.replace("\\tfrac", "\\frac")


def is_suspicious(solution: str) -> bool:
    """Whether the solution gives up or guesses."""
    lowered = solution.lower()
    return any(phrase in lowered for phrase in SUSPICIOUS_PHRASES)


def is_prompt_wrapper(problem: str) -> bool:
    """Whether the problem still carries the prompt that generated it."""
    lowered = problem.lower()  # three times faster than case-insensitive patterns
    return PROBLEM_START.match(lowered) is not None or PROBLEM_PHRASES.search(lowered) is not None


def reject_reason(problem: str, solution: str, expected_answer: str) -> str | None:
    """The first rule that the row breaks, one of REASONS; None if the row is accepted."""
    box = last_box(solution)
    if box is None:
        return "missing_box"
    if normal_answer(box) != normal_answer(expected_answer):
        return "boxed_mismatch"
    if is_suspicious(solution):
        return "suspicious_pattern"
    if is_prompt_wrapper(problem):
        return "problem_pattern"
    return None


def row_id(source: str, problem: str, expected_answer: str) -> str:
    """20 hex digits of the SHA-256 of the three texts joined by single newlines, in UTF-8."""
    return hashlib.sha256(f"{source}\n{problem}\n{expected_answer}".encode()).hexdigest()[:20]


def canonical_problem(problem: str) -> str:
    """The problem's text for comparison: NFKC, lower case, stripped, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", problem).lower().split())


def problem_key(problem: str) -> bytes:
    """A 16-byte hash of the canonical problem, so that a million problems fit in memory."""
    return hashlib.blake2b(canonical_problem(problem).encode(), digest_size=16).digest()


def row_lines(source: str, problem: str, solution: str, expected_answer: str) -> tuple[str, str]:
    """The row's line in the raw file and in the rendered file, without the newline.

    Exactly what `json.dumps(row, ensure_ascii=False)` writes; assembling the lines here encodes each text
    once instead of twice.
    """
    row, origin = _encode(row_id(source, problem, expected_answer)), _encode(source)
    asked, solved, expected = _encode(problem), _encode(solution), _encode(expected_answer)
    raw = (
        f'{{"row_id": {row}, "source": {origin}, "problem": {asked}, "generated_solution": {solved},'
        f' "expected_answer": {expected}}}'
    )
    rendered = (
        f'{{"row_id": {row}, "source": {origin}, "expected_answer": {expected}, "messages": ['
        f'{{"role": "system", "content": {_SYSTEM}}}, {{"role": "user", "content": {asked}}},'
        f' {{"role": "assistant", "content": {solved}}}]}}'
    )
    return raw, rendered


Row = TypeVar("Row")


@dataclass(frozen=True)
class Split(Generic[Row]):
    """The rows of each part in their final order, and the number of groups in each part."""

    train: list[Row]
    validation: list[Row]
    train_groups: int
    validation_groups: int


def split_by_problem(visits: Sequence[tuple[Sequence[Row], Sequence[bytes]]]) -> Split[Row]:
    """Split rows so that rows with the same problem stay together.

    `visits` holds, for each source in visiting order, its rows in stream order and their problem keys. Groups
    are listed in order of first appearance, shuffled, and assigned to validation until it holds at least
    `round(VALIDATION_SHARE x rows)` rows; the rest is train. The same generator then shuffles train, then
    validation.
    """
    places: dict[bytes, int] = {}
    groups: list[list[Row]] = []
    total = 0
    for rows, keys in visits:
        total += len(rows)
        for row, key in zip(rows, keys, strict=True):
            place = places.setdefault(key, len(groups))
            if place == len(groups):
                groups.append([row])
            else:
                groups[place].append(row)
    places.clear()
    generator = random.Random(SEED)
    generator.shuffle(groups)
    wanted = round(VALIDATION_SHARE * total)
    train: list[Row] = []
    validation: list[Row] = []
    validation_groups = 0
    for group in groups:
        if len(validation) < wanted:
            validation += group
            validation_groups += 1
        else:
            train += group
    train_groups = len(groups) - validation_groups
    groups.clear()
    generator.shuffle(train)
    generator.shuffle(validation)
    return Split(train, validation, train_groups, validation_groups)
