"""The one renderer: turns messages into token ids and loss weights.

    tokenizer = load_tokenizer("Qwen/Qwen3-8B")
    (row,) = render_batch(tokenizer, [("a1", messages)])            # training: a RenderedRow or a UserError
    (prompt,) = render_prompts(tokenizer, ["What is 2 + 3?"])       # evaluation
    prompt = render_chat(tokenizer, messages)                       # a chat so far

Training and evaluation both use this module, so they cannot disagree about the template. The text is what
the tokenizer's own chat template produces with thinking off, and it is tokenised in a single call.

With `loss_on="last"`, the prompt prefix is the same conversation up to the last assistant turn, plus the
generation prompt. Loss weights are 0 over the prefix and 1 after it: the answer, `<|im_end|>` and the newline
after it carry loss. With `loss_on="all"`, every assistant turn carries loss, as located by `masks`.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxlora.data.containers import is_text
from jaxlora.data.control import guard_of, rust_panics
from jaxlora.data.limits import bounded
from jaxlora.data.masks import Span, marks_answers, spans_of_prefixes, spans_of_template, weights_of
from jaxlora.data.messages import (
    Example,
    Message,
    Turn,
    check_messages,
    check_prompt,
    check_text,
)
from jaxlora.data.template import begun, dated, variables
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.folders import file_in
from jaxlora.runtime.remote import TOKENIZER_SUFFIXES, announce, is_remote, mirror, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # importing transformers takes seconds, and most of the data tools never tokenise
    Tokenizer = Any

LossOn = Literal["last", "all"]
TEMPLATE_SECONDS, TEMPLATE_BYTES = 10.0, 2**30  # limits for rendering one conversation

SYSTEM_PROMPT = (
    "You are a careful math solver. Solve the problem step by step. Put the final answer in \\boxed{}."
)


@dataclass(frozen=True)
class RenderedRow:
    """One tokenised row: `tokens` is int32 [length] and `weights` float32 [length], both unshifted.

    `extras` holds further float32 arrays [length] that an objective needs, such as `advantages`.
    """

    row_id: str
    tokens: np.ndarray
    weights: np.ndarray
    prompt_id: str = ""  # a hash of the canonical question, so rows of the same question share it
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """The token count as the study counts it: the number of inputs, which is the length minus one."""
        return len(self.tokens) - 1

    @property
    def prompt_length(self) -> int:
        """Number of tokens without loss; this is the prompt prefix if only the last answer carries loss."""
        return int(len(self.weights) - np.count_nonzero(self.weights))


def shifted(row: RenderedRow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and target weights, each [length - 1]: position i predicts token i + 1."""
    return row.tokens[:-1], row.tokens[1:], row.weights[1:]


def load_tokenizer(path: str | Path, chat: bool = True) -> Tokenizer:
    """Load a tokenizer with its chat template: a local directory, `embedded:NAME`, a bucket or a Hub model.

    No code from the model's repository is run, and no link out of its folder is followed.

    Args:
      chat: whether a chat template is required.

    Raises:
      UserError: there is no tokenizer, it cannot be read, or it lacks a required chat template.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # silence its advice to install PyTorch
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoTokenizer

    name = str(path)
    folder = mirror(name) if is_remote(name) else resolve(name)
    is_local = folder.is_dir()
    if not is_local:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise UserError(
                f"tokenizer {name!r}: no such directory; give one, or a Hub name such as Qwen/Qwen3-8B"
            )
        if not isinstance(try_to_load_from_cache(name, "tokenizer.json"), str):
            announce(f"fetching the tokenizer of {name} from the Hugging Face Hub (kept in its local cache)")
    if is_local:
        for file in folder.iterdir():
            if file.suffix in TOKENIZER_SUFFIXES:
                file_in(folder, file.name)
    try:
        with rust_panics(f"tokenizer {name!r}: cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder) if is_local else name, trust_remote_code=False, local_files_only=is_local
            )
        tokenizer.decode(encode_texts(tokenizer, ["a"])[0])  # wrong settings only show on first use
        tokenizer.all_special_tokens, tokenizer.eos_token_id  # noqa: B018
    except UserError:
        raise
    except Exception as error:  # transformers and the Hub client raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tokenizer {name!r}: cannot be loaded: {reason}") from None
    if chat and not tokenizer.chat_template:
        raise UserError(f"tokenizer {name!r}: has no chat template; use the tokenizer of a chat model")
    return tokenizer


def largest_token_id(tokenizer: Tokenizer) -> int:
    """The largest id that the tokenizer can produce; a model's vocabulary must be larger.

    This is not the number of tokens: ids may have gaps, and added tokens may have any id.
    """
    return max((*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder), default=-1)


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    generation_prompt: bool,
    *,
    tools: Any = None,
    enable_thinking: bool = False,
) -> str:
    """The chat template's text for these messages, thinking off unless `enable_thinking`; see `template`.

    Raises:
      UserError: there is no template, or it rejects these messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which messages need; name a chat model's with"
            " model.tokenizer, or give rows of text"
        )
    with template_errors():
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=dated(tokenizer.get_chat_template(tools=tools)),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **variables(enable_thinking),
        )
    assert isinstance(text, str), type(text)
    return begun(tokenizer, checked_text(text))


