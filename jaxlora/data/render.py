"""The one renderer: from messages to token ids and loss weights.

    tokenizer = load_tokenizer("Qwen/Qwen3-8B")
    (row,) = render_batch(tokenizer, [("a1", messages)])            # training: a RenderedRow or a UserError
    (prompt,) = render_prompts(tokenizer, ["What is 2 + 3?"])       # evaluation

Training and evaluation both come through here, so they cannot disagree about the template. The text is what
the tokenizer's own chat template writes with thinking off, and it is tokenised in one go.

The prompt prefix is the same conversation up to the last assistant turn, with the generation prompt. Loss
weights are 0 up to the prefix's length and 1 after it: the answer, `<|im_end|>` and the newline after it
carry loss. In a conversation of several turns only the last assistant turn carries loss.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlora.data.limits import bounded
from jaxlora.data.sources import is_text
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.folders import file_in
from jaxlora.runtime.remote import TOKENIZER_SUFFIXES, announce, is_remote, mirror, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # importing transformers takes seconds, and most of the data tools never tokenise
    Tokenizer = Any

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
MAX_MESSAGES, MAX_CHARACTERS = 1000, 4_000_000  # a longer conversation would take minutes to tokenise
TEMPLATE_SECONDS, TEMPLATE_BYTES = 10.0, 2**30  # what rendering one conversation may take

SYSTEM_PROMPT = (
    "You are a careful math solver. Solve the problem step by step. Put the final answer in \\boxed{}."
)


@dataclass(frozen=True)
class RenderedRow:
    """One conversation as tokens. `tokens` is int32 [length], `weights` float32 [length], both unshifted."""

    row_id: str
    tokens: np.ndarray
    weights: np.ndarray

    @property
    def n_tokens(self) -> int:
        """The row's token count as the study counts it: its inputs, that is its length minus one."""
        return len(self.tokens) - 1

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt prefix, which carry no loss."""
        return int(len(self.weights) - np.count_nonzero(self.weights))


def shifted(row: RenderedRow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and target weights, each [length - 1]: position i predicts token i + 1."""
    return row.tokens[:-1], row.tokens[1:], row.weights[1:]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a local directory, `embedded:NAME`, a bucket or a Hub model, with its chat template.

    No code of the model's repository is run, and no link out of its folder is followed.

    Raises:
      UserError: there is none, it cannot be read, or it has no chat template.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # to install PyTorch, which nothing needs
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
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if is_local else name, trust_remote_code=False, local_files_only=is_local
        )
        tokenizer.decode(encode_texts(tokenizer, ["a"])[0])  # wrong settings show when they are first used
        tokenizer.all_special_tokens, tokenizer.eos_token_id  # noqa: B018
    except Exception as error:  # transformers and the Hub client raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tokenizer {name!r}: cannot be loaded: {reason}") from None
    if not tokenizer.chat_template:
        raise UserError(f"tokenizer {name!r}: has no chat template; use the tokenizer of a chat model")
    return tokenizer


def chat_text(tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool) -> str:
    """The chat template's own text, thinking off.

    Raises:
      UserError: the template refuses these messages.
    """
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, enable_thinking=False
            )
    except Exception as error:  # templates raise jinja's errors and, through missing fields, Python's
        reason = str(error) or type(error).__name__
        raise UserError(f"the chat template refuses the conversation: {reason}") from None
    assert isinstance(text, str), type(text)
    if not is_text(text):
        raise UserError("the chat template writes half a surrogate pair, which is not text")
    return text


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that already hold their control tokens; nothing is added or cut."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def check_messages(messages: Any, control_tokens: Sequence[str] = ()) -> None:
    """A conversation that can be trained on ends with a non-empty assistant turn after a user turn.

    Raises:
      UserError: it does not; says what is wrong.
    """
    if not isinstance(messages, list):
        raise UserError(f"messages is {type(messages).__name__}, not a list")
    if len(messages) > MAX_MESSAGES:
        raise UserError(f"{len(messages)} messages; at most {MAX_MESSAGES} can be rendered")
    characters = 0
    for index, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"message {index} is {type(message).__name__}, not an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message {index} has role {role!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"message {index} has content of type {type(content).__name__}, not text")
        if not is_text(content):
            raise UserError(f"message {index} holds half a surrogate pair, which is not text")
        if (characters := characters + len(content)) > MAX_CHARACTERS:
            raise UserError(f"more than {MAX_CHARACTERS} characters; a conversation of a book cannot be used")
        for control in control_tokens:
            if control in content:  # it would become the control token and end the turn early
                raise UserError(f"message {index} holds the control token {control!r}")
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("no assistant turn at the end")
    if not messages[-1]["content"].strip():
        raise UserError("empty answer")
    if all(message["role"] != "user" for message in messages):
        raise UserError("no user turn before the answer")


def render_batch(
    tokenizer: Tokenizer, conversations: Sequence[tuple[str, list[Message]]]
) -> list[RenderedRow | UserError]:
    """Render `(row_id, messages)` pairs; a conversation that cannot be used gives its `UserError` instead.

    Batches are tokenised together, which is many times faster than one conversation at a time.
    """
    control = tokenizer.all_special_tokens
    results: list[RenderedRow | UserError | None] = [None] * len(conversations)
    texts: list[str] = []
    places: list[int] = []
    for place, (_, messages) in enumerate(conversations):
        try:
            check_messages(messages, control)
            prefix = chat_text(tokenizer, messages[:-1], generation_prompt=True)
            full = chat_text(tokenizer, messages, generation_prompt=False)
        except UserError as error:
            results[place] = error
        else:
            texts += [prefix, full]
            places.append(place)
    ids = encode_texts(tokenizer, texts)
    for place, prefix_ids, full_ids in zip(places, ids[0::2], ids[1::2], strict=True):
        row_id = conversations[place][0]
        try:
            results[place] = _row(row_id, prefix_ids, full_ids)
        except UserError as error:
            results[place] = error
    return results  # type: ignore[return-value]  # every place is filled above


def _row(row_id: str, prefix: list[int], full: list[int]) -> RenderedRow:
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
    return RenderedRow(row_id, tokens, weights)


def prompt_messages(question: str) -> list[Message]:
    """System and user turn of a question."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


def render_prompts(tokenizer: Tokenizer, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompts that ask these questions: the prefixes that training rows of them would have.

    They are tokenised together.
    """
    return encode_texts(tokenizer, [chat_text(tokenizer, prompt_messages(q), True) for q in questions])
