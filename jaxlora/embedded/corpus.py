r"""The pretraining corpus of the embedded base: word problems, equations and small talk, as text.

No document solves a problem in a box: boxes only appear around a number that is given. So the base can
calculate, but the study's answer format is left to fine-tuning. The corpus is large and therefore not
shipped; it is a pure function of the seed and the number of documents.

    >>> for text in pretraining_texts(seed=0, count=1_000_000, tokenizer=tokenizer):
    ...     token_ids = tokenizer(text).input_ids
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from jaxlora.data.render import Message
from jaxlora.embedded.word_problems import (
    LARGEST,
    calculate,
    conversation,
    problem,
    solution,
    split_of,
)

SYSTEM_PROMPTS = [
    None,
    None,
    None,
    "You are a helpful assistant.",
    "You are a careful math solver.",
    "You are a careful teacher. Solve the problem.",
    "Solve the problem step by step.",
    "Solve the problem step by step. Put the final answer in the last sentence.",
]
TALK = [
    ("Hello!", "Hello! How can I help you?"),
    ("Who are you?", "I am a small language model. I solve math problems."),
    ("What can you do?", "I can add, subtract, multiply and divide. Ask me a problem."),
    ("Thank you!", "You are welcome!"),
    ("Good morning.", "Good morning! Do you have a problem for me?"),
]
# Styles and their shares of the corpus in percent.
STYLES = {
    "chat_explained": 34,
    "chat_terse": 12,
    "plain_explained": 18,
    "plain_terse": 14,
    "drill": 16,
    "box": 4,
    "talk": 2,
}


def pretraining_documents(seed: int, count: int) -> Iterator[str | list[Message]]:
    """`count` documents: plain text, or chat messages. No document solves a problem in a box."""
    rng = random.Random(seed)
    names, weights = list(STYLES), list(STYLES.values())
    for _ in range(count):
        yield _document(rng, rng.choices(names, weights)[0])


def pretraining_texts(seed: int, count: int, tokenizer: Any) -> Iterator[str]:
    """The documents as training text: chat template applied, `<|endoftext|>` at the end of each."""
    for document in pretraining_documents(seed, count):
        if not isinstance(document, str):
            document = tokenizer.apply_chat_template(document, tokenize=False, enable_thinking=False)
        yield document + "<|endoftext|>"


def _document(rng: random.Random, style: str) -> str | list[Message]:
    if style == "talk":
        user, reply = rng.choice(TALK)
        return _chat(rng.choice(SYSTEM_PROMPTS), user, reply)
    if style == "box":
        return _box(rng)
    if style == "drill":
        equations = [_equation(rng) for _ in range(rng.randint(4, 12))]
        if rng.random() < 0.3:
            asked, value = equations[0].rsplit(" ", 1)
            return _chat(
                rng.choice(SYSTEM_PROMPTS),
                f"What is {asked.removesuffix(' =')}?",
                f"{equations[0]}. The answer is {value}.",
            )
        return "\n".join(equations)
    item = problem(rng, "pretrain")
    kind, style = style.split("_")
    if kind == "chat":
        return conversation(item, style, rng.choice(SYSTEM_PROMPTS))
    return f"Question: {item.question}\nAnswer: {solution(item, style)}"


def _box(rng: random.Random) -> str | list[Message]:
    r"""Puts a given number in a box, which introduces `\boxed{` without solving anything."""
    number = rng.randint(2, LARGEST)
    if rng.random() < 0.5:
        return f"The final answer is {number}.\nIn \\boxed{{}}: \\boxed{{{number}}}"
    return _chat(None, f"Put the number {number} in \\boxed{{}}.", f"\\boxed{{{number}}}")


def _chat(system: str | None, user: str, reply: str) -> list[Message]:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _equation(rng: random.Random) -> str:
    """One equation that the pretraining split may show on its own."""
    while True:
        op = rng.choice("+-*/")
        if op == "+":
            left = rng.randint(2, LARGEST - 2)
            right = rng.randint(2, LARGEST - left)
        elif op == "-":
            left = rng.randint(4, LARGEST)
            right = rng.randint(2, left - 2)
        else:
            left = rng.randint(2, LARGEST // 2)
            right = rng.randint(2, min(9, LARGEST // left)) if LARGEST // left >= 2 else 2
            left = left if op == "*" else left * right
        equation = f"{left} {op} {right} = {calculate(left, op, right)}"
        if split_of(equation) == "pretrain":
            return equation
