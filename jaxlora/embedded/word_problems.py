r"""Synthetic word problems: one family of problems in many formats.

Pretraining teaches the tiny base to read and to calculate, in formats that end in "The answer is 42.".
Fine-tuning uses other problems of the same family in the study's format, which ends in `\boxed{42}`.

A problem's `signature` is its chain of equations, for example "24 - 7 = 17; 17 + 5 = 22". The hash of the
signature alone decides a problem's split (`split_of`), so no two splits can share a problem text or even a
combination of operations and numbers, whatever the random seeds.

    >>> item = problem(random.Random(0), "train")
    >>> conversation(item, "boxed")[-1]["content"]         # ends in "\boxed{...}."
    >>> item.answer == int(item.steps[-1].equation.split()[-1])
    True
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from jaxlora.data.render import SYSTEM_PROMPT, Message

SPLIT_PERCENT = {"test": 4, "val": 4, "train": 20, "pretrain": 72}
LARGEST = 99  # every number in a problem and its solution lies between 2 and this
# fmt: off
BOYS = [
    "Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Adam", "Paul", "Omar", "Ivan", "Ken", "Luis", "Noah", "Ravi",
]
GIRLS = [
    "Anna", "Mia", "Lily", "Emma", "Sara", "Kate", "Nina", "Ruth", "Zoe", "Maya", "Lucy", "Rosa", "Ella",
    "Aiko",
]
OBJECTS = [
    "apples", "pears", "books", "pens", "coins", "stamps", "shells", "marbles", "stickers", "cards",
    "cookies", "muffins", "eggs", "roses", "tickets", "toys", "balloons", "beads", "buttons", "ribbons",
    "candles", "crayons", "plums", "lemons", "peaches", "nuts", "stones", "seeds", "photos", "badges",
]
# fmt: on
CONTAINERS = ["boxes", "bags", "baskets", "jars", "packs", "trays", "drawers", "cases"]
PLACES = ["at home", "in a box", "in a bag", "on the table", "in the kitchen", "in the garage"]
SOURCES = ["a friend", "an uncle", "a neighbor", "a teacher", "the store", "the market"]


@dataclass(frozen=True)
class Step:
    """One equation of a solution, and the words around it in its sentence."""

    left: int
    op: str
    right: int
    before: str
    after: str

    @property
    def result(self) -> int:
        """The value of the equation; division is exact."""
        return calculate(self.left, self.op, self.right)

    @property
    def equation(self) -> str:
        """For example `24 - 7 = 17`."""
        return f"{self.left} {self.op} {self.right} = {self.result}"

    @property
    def sentence(self) -> str:
        """For example `Then Tom has 24 - 7 = 17 apples.`"""
        return f"{self.before} {self.equation} {self.after}."


@dataclass(frozen=True)
class WordProblem:
    """A question with its worked solution; the last step's result is the answer."""

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def signature(self) -> str:
        """The chain of equations, which decides the split."""
        return "; ".join(step.equation for step in self.steps)


