r"""Row formats: which keys each has, and how a record is converted to messages.

    row_format = find_format({"instruction": "Add", "input": "2 3", "output": "5"})     # Alpaca
    example = to_example(row_format, record)         # messages: "Add\n\n2 3" by the user, "5" as the answer

A file has one format, that of its first row. No system text is invented, nothing is truncated, and a key that
the format does not know is refused by name, because it could change what the row means.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jaxlora.data.containers import is_text
from jaxlora.data.messages import LOSS_KEYS, Example, Message

Record = dict[str, Any]
NAMED = ("row_id", "source", "expected_answer")  # text about a row, never rendered
ABOUT = {*NAMED, "id", "uuid", "idx", "index", "dataset", "category", "language", "lang", "tags", "metadata"}
ABOUT |= {"license", "prompt_id", "topic", "difficulty", "url", "created_at"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {
    name: name for name in ("user", "assistant", "system")
}
_SHOWN_KEYS, _COMPARED_KEYS = 12, 100  # keys of a row that fits no format


@dataclass(frozen=True)
class Format:
    """A row format: its required keys, its optional keys, and how it converts to messages."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    messages: Callable[[Record], list[Message]]


def conversation_id(messages: Any) -> str:
    """The id of a row that has none: 20 hex digits of the SHA-256 of its messages as JSON."""
    text = json.dumps(messages, ensure_ascii=True, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:20]


def find_format(record: Record) -> Format:
    """The format of a record: the first of `FORMATS` whose required keys it has.

    Raises:
      ValueError: no format fits; the message lists the keys found and the nearest format.
    """
    keys = _present(record)
    for row_format in FORMATS:
        if keys.issuperset(row_format.needs):
            return row_format
    raise ValueError(_no_format(keys))


def to_example(row_format: Format, record: Record, ignore: Collection[str] = ()) -> Example:
    """Convert a record of this format to messages, or to plain text.

    Args:
      ignore: keys that the user asked to leave out.

    Raises:
      ValueError: a key is missing, unknown, or of the wrong type; the message gives no position.
    """
    record = {key: value for key, value in record.items() if value is not None and key not in ignore}
    for key in row_format.needs:
        if key not in record:
            raise ValueError(_missing(row_format, key))
    known = {*row_format.needs, *row_format.may}
    unknown = [key for key in record if key not in known and key not in ABOUT]
    if unknown:
        raise ValueError(
            f"has the key {unknown[0]!r}, which the format {row_format.name} does not use; remove it, or name"
            " it in data.ignore_columns"
        )
    for name in NAMED:
        if not isinstance(value := record.get(name, ""), str):
            raise ValueError(f"{name} is {type(value).__name__}, not text")
        if not is_text(value):
            raise ValueError(f"{name} holds half a surrogate pair, which is not text")
    if row_format is TEXT:
        text = _text(record, "text")
        return Example(record.get("row_id") or conversation_id(text), [], text=text)
    messages = row_format.messages(record)
    return Example(record.get("row_id") or conversation_id(messages), messages, _tools(record))


def choose_columns(record: Record, columns: Mapping[str, str]) -> Record:
    """The record reduced to these columns, renamed to the format's own keys: `{"prompt": "question"}`.

    Raises:
      ValueError: one of the columns is missing.
    """
    for column in columns.values():
        if column not in record:
            raise ValueError(f"no column {column!r}; it has {_listed(record)}")
    return {name: record[column] for name, column in columns.items()}


# --- Conversion of each format ------------------------------------------------------------------------------


def _of_messages(record: Record) -> list[Message]:
    return record["messages"]  # checked when they are rendered


def _of_sharegpt(record: Record) -> list[Message]:
    """Turns with `from` and `value`; turns that already have `role` and `content` are used as they are."""
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"conversations is {type(turns).__name__}, not a list")
    if turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return _with_system(record, turns)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is {type(turn).__name__}, not an object")
        unknown = [k for k, v in turn.items() if v is not None and k not in ("from", "value", *LOSS_KEYS)]
        if unknown:
            raise ValueError(f"turn {number} has the key {unknown[0]!r}, which is not used; remove it")
        if turn.get("from") not in list(_SHAREGPT_ROLES):  # a list, because the value may not be hashable
            known = ", ".join(_SHAREGPT_ROLES)
            raise ValueError(f"turn {number} is from {turn.get('from')!r:.50}; allowed are {known}")
        rest = {key: turn[key] for key in LOSS_KEYS if turn.get(key) is not None}
        messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")} | rest)
    return _with_system(record, messages)