@contextmanager
def template_errors() -> Iterator[None]:
    """Limit a template's time and memory, and report what it rejects in one line."""
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            yield
    except Exception as error:  # templates raise Jinja's errors and, through missing fields, Python's
        reason = str(error) or type(error).__name__
        raise UserError(f"the chat template refuses the conversation: {reason}") from None


def checked_text(text: str) -> str:
    """The text written by a template, checked to be valid text."""
    if not is_text(text):
        raise UserError("the chat template writes half a surrogate pair, which is not text")
    return text


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that already contain their control tokens; nothing is added or truncated.

    Raises:
      UserError: the tokenizer fails on one of them.
    """
    if not texts:
        return []
    with rust_panics("the tokenizer fails on this text"):
        return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]


# --- Training rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rendered:
    """A row's text before tokenisation, with `prefix` or `spans`; with neither, every token carries loss."""

    row_id: str
    prompt_id: str
    full: str
    prefix: str | None = None
    spans: tuple[Span, ...] | None = None


def render_batch(
    tokenizer: Tokenizer,
    conversations: Sequence[Example | tuple[str, list[Message]]],
    *,
    loss_on: LossOn = "last",
    enable_thinking: bool = False,
) -> list[RenderedRow | UserError]:
    """Render examples, or `(row_id, messages)` pairs; an unusable one yields its `UserError` instead.

    Batches are tokenised together, which is many times faster than one conversation at a time.

    Args:
      loss_on: whether the last answer carries loss or all of them; turns of weight 0 never do.
      enable_thinking: render answers that contain thoughts with thinking on; if false, they are refused.
    """
    examples = [row if isinstance(row, Example) else Example(*row) for row in conversations]
    results: list[RenderedRow | UserError | None] = [None] * len(examples)
    texts: dict[int, _Rendered] = {}
    for place, example in enumerate(examples):
        try:
            texts[place] = _render(tokenizer, example, loss_on, enable_thinking)
        except UserError as error:
            results[place] = error
    with_prefix = [rendered for rendered in texts.values() if rendered.prefix is not None]
    ids = _encode_each(
        tokenizer, [t for rendered in with_prefix for t in (str(rendered.prefix), rendered.full)]
    )
    for place, rendered in texts.items():
        try:
            if rendered.prefix is not None:
                results[place] = _row_after_prefix(rendered, next(ids), next(ids))
            else:
                results[place] = _row_of_spans(tokenizer, rendered)
        except UserError as error:
            results[place] = error
    return results  # type: ignore[return-value]  # every place is filled above


def _encode_each(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int] | UserError]:
    """Encode the texts together; if that fails, one by one, to find out which text is at fault."""
    try:
        yield from encode_texts(tokenizer, texts)
    except UserError:
        for text in texts:
            try:
                yield encode_texts(tokenizer, [text])[0]
            except UserError as error:
                yield error


def _render(tokenizer: Tokenizer, example: Example, loss_on: LossOn, enable_thinking: bool) -> _Rendered:
    guard = guard_of(tokenizer)
    if example.text is not None:
        check_text(example.text, guard)
        return _Rendered(example.row_id, _prompt_id(example.text), example.text)
    turns = check_messages(example, guard, enable_thinking)
    question = next(turn.message["content"] for turn in turns if turn.message["role"] == "user")
    last = len(turns) - 1
    write = _Writer(tokenizer, turns, example.tools)
    full = write(len(turns), False, turns[last].thinks)
    write.check_that_all_is_rendered(full)
    known = example.row_id, _prompt_id(question), full
    if loss_on == "last":
        if not turns[last].learns:
            raise UserError("all-zero loss mask: the last answer has weight 0; remove the row or the weight")
        prefix = write(last, True, turns[last].thinks)
        write.check_that_thoughts_are_rendered(last, full)
        return _Rendered(*known, prefix=prefix)
    if empty := [number for number, turn in enumerate(turns, start=1) if turn.learns and turn.is_empty]:
        raise UserError(f"message {empty[0]}: empty answer; remove it, or give it weight 0")
    if marks_answers(tokenizer, example.tools):
        with template_errors():
            spans = spans_of_template(tokenizer, turns, example.tools, full)
    else:
        spans = spans_of_prefixes(turns, full, write)
        for index, turn in enumerate(turns):
            if turn.learns:
                write.check_that_thoughts_are_rendered(index, full)
    return _Rendered(*known, spans=tuple(spans))


