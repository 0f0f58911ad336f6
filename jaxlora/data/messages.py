"""A row once its format is known, and what its messages may contain.

    example = Example("a1", [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}])
    turns = check_messages(example, guard)        # what the chat template is given, and which turns may learn

An unknown key could change what a row means, so it is refused by name and never dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxlora.data.containers import is_text, strings_of
from jaxlora.data.control import Guard
from jaxlora.runtime.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")  # and "tool", after an assistant turn that calls tools
LOSS_KEYS = ("weight", "train")  # in an assistant turn, 0 or false excludes it from the loss
MESSAGE_KEYS: dict[str, tuple[str, ...]] = {
    "system": ("role", "content", *LOSS_KEYS),
    "user": ("role", "content", *LOSS_KEYS),
    "assistant": ("role", "content", *LOSS_KEYS, "reasoning_content", "tool_calls"),
    "tool": ("role", "content", *LOSS_KEYS, "name", "tool_call_id"),
}
MAX_MESSAGES, MAX_CHARACTERS = 1000, 4_000_000  # a longer conversation would take minutes to tokenise
THOUGHTS = ("<think>", "</think>")
_THOUGHTS_FIRST = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A row of any format: a conversation, plus whatever else its template needs, or plain text."""

    row_id: str
    messages: list[Message]
    tools: Any = None  # tool definitions, as the chat template takes them
    text: str | None = None  # plain language modelling: no template, and every token carries loss


@dataclass(frozen=True)
class Turn:
    """A checked message: what the chat template receives, and how the turn is trained on."""

    message: Message
    learns: bool  # an assistant turn not excluded from the loss by `weight` or `train`
    thinks: bool  # contains thoughts, as `reasoning_content` or in <think>

    @property
    def is_empty(self) -> bool:
        """Whether the turn, apart from its thoughts, neither says anything nor calls a tool."""
        said = self.message["content"].rpartition(THOUGHTS[1])[2]
        return not said.strip() and "tool_calls" not in self.message


def check_messages(example: Example, guard: Guard, enable_thinking: bool = False) -> list[Turn]:
    """The turns of a conversation that can be trained on, that is, one ending in an answer to a user turn.

    Raises:
      UserError: it cannot; says what is wrong, and in which message.
    """
    messages = example.messages
    if not isinstance(messages, list):
        raise UserError(f"messages is {type(messages).__name__}, not a list")
    if len(messages) > MAX_MESSAGES:
        raise UserError(f"{len(messages)} messages; at most {MAX_MESSAGES} can be rendered")
    turns: list[Turn] = []
    characters = check_tools(example.tools, guard)
    called = False
    for index, message in enumerate(messages, start=1):
        place = f"message {index}"
        _check_shape(place, message, called)
        called = called or bool(message.get("tool_calls"))
        turn = _turn(place, message, enable_thinking)
        characters += _check_strings(place, turn.message, guard)  # as rendered: arguments may arrive escaped
        if characters > MAX_CHARACTERS:
            raise UserError(f"more than {MAX_CHARACTERS} characters; a conversation of a book cannot be used")
        turns.append(turn)
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("no assistant turn at the end")
    if turns[-1].is_empty:
        raise UserError("empty answer")
    if all(message["role"] != "user" for message in messages):
        raise UserError("no user turn before the answer")
    return turns


def check_prompt(messages: list[Message], guard: Guard) -> list[Message]:
    """Check messages that a model is asked to answer, such as a benchmark's question or a chat so far.

    Raises:
      UserError: one of them would put a control token into the prompt.
    """
    for index, message in enumerate(messages, start=1):
        _check_strings(f"message {index}", message, guard)
    return messages


def check_text(text: str, guard: Guard) -> None:
    """Check plain text for training.

    Raises:
      UserError: it is empty, too long, or contains a control token.
    """
    if not text.strip():
        raise UserError("empty text")
    _check_each("text", iter([text]), guard, special_only=False)


def check_tools(tools: Any, guard: Guard) -> int:
    """The number of characters in a row's tool definitions: a list of objects without control tokens.

    Raises:
      UserError: they are anything else.
    """
    if not tools:
        return 0
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools is not a list of tool definitions, each an object")
    return _check_each("tools", strings_of(tools), guard, special_only=False)


def _check_shape(place: str, message: Any, called: bool) -> None:
    if not isinstance(message, dict):
        raise UserError(f"{place} is {type(message).__name__}, not an object")
    role, content = message.get("role"), message.get("content")
    if role == "tool" and not called:
        raise UserError(f"{place} has role 'tool', but no turn before it calls a tool")
    if role != "tool" and role not in ROLES:
        raise UserError(f"{place} has role {role!r}; allowed are {', '.join(ROLES)}")
    unknown = [key for key, value in message.items() if value is not None and key not in MESSAGE_KEYS[role]]
    if unknown:
        raise UserError(
            f"{place} has the key {unknown[0]!r}, which is not used; remove it (a message of role {role} has"
            f" {', '.join(MESSAGE_KEYS[role])})"
        )
    if content is None and message.get("tool_calls"):
        return  # an answer that only calls tools
    if not isinstance(content, str):
        raise UserError(f"{place} has content of type {type(content).__name__}, not text")