def _of_alpaca(record: Record) -> list[Message]:
    """The user turn is the instruction and the input, separated by an empty line."""
    asked, given = _text(record, "instruction"), _text(record, "input")
    return _with_system(record, _pair(f"{asked}\n\n{given}" if given.strip() else asked, record["output"]))


def _of_prompt(record: Record) -> list[Message]:
    """Strings are one turn each. In a list of messages, answers within the prompt carry no loss."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _with_system(record, _pair(prompt, completion))
    for name in ("prompt", "completion"):
        if not isinstance(record[name], str | list):
            raise ValueError(f"{name} is {type(record[name]).__name__}, neither text nor a list of messages")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return _with_system(record, [*map(_without_loss, asked), *answer])


def _of_question(record: Record) -> list[Message]:
    return _with_system(record, _pair(record["question"], record["answer"]))


def _without_loss(message: Any) -> Any:
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message
    return {key: value for key, value in message.items() if key != "train"} | {"weight": 0}


def _pair(asked: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    system = _text(record, "system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _text(record: Record, name: str) -> str:
    value = record.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    return value


def _tools(record: Record) -> Any:
    """The tool definitions; some datasets store them as a JSON string."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            return json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError("tools is text that is not JSON; give a list of tool definitions") from None
    if record.get("chat_template_kwargs"):
        raise ValueError(
            "has the key 'chat_template_kwargs': a row cannot set the template's variables; remove it"
            " (data.enable_thinking switches thoughts on)"
        )
    return tools or None


_TEMPLATE_KEYS = ("tools", "chat_template_kwargs")
MESSAGES = Format("messages", ("messages",), _TEMPLATE_KEYS, _of_messages)
TEXT = Format("text", ("text",), (), lambda record: [])
FORMATS = (
    MESSAGES,
    Format("ShareGPT", ("conversations",), ("system", *_TEMPLATE_KEYS), _of_sharegpt),
    Format("Alpaca", ("instruction", "output"), ("input", "system", "text"), _of_alpaca),  # text: all as one
    Format("prompt/completion", ("prompt", "completion"), ("system", *_TEMPLATE_KEYS), _of_prompt),
    Format("question/answer", ("question", "answer"), ("system",), _of_question),
    TEXT,
)


# --- Rows that fit no format --------------------------------------------------------------------------------


def _present(record: Record) -> set[str]:
    return {key for key, value in record.items() if value is not None}


def _missing(row_format: Format, key: str) -> str:
    if row_format is MESSAGES:
        return "no field 'messages'; rendered rows have one, raw rows have to be rendered first"
    needed = ", ".join(row_format.needs)
    return f"no field {key!r}; the first row is of the format {row_format.name}, which needs {needed}"


def _no_format(keys: set[str]) -> str:
    candidates = [(_likeness(row_format, keys), row_format) for row_format in FORMATS]
    likeness, nearest = max(candidates, key=lambda pair: pair[0])
    if not likeness:
        nearest = next(row_format for row_format in FORMATS if row_format.name == "prompt/completion")
    example = ",".join(f"{key}=COLUMN" for key in nearest.needs)
    return (
        f"no field 'messages', and no other format fits; the row has {_listed(keys)}; the nearest format is"
        f" {nearest.name} ({', '.join(nearest.needs)}): name its columns with --config.data.columns={example}"
    )


def _likeness(row_format: Format, keys: set[str]) -> float:
    """The fraction of a format's required keys that closely match one of these keys, from 0 to 1."""
    names = [key[:50] for key in sorted(keys)[:_COMPARED_KEYS]]
    found = [difflib.get_close_matches(need, names, 1, 0.7) for need in row_format.needs]
    return sum(map(bool, found)) / len(found)


def _listed(keys: Collection[str]) -> str:
    names = sorted(keys)
    more = len(names) - _SHOWN_KEYS
    shown = ", ".join(f"{name!r:.50}" for name in names[:_SHOWN_KEYS])
    return f"the keys {shown}{f' and {more} more' if more > 0 else ''}" if names else "no keys"