@dataclass(frozen=True)
class _Writer:
    """Renders the first turns of one conversation: `write(length, generation_prompt, enable_thinking)`."""

    tokenizer: Tokenizer
    turns: list[Turn]
    tools: Any

    def __call__(self, length: int, generation_prompt: bool, enable_thinking: bool) -> str:
        messages = [turn.message for turn in self.turns[:length]]
        return self._text(messages, generation_prompt, self.tools, enable_thinking)

    def _text(self, messages: list[Message], prompt: bool, tools: Any, thinking: bool) -> str:
        return chat_text(self.tokenizer, messages, prompt, tools=tools, enable_thinking=thinking)

    def check_that_all_is_rendered(self, full: str) -> None:
        """Check that tools and tool calls were rendered: templates silently ignore what they do not know."""
        messages, thinking = [turn.message for turn in self.turns], self.turns[-1].thinks
        if self.tools and self._text(messages, False, None, thinking) == full:
            raise UserError("the row has the key 'tools', which the chat template leaves out; remove it")
        for index, message in enumerate(messages):
            if "tool_calls" in message:
                without = {key: value for key, value in message.items() if key != "tool_calls"}
                others = [*messages[:index], without, *messages[index + 1 :]]
                if self._text(others, False, self.tools, thinking) == full:
                    raise UserError(
                        f"message {index + 1} has the key 'tool_calls', which the chat template leaves out"
                    )

    def check_that_thoughts_are_rendered(self, index: int, full: str) -> None:
        """The same check for the thoughts of a turn that is trained on."""
        thoughts = self.turns[index].message.get("reasoning_content")
        if thoughts and thoughts.strip() not in full:
            raise UserError(
                f"message {index + 1} has the key 'reasoning_content', which the chat template leaves out;"
                " write the thoughts into content, as <think>...</think>"
            )


def _row_after_prefix(
    rendered: _Rendered, prefix: list[int] | UserError, full: list[int] | UserError
) -> RenderedRow:
    if isinstance(prefix, UserError):
        raise prefix
    if isinstance(full, UserError):
        raise full
    if full[: len(prefix)] != prefix:
        at = next((i for i, (a, b) in enumerate(zip(full, prefix, strict=False)) if a != b), len(full))
        raise UserError(f"the full render does not begin with the prompt prefix: they part at token {at}")
    if not prefix:
        raise UserError("all-one loss mask: the prompt prefix renders to nothing")
    if len(full) == len(prefix):
        raise UserError("all-zero loss mask: the render has nothing after the prompt prefix")
    tokens = np.asarray(full, dtype=np.int32)
    weights = np.ones(len(full), dtype=np.float32)
    weights[: len(prefix)] = 0.0
    return RenderedRow(rendered.row_id, tokens, weights, rendered.prompt_id)


def _row_of_spans(tokenizer: Tokenizer, rendered: _Rendered) -> RenderedRow:
    """A row whose spans carry loss; one without spans is plain text, to which the tokenizer may add BOS."""
    spans = rendered.spans
    if spans is not None and not tokenizer.is_fast:
        raise UserError("loss_on=all needs a tokenizer that reports token offsets; this one does not")
    with rust_panics("the tokenizer fails on this text"):
        encoded = tokenizer(
            rendered.full,
            add_special_tokens=spans is None,
            return_offsets_mapping=spans is not None,
            verbose=False,
        )
    tokens = np.asarray(encoded["input_ids"], dtype=np.int32)
    if len(tokens) < 2:
        raise UserError("fewer than two tokens; there is nothing to predict")
    if spans is None:
        weights = np.ones(len(tokens), dtype=np.float32)
    else:
        weights = weights_of(spans, np.asarray(encoded["offset_mapping"], dtype=np.int64))
    return RenderedRow(rendered.row_id, tokens, weights, rendered.prompt_id)


def _prompt_id(question: str) -> str:
    """16 hex digits that do not depend on the question's case, white space or Unicode composition."""
    text = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- Prompts ------------------------------------------------------------------------------------------------


def prompt_messages(question: str, system: str | None = SYSTEM_PROMPT) -> list[Message]:
    """The system turn, if there is one, and the user turn for a question."""
    asked = [{"role": "user", "content": question}]
    return asked if system is None else [{"role": "system", "content": system}, *asked]


def render_prompts(
    tokenizer: Tokenizer, questions: Sequence[str], system: str | None = SYSTEM_PROMPT
) -> list[list[int]]:
    """Token ids of the prompts for these questions: the same prefixes that their training rows would have.

    The questions are tokenised together.

    Raises:
      UserError: a question contains a control token; the message gives its number.
    """
    texts = []
    for number, question in enumerate(questions, start=1):
        try:
            texts.append(_prompt_text(tokenizer, prompt_messages(question, system), False))
        except UserError as error:
            raise UserError(f"question {number}: {error}") from None
    return encode_texts(tokenizer, texts)


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, enable_thinking: bool = False
) -> list[int]:
    """Token ids of the prompt for the next answer of a chat.

    Raises:
      UserError: a message contains a control token, or the template rejects the chat.
    """
    return encode_texts(tokenizer, [_prompt_text(tokenizer, messages, enable_thinking)])[0]


def _prompt_text(tokenizer: Tokenizer, messages: Sequence[Message], enable_thinking: bool) -> str:
    checked = check_prompt(list(messages), guard_of(tokenizer))
    return chat_text(tokenizer, checked, True, enable_thinking=enable_thinking)
