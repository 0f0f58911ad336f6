r"""Problems with a checkable answer, from files of several schemas and from generators.

    problems = load_problems("embedded:data/train.jsonl")
    problems = load_problems("math/train.jsonl", suffix=r" Write your answer in \boxed{} format.")
    problems = load_problems("reasoning_gym:chain_sum?size=1000&seed=0&max_terms=3")
    problems = load_problems("arithmetic:train?digits=2,1")

| Rows with | Reference |
|---|---|
| `messages` (the last turn's answer is left out) | `expected_answer`, else `answer`, else its last box |
| `question`, `final_answer` (DeepMath) | `final_answer` |
| `problem` or `question`, `solution` (MATH) | the last box of the solution, else `answer` |
| `question`, `answer` (GSM8K) | what follows the last `####`, else the last box, else the whole answer |
| `problem`, `expected_answer` or `answer` | that |
| `prompt` (text or messages), `answer` or `solution` | that, read as above |

No row is dropped silently: see `ProblemReport`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from jaxlora.data.boxes import last_box
from jaxlora.data.containers import Record, is_text, read_rows
from jaxlora.data.messages import ROLES
from jaxlora.data.sources import locate
from jaxlora.rl.arithmetic import SOURCE, arithmetic
from jaxlora.rl.grading import dataset
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console

GENERATED = "reasoning_gym:"
DEFAULT_SIZE, MAX_SIZE = 1000, 1_000_000
_QUESTIONS = ("problem", "question", "prompt")
_STATED = ("final_answer", "expected_answer")  # columns that contain only the reference
_IDS = ("id", "row_id", "unique_id", "example_id")


@dataclass(frozen=True)
class Problem:
    """A prompt and its reference answer. `raw` is the row that it came from."""

    id: str
    messages: list[dict]
    answer: str
    raw: dict


@dataclass(frozen=True)
class ProblemReport:
    """What was read: rows seen, problems made, and how many rows were skipped for each reason."""

    path: str
    rows: int
    used: int
    skipped: dict[str, int]

    def describe(self) -> str:
        """One line, such as `train.jsonl: 98 problems; skipped 2 rows: no box in the solution (2)`."""
        text = f"{self.path}: {self.used:,} problems"
        if not self.skipped:
            return text
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in self.skipped.items())
        count = sum(self.skipped.values())
        return f"{text}; skipped {count:,} row{'s' * (count > 1)}: {reasons}"


def load_problems(
    path: str, limit: int | None = None, *, system: str | None = None, suffix: str = ""
) -> list[Problem]:
    """The problems of a source, in its order; the number of skipped rows is printed.

    Args:
      path: a local file, `embedded:...`, `hf://OWNER/NAME/PATH`, `reasoning_gym:TASK?size=1000&seed=0`, or
        `arithmetic:SPLIT?digits=2,1`.
      limit: keep only the first `limit` problems; None: all.
      system: the system message; None: the row's own, if it has one; empty: none.
      suffix: text appended to every question.

    Raises:
      UserError: the source cannot be read, or has no usable problem.
    """
    problems, report = read_problems(path, limit, system=system, suffix=suffix)
    if report.skipped:
        console.print(report.describe(), markup=False)
    return problems


def read_problems(
    path: str, limit: int | None = None, *, system: str | None = None, suffix: str = ""
) -> tuple[list[Problem], ProblemReport]:
    """Like `load_problems`, but returns the report instead of printing it."""
    if limit is not None and limit < 1:
        raise UserError(f"the limit of problems is {limit}; it must be at least 1, or none")
    records: Iterator[tuple[str, Record | ValueError]]
    if path.startswith(SOURCE):
        records = arithmetic(path)
    else:
        records = _generated(path) if path.startswith(GENERATED) else _of_file(path)
    skipped: Counter[str] = Counter()
    problems: list[Problem] = []
    known: set[str] = set()
    rows = 0
    for place, record in records:
        rows += 1
        try:
            messages, answer = _read(record, system, suffix)
        except ValueError as error:
            skipped[str(error)] += 1
            continue
        raw = dict(record)  # type: ignore[arg-type]  # records that are errors were skipped
        problem_id = _id_of(raw, place, known)
        problems.append(Problem(problem_id, messages, answer, raw))
        if len(problems) == limit:
            break
    report = ProblemReport(path, rows, len(problems), dict(skipped.most_common()))
    if not rows:
        raise UserError(f"{path}: holds no problems; it is empty")
    if not problems:
        raise UserError(f"{report.describe()}; give rows with a question and its answer")
    return problems, report


def problems_hash(problems: Sequence[Problem], prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 over each prompt's tokens and its reference."""
    pairs = [[list(p), problem.answer] for problem, p in zip(problems, prompts, strict=True)]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


# --- Rows of files ------------------------------------------------------------------------------------------