def calculate(left: int, op: str, right: int) -> int:
    """The value of `left op right`. Raises `ValueError` for an unknown operation or an inexact division."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    if op == "/" and left % right == 0:
        return left // right
    raise ValueError(f"cannot calculate {left} {op} {right}")


def split_of(signature: str) -> str:
    """The only split (`test`, `val`, `train` or `pretrain`) that may use this chain of equations."""
    bucket = int.from_bytes(hashlib.sha256(signature.encode()).digest()[:8], "big") % 100
    for split, percent in SPLIT_PERCENT.items():
        if bucket < percent:
            return split
        bucket -= percent
    raise AssertionError("SPLIT_PERCENT must add up to 100")


# --- the family of problems -----------------------------------------------------------------------------


def problem(rng: random.Random, split: str) -> WordProblem:
    """Draw problems until one belongs to `split`."""
    while True:
        candidate = _draw(rng)
        if candidate is not None and split_of(candidate.signature) == split:
            return candidate


@dataclass(frozen=True)
class _Cast:
    """The characters and objects of a story."""

    name: str
    other: str
    things: str
    he: str
    him: str
    his: str

    @property
    def He(self) -> str:
        """The pronoun at the start of a sentence."""
        return self.he.capitalize()


def _draw(rng: random.Random) -> WordProblem | None:
    """A story of one to three steps, or None if the numbers leave no room for the next event."""
    name, other = rng.sample(BOYS + GIRLS, 2)
    cast = _Cast(
        name, other, rng.choice(OBJECTS), *(("he", "him", "his") if name in BOYS else ("she", "her", "her"))
    )
    length = rng.choices([1, 2, 3], weights=[30, 50, 20])[0]
    opening, count, steps = _opening(rng, cast)
    story = [opening]
    while len(steps) < length:
        last = len(steps) == length - 1
        event = _ending(rng, cast, count) if last else _change(rng, cast, count)
        if event is None:
            return None
        sentence, step = event
        story.append(sentence)
        steps.append(step)
        count = step.result
    if not story[-1].endswith("?"):
        story.append(f"How many {cast.things} does {cast.name} have?")
    return WordProblem(" ".join(story), tuple(steps))


def _opening(rng: random.Random, cast: _Cast) -> tuple[str, int, list[Step]]:
    """The first sentence, the count after it, and the step that it needs, if any."""
    name, things = cast.name, cast.things
    kind = rng.choices(["count", "places", "groups"], weights=[55, 10, 35])[0]
    if kind == "count":
        count = rng.randint(4, 90)
        sentences = [
            f"{name} has {count} {things}.",
            f"There are {count} {things} in {name}'s room.",
            f"{name} starts the day with {count} {things}.",
            f"{name} owns {count} {things}.",
        ]
        return rng.choice(sentences), count, []
    if kind == "places":
        first, second = rng.randint(3, 60), rng.randint(3, 39)
        here, there = rng.sample(PLACES, 2)
        step = Step(first, "+", second, f"{name} has", things)
        return f"{name} has {first} {things} {here} and {second} {things} {there}.", step.result, [step]
    groups = rng.randint(2, 9)
    each = rng.randint(2, min(12, LARGEST // groups))
    container = rng.choice(CONTAINERS)
    sentences = [
        f"For {groups} days, {name} gets {each} {things} every day.",
        f"{name} works for {groups} hours and makes {each} {things} every hour.",
        f"{name} has {groups} {container} with {each} {things} in each.",
        f"{name} buys {groups} {container} of {each} {things} each.",
        f"{name} fills {groups} {container} with {each} {things} each.",
    ]
    step = Step(groups, "*", each, f"{name} has", things)
    return rng.choice(sentences), step.result, [step]


def _amount(rng: random.Random, op: str, count: int) -> int | None:
    """A number to add to or subtract from `count`, if there is one."""
    room = LARGEST - count if op == "+" else count - 2
    return rng.randint(2, min(room, 60)) if room >= 2 else None


def _change(rng: random.Random, cast: _Cast, count: int) -> tuple[str, Step] | None:
    """A sentence that adds to or subtracts from the count, and its step."""
    op = rng.choice("+-")
    amount = _amount(rng, op, count)
    if amount is None:
        return None
    if op == "+":
        sentences = [
            f"{cast.He} buys {amount} more.",
            f"{cast.He} finds {amount} more {cast.things}.",
            f"{cast.other} gives {cast.him} {amount} {cast.things}.",
            f"{cast.He} gets {amount} {cast.things} from {rng.choice(SOURCES)}.",
            f"Then {cast.he} makes {amount} more {cast.things}.",
        ]
    else:
        sentences = [
            f"{cast.He} gives {amount} {cast.things} to {cast.other}.",
            f"{cast.He} loses {amount} of them.",
            f"{cast.He} sells {amount} {cast.things}.",
            f"{cast.other} takes {amount} of {cast.his} {cast.things}.",
            f"Then {cast.he} throws away {amount} {cast.things}.",
        ]
    return rng.choice(sentences), Step(count, op, amount, f"Then {cast.name} has", cast.things)


def _ending(rng: random.Random, cast: _Cast, count: int) -> tuple[str, Step] | None:
    """The last event together with the question, and the last step."""
    other, things = cast.other, cast.things
    kinds = {"change": 40, "compare": 15, "together": 15, "price": 12, "share": 12, "times": 6}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "change":
        event = _change(rng, cast, count)
        if event is None:
            return None
        asked = rng.choice(["now", "at the end", "left" if event[1].op == "-" else "in all"])
        return f"{event[0]} How many {things} does {cast.he} have {asked}?", event[1]
    if kind == "compare":
        op, word = rng.choice([("+", "more"), ("-", "fewer")])
        amount = _amount(rng, op, count)
        if amount is None:
            return None
        text = f"{other} has {amount} {word} {things} than {cast.name}. How many {things} does {other} have?"
        return text, Step(count, op, amount, f"{other} has", things)
    if kind == "together":
        amount = _amount(rng, "+", count)
        if amount is None:
            return None
        text = f"{other} has {amount} {things}. How many {things} do they have together?"
        return text, Step(count, "+", amount, "Together they have", things)
    if kind == "share":
        friends = [number for number in range(2, 10) if count % number == 0 and count // number >= 2]
        if not friends:
            return None
        number = rng.choice(friends)
        text = (
            f"{cast.He} shares them equally among {number} friends. How many {things} does each friend get?"
        )
        return text, Step(count, "/", number, "Each friend gets", things)
    if LARGEST // count < 2:
        return None
    factor = rng.randint(2, min(9, LARGEST // count))
    if kind == "price":
        text = f"{cast.He} sells them all for {factor} dollars each. How many dollars does {cast.he} get?"
        return text, Step(count, "*", factor, f"{cast.name} gets", "dollars")
    text = f"{other} has {factor} times as many {things} as {cast.name}. How many {things} does {other} have?"
    return text, Step(count, "*", factor, f"{other} has", things)


# --- formats ----------------------------------------------------------------------------------------------


def conversation(item: WordProblem, style: str, system: str | None = None) -> list[Message]:
    r"""The problem as chat messages.

    Styles: `boxed` (the study's format: one sentence per line, then `\boxed{}`; always with the study's
    system prompt), `explained` (sentences, then "The answer is ...") and `terse` (only equations, then the
    same).
    """
    if style == "boxed":
        system = SYSTEM_PROMPT
        lines = [step.sentence for step in item.steps]
        reply = "\n".join(lines) + f"\n\nThe final answer is \\boxed{{{item.answer}}}."
    else:
        reply = solution(item, style)
    messages = [{"role": "user", "content": item.question}, {"role": "assistant", "content": reply}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def solution(item: WordProblem, style: str) -> str:
    """A worked solution that ends in "The answer is ...": `explained` or `terse`."""
    if style == "explained":
        parts = [step.sentence for step in item.steps]
    elif style == "terse":
        parts = [step.equation + "." for step in item.steps]
    else:
        raise ValueError(f"unknown style {style!r}")
    return " ".join([*parts, f"The answer is {item.answer}."])


def rendered_row(item: WordProblem) -> dict[str, Any]:
    """A row of the rendered training files: `row_id`, `source`, `expected_answer`, `messages`."""
    source, expected = "word_problems", str(item.answer)
    digest = hashlib.sha256("\n".join([source, item.question, expected]).encode()).hexdigest()
    return {
        "row_id": digest[:20],
        "source": source,
        "expected_answer": expected,
        "messages": conversation(item, "boxed"),
    }


def benchmark_row(item: WordProblem) -> dict[str, str]:
    """A row in GSM8K's schema: `question`, and `answer` with calculator marks and a final `#### 42`."""
    lines = []
    for step in item.steps:
        left = f"{step.left} {step.op} {step.right}"
        mark = f"<<{step.left}{step.op}{step.right}={step.result}>>"
        lines.append(f"{step.before} {left} = {mark}{step.result} {step.after}.")
    return {"question": item.question, "answer": "\n".join([*lines, f"#### {item.answer}"])}


def distinct_problems(rng: random.Random, split: str, count: int) -> list[WordProblem]:
    """`count` problems of one split, no two with the same signature."""
    seen: dict[str, WordProblem] = {}
    while len(seen) < count:
        item = problem(rng, split)
        seen.setdefault(item.signature, item)
    return list(seen.values())
