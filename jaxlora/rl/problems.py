"""Problems with a checkable answer.

problems = load_problems("embedded:data/train.jsonl")
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_jsonl
from jaxlora.runtime.remote import resolve


@dataclass(frozen=True)
class Problem:
    """A prompt and its reference answer. `raw` is the row that it came from."""

    id: str
    messages: list[dict]
    answer: str
    raw: dict


def load_problems(
    path: str, limit: int | None = None, *, system: str | None = None, suffix: str = ""
) -> list[Problem]:
    """The problems of a file, in its order."""
    rows = read_jsonl(resolve(path))[:limit]
    if not rows:
        raise UserError(f"{path}: holds no problems; it is empty")
    return [Problem(row["row_id"], row["messages"][:-1], row["expected_answer"], row) for row in rows]
