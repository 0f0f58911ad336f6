"""Locate the answers in a rendered conversation, for loss on all assistant turns.

    spans = spans_of_template(tokenizer, turns, tools, full)     # the template marks them: {% generation %}
    spans = spans_of_prefixes(turns, full, write)                # any other: by prefix differences
    weights = weights_of(spans, offsets)                         # float32 [tokens]

A span is exact or the row is refused. By prefix differences, a turn's answer is whatever the conversation
rendered up to and including that turn has beyond its prompt (the rule used for the last turn). This answer
must also appear in the full text, right after the turn's prompt. With thinking off, an answer begins with
empty thoughts, which some templates, such as Qwen3's, omit in earlier turns; the prompt of such a turn is the
one with thinking on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlora.data.messages import Turn
from jaxlora.data.template import begun, dated, variables
from jaxlora.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

Span = tuple[int, int]  # start and end in characters
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MAX_WORK = 1_000_000_000  # characters: each turn is found by rendering all turns before it


def marks_answers(tokenizer: Tokenizer, tools: Any) -> bool:
    """Whether the chat template itself marks the generated text."""
    return bool(_GENERATION.search(tokenizer.get_chat_template(tools=tools)))


def spans_of_template(tokenizer: Tokenizer, turns: Sequence[Turn], tools: Any, full: str) -> list[Span]:
    """The spans between the template's own marks, without those of turns that carry no loss."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = tokenizer.special_tokens_map | variables(turns[-1].thinks)
    render: Any = render_jinja_template  # its annotations are narrower than what it accepts and returns
    texts, (spans,) = render(
        [[turn.message for turn in turns]],
        tools=tools,
        chat_template=dated(tokenizer.get_chat_template(tools=tools)),
        return_assistant_tokens_mask=True,
        **given,
    )
    if begun(tokenizer, texts[0]) != full:
        raise ValueError("it writes another text when its answers are marked")
    shift = len(full) - len(texts[0])  # length of the BOS that the template left out
    spans = [(start + shift, end + shift) for start, end in spans]
    answers = [turn for turn in turns if turn.message["role"] == "assistant"]
    if len(spans) == len(answers):
        return [(start, end) for (start, end), turn in zip(spans, answers, strict=True) if turn.learns]
    if not all(turn.learns for turn in answers):
        raise ValueError(f"it marks {len(spans)} answers of {len(answers)}, so a weight of 0 has no place")
    return [(start, end) for start, end in spans]


def spans_of_prefixes(
    turns: Sequence[Turn], full: str, write: Callable[[int, bool, bool], str]
) -> list[Span]:
    """The answers of all turns that carry loss, each found by rendering with and without it.

    Args:
      write: renders the first turns: `write(length, generation_prompt, enable_thinking)`.

    Raises:
      UserError: an answer cannot be located exactly; names the turn and the reason.
    """
    answers = [i for i, turn in enumerate(turns) if turn.message["role"] == "assistant" and turn.learns]
    if len(answers) * len(full) > MAX_WORK:
        raise UserError(f"{len(answers)} answers in {len(full)} characters are too many for loss_on=all")
    spans: list[Span] = []
    for index in answers:
        thinks = turns[index].thinks
        prompt = write(index, True, thinks)
        alone = write(index + 1, False, thinks)
        if not alone.startswith(prompt):
            raise UserError(_inexact(index, "the full render does not begin with the prompt prefix"))
        answer = alone[len(prompt) :]
        for start in _prompt_ends(full, prompt, partial(write, index, True, not thinks)):
            if full.startswith(answer, start) and answer:
                break
        else:
            raise UserError(_inexact(index, "the template writes it differently once others follow"))
        if spans and start < spans[-1][1]:
            raise UserError(_inexact(index, "it overlaps the answer before it"))
        spans.append((start, start + len(answer)))
    return spans


def _prompt_ends(full: str, prompt: str, other: Callable[[], str]) -> Iterator[int]:
    """Where a turn's prompt ends in the full text, in its own thinking mode and in the other one."""
    if full.startswith(prompt):
        yield len(prompt)
    if full.startswith(second := other()):
        yield len(second)


def weights_of(spans: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
    """Loss weights, float32 [tokens]: 1 for the tokens inside the spans.

    Args:
      offsets: int64 [tokens, 2], the start and (exclusive) end character of each token.

    Raises:
      UserError: no token is in a span, or a token straddles the edge of a span.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    weights = np.zeros(len(offsets), dtype=np.float32)
    known = {0, *ends.tolist()}
    for first, last in spans:
        for edge in (first, last):
            if edge not in known or np.any((starts < edge) & (edge < ends)):
                raise UserError("loss_on=all: a token lies on both sides of the edge of an answer")
        weights[(starts >= first) & (ends <= last) & (starts < ends)] = 1.0
    if not weights.any():
        raise UserError("all-zero loss mask: no answer carries loss")
    return weights


def _inexact(index: int, reason: str) -> str:
    return f"message {index + 1} cannot be marked exactly for loss_on=all: {reason}; use loss_on=last"