def _of_file(path: str) -> Iterator[tuple[str, Record | ValueError]]:
    file = locate(path)
    stem = file.name.partition(".")[0]
    if not os.path.getsize(file):
        return
    for number, _, row in read_rows(file):
        yield f"{stem}-{number}", row


def _read(record: Record | ValueError, system: str | None, suffix: str) -> tuple[list[dict], str]:
    """Prompt and reference of a row.

    Raises:
      ValueError: the row cannot be used; the message is a generic reason, so that rows can be counted by it.
    """
    if isinstance(record, ValueError):
        raise ValueError("not a JSON object") from None
    if _is_generated(record):
        return _messages(record.get("question"), system, suffix), str(record.get("answer") or "")
    asked = next((record[name] for name in ("messages", *_QUESTIONS) if _is_there(record.get(name))), None)
    if asked is None:
        raise ValueError("no messages, problem, question or prompt")
    answered = None
    if isinstance(asked, list) and isinstance(asked[-1], dict) and asked[-1].get("role") == "assistant":
        answered, asked = asked[-1].get("content"), asked[:-1]
    messages = _messages(asked, system, suffix)
    answer = _reference(record, answered)
    if not is_text(answer):
        raise ValueError("the answer holds half a surrogate pair")
    return messages, answer


def _is_there(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != []


def _reference(record: Record, answered: Any) -> str:
    """The reference of a row, from its own columns or from its worked solution."""
    for name in _STATED:
        if _is_there(record.get(name)):
            return _as_text(record[name])
    solution = record.get("solution")
    if isinstance(solution, str) and (box := last_box(solution)) is not None and box.strip():
        return box.strip()
    answer = record.get("answer")
    if _is_there(answer):
        return _stated(answer)
    if _is_there(solution):
        raise ValueError("no box in the solution")
    if isinstance(answered, str) and (box := last_box(answered)) is not None and box.strip():
        return box.strip()
    raise ValueError("no answer")


def _stated(answer: Any) -> str:
    """The reference in an answer: what follows `####`, or the content of its last box, or the whole text."""
    if not isinstance(answer, str):
        return _as_text(answer)
    _, mark, last = answer.rpartition("####")
    if mark and not last.strip():
        raise ValueError("no value after ####")
    if not mark and "\\boxed{" in answer and (box := last_box(answer)) is not None and box.strip():
        return box.strip()
    return last.strip()


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the answer is {type(value).__name__}, neither text nor a number")
    return str(value)


def _messages(asked: Any, system: str | None, suffix: str) -> list[dict]:
    """The prompt: a single user turn, or the given messages, with the requested system message and suffix."""
    given = [{"role": "user", "content": asked}] if not isinstance(asked, list) else asked
    messages = []
    for message in given:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"a message of the prompt has none of the roles {', '.join(ROLES)}")
        if not is_text(message.get("content")):
            raise ValueError("the question, or a message of the prompt, is not text")
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("the prompt does not end with a question of the user")
    if system is not None:
        rest = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": system}, *rest] if system else rest
    messages[-1] = messages[-1] | {"content": messages[-1]["content"] + suffix}
    return messages


def _is_generated(record: Record) -> bool:
    return isinstance(record.get("entry"), dict) and {"task", "index", "options"} <= record.keys()


def _id_of(raw: Record, place: str, known: set[str]) -> str:
    """The row's own id if it has one that no earlier row used; otherwise its position."""
    own = next((str(raw[name]) for name in _IDS if isinstance(raw.get(name), str | int)), "")
    chosen = own if own and own not in known else place
    known.add(chosen)
    return chosen


# --- Generated ----------------------------------------------------------------------------------------------


def _generated(path: str) -> Iterator[tuple[str, Record]]:
    """Problems of a reasoning-gym task, determined by the options alone."""
    task, options = _task(path)
    try:
        made = dataset(task, json.dumps(options, sort_keys=True))
        for index in range(len(made)):
            entry = json.loads(json.dumps(made[index], default=str))
            answer = entry.get("answer")
            yield (
                f"{task}-{index}",
                {
                    "id": f"{task}-{index}",
                    "task": task,
                    "options": options,
                    "index": index,
                    "question": entry["question"],
                    "answer": "" if answer is None else str(answer),
                    "entry": entry,
                },
            )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _task(path: str) -> tuple[str, dict[str, Any]]:
    """The task's name and options in `reasoning_gym:TASK?size=1000&seed=0`."""
    task, _, query = path.removeprefix(GENERATED).partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else []
    except ValueError:
        raise UserError(f"{path}: write its options as ?size=1000&seed=0") from None
    options: dict[str, Any] = {"size": DEFAULT_SIZE, "seed": 0}
    for name, text in pairs:
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    for name, least, most in (("size", 1, MAX_SIZE), ("seed", 0, 2**31 - 1)):
        if not isinstance(options[name], int) or not least <= options[name] <= most:
            raise UserError(f"{path}: {name} must be a whole number from {least} to {most}")
    return task, options
