"""Rendered rows from JSONL: read, check, tokenise.

    rows, report = load_rendered_rows("rendered/train.jsonl", tokenizer, max_length=4096,
                                      on_bad_row="error", limit=None)

A line is `{"row_id": ..., "source": ..., "expected_answer": ..., "messages": [...]}`; only `messages` is
needed. A row that cannot be used (broken JSON, wrong types, no assistant turn, empty answer, an all-zero
mask, longer than the limit) stops the reading with its file and line. With `on_bad_row="skip"` it is left
out instead, counted by reason, and listed in the report. Nothing is cut and nothing is left out in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from jaxlora.data.render import RenderedRow, Tokenizer, render_batch
from jaxlora.data.sources import count_lines, locate, parse_object, read_lines
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import progress_bar

BATCH_ROWS = 512  # rows tokenised together
SHOWN_LINES = 5  # skipped lines named in the printed report


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be used, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class RowReport:
    """What was read: lines looked at, rows used, rows skipped and why, tokens in shifted counts."""

    path: str
    lines: int
    used: int
    skipped: tuple[BadRow, ...]
    tokens: int

    def describe(self) -> str:
        """One line, such as `train.jsonl: 98 rows, 21,004 tokens; skipped 2: empty answer (line 7) ...`."""
        text = f"{self.path}: {self.used:,} rows, {self.tokens:,} tokens"
        if not self.skipped:
            return text
        shown = "; ".join(f"line {bad.line}: {bad.reason}" for bad in self.skipped[:SHOWN_LINES])
        more = len(self.skipped) - SHOWN_LINES
        return f"{text}; skipped {len(self.skipped):,}: {shown}" + (
            f"; and {more:,} more" if more > 0 else ""
        )


def conversation_id(messages: Any) -> str:
    """The id of a row that names none: 20 hex digits of the SHA-256 of its messages as JSON."""
    text = json.dumps(messages, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:20]


def parse_rendered(line: bytes) -> dict[str, Any]:
    """One rendered JSONL line, types checked and `row_id` filled in; the renderer checks the messages.

    Raises:
      ValueError: broken JSON, a missing field or a wrong type; the message has no place in it.
    """
    row = parse_object(line)
    if "messages" not in row:
        raise ValueError("no field 'messages'; rendered rows have one, raw rows have to be rendered first")
    for name in ("row_id", "source", "expected_answer"):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise ValueError(f"{name} is {type(row[name]).__name__}, not text")
    row["row_id"] = row.get("row_id") or conversation_id(row["messages"])
    return row


def iter_rendered(
    path: Path, tokenizer: Tokenizer, max_length: int | None
) -> Iterator[tuple[int, RenderedRow | UserError]]:
    """Stream `(line, rendered row or what is wrong with it)` in file order. `max_length` is in tokens."""
    lines = read_lines(path)
    while batch := list(islice(lines, BATCH_ROWS)):
        results: dict[int, RenderedRow | UserError] = {}
        good: list[tuple[int, dict[str, Any]]] = []
        for number, line in batch:
            try:
                good.append((number, parse_rendered(line)))
            except ValueError as error:
                results[number] = UserError(str(error))
        rendered = render_batch(tokenizer, [(row["row_id"], row["messages"]) for _, row in good])
        for (number, _), result in zip(good, rendered, strict=True):
            if max_length is not None and isinstance(result, RenderedRow) and len(result.tokens) > max_length:
                result = UserError(f"{len(result.tokens)} tokens, longer than the limit of {max_length}")
            results[number] = result
        yield from ((number, results[number]) for number, _ in batch)


def load_rendered_rows(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_bad_row: Literal["error", "skip"] = "error",
    limit: int | None = None,
) -> tuple[list[RenderedRow], RowReport]:
    """All rows of a rendered JSONL file (local or `hf://`), or the first `limit` usable ones, in file order.

    Raises:
      UserError: a row cannot be used and `on_bad_row` is "error" (names file and line); or none can be used.
    """
    file = locate(path)
    rows: list[RenderedRow] = []
    skipped: list[BadRow] = []
    seen = 0
    total = count_lines(file)
    with progress_bar(f"tokenising {file.name}", min(limit or total, total), "rows") as advance:
        for number, result in iter_rendered(file, tokenizer, max_length):
            seen = number
            if isinstance(result, RenderedRow):
                rows.append(result)
            elif on_bad_row == "error":
                raise UserError(f"{path}:{number}: {result}; fix it, or set --config.data.on_bad_row=skip")
            else:
                skipped.append(BadRow(number, str(result)))
            advance(1)
            if limit is not None and len(rows) == limit:
                break
    if not rows:
        reasons = Counter(bad.reason for bad in skipped).most_common(1)
        raise UserError(
            f"{path}: no usable row" + (f"; most are bad because: {reasons[0][0]}" if reasons else "")
        )
    return rows, RowReport(str(path), seen, len(rows), tuple(skipped), sum(row.n_tokens for row in rows))