def _check_strings(place: str, message: Message, guard: Guard) -> int:
    """The number of characters in a message, checked for control tokens that its author cannot write.

    An answer may contain tokens that a model writes itself, such as `<tool_call>`, but none that ends it.
    """
    answer = message["role"] == "assistant"
    rest = [value for key, value in message.items() if key not in ("role", "content")]
    characters = _check_each(place, strings_of(message.get("content")), guard, special_only=answer)
    return characters + _check_each(place, strings_of(rest), guard, special_only=False)


def _check_each(place: str, texts: Iterator[str], guard: Guard, special_only: bool) -> int:
    characters = 0
    for text in texts:
        if not is_text(text):
            raise UserError(f"{place} holds half a surrogate pair, which is not text")
        if (characters := characters + len(text)) > MAX_CHARACTERS:
            raise UserError(f"more than {MAX_CHARACTERS} characters; a conversation of a book cannot be used")
        if control := guard.find(text, special_only):
            raise UserError(f"{place} holds the control token {control!r}; write it another way")
    return characters


def _turn(place: str, message: Message, enable_thinking: bool) -> Turn:
    rendered = {key: value for key, value in message.items() if value is not None and key not in LOSS_KEYS}
    if message["role"] != "assistant":
        _check_loss_keys(place, message, allowed=(0, False))
        return Turn(rendered, learns=False, thinks=False)
    rendered.setdefault("content", "")
    if not rendered.get("tool_calls"):
        rendered.pop("tool_calls", None)
    else:
        rendered["tool_calls"] = _tool_calls(place, rendered["tool_calls"])
    learns = _check_loss_keys(place, message, allowed=(0, 1))
    return Turn(rendered, learns, _thinks(place, rendered, enable_thinking))


def _check_loss_keys(place: str, message: Message, allowed: tuple[int, int]) -> bool:
    """Whether the message takes part in the loss: neither `weight` nor `train` excludes it."""
    learns = True
    for key in LOSS_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in allowed:
            kinds = "0 or 1" if 1 in allowed else "0, because only answers are trained on"
            raise UserError(f"{place} has {key} {value!r:.50}; it must be {kinds}")
        learns = learns and bool(value)
    return learns


def _thinks(place: str, message: Message, enable_thinking: bool) -> bool:
    thoughts, content = message.get("reasoning_content"), message["content"]
    tagged = any(tag in content for tag in THOUGHTS)
    if thoughts is not None and not isinstance(thoughts, str):
        raise UserError(f"{place} has reasoning_content of type {type(thoughts).__name__}, not text")
    if not thoughts and not tagged:
        message.pop("reasoning_content", None)
        return False
    where = "reasoning_content" if thoughts else "<think>"
    if not enable_thinking:
        raise UserError(
            f"{place} holds thoughts ({where}), but thinking is off, so the full render does not begin with"
            " the prompt prefix; set data.enable_thinking, or remove the thoughts"
        )
    if thoughts and any(tag in thoughts for tag in THOUGHTS):
        raise UserError(f"{place} has <think> or </think> in reasoning_content; give the bare thoughts")
    if tagged and (thoughts or not _THOUGHTS_FIRST.fullmatch(content)):
        raise UserError(f"{place}: thoughts must be one <think>...</think> at the beginning of the answer")
    return True


def _tool_calls(place: str, calls: Any) -> list[Message]:
    """The calls with their arguments as objects, which templates expect; OpenAI's are JSON strings."""
    if not isinstance(calls, list):
        raise UserError(f"{place} has tool_calls of type {type(calls).__name__}, not a list")
    return [_tool_call(f"{place}, tool call {number}", call) for number, call in enumerate(calls, start=1)]


def _tool_call(place: str, call: Any) -> Message:
    outer = {key: value for key, value in call.items() if value is not None} if isinstance(call, dict) else {}
    inner = outer.get("function") if "function" in outer else outer
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise UserError(f"{place} has no function with a name")
    known = ("function", "id", "type") if "function" in outer else ("name", "arguments", "id", "type")
    unknown = [key for key in outer if key not in known] + (
        [key for key in inner if key not in ("name", "arguments")] if inner is not outer else []
    )
    if unknown or outer.get("type", "function") != "function":
        raise UserError(f"{place} has the key {(unknown or ['type'])[0]!r}, which cannot be rendered")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"{place} has arguments that are not a JSON object")
    inner = inner | {"arguments": arguments}
    return outer | {"function": inner} if "function" in outer else inner
