"""Training rows from a file or a Hub dataset: read, convert to messages, check, tokenise.

    rows, report = load_rendered_rows("rendered/train.jsonl", tokenizer, max_length=4096,
                                      on_bad_row="error", limit=None)
    print(report.describe())        # names the format that was found

A line of the study is `{"row_id": ..., "source": ..., "expected_answer": ..., "messages": [...]}`; only
`messages` is required, and `formats` supports other kinds. A row that cannot be used (broken JSON, wrong
types, no assistant turn, empty answer, an all-zero mask, longer than the limit) is an error that names its
file and line. With `on_bad_row="skip"` it is left out instead, counted by reason, and listed in the report.
Nothing is truncated, and nothing is dropped silently.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxlora.config import DataConfig
from jaxlora.data.cache import RowCache
from jaxlora.data.containers import container_of, count_rows, parse_object, read_rows, strings_of
from jaxlora.data.control import guard_of
from jaxlora.data.formats import MESSAGES, Format, choose_columns, find_format, to_example
from jaxlora.data.messages import Example
from jaxlora.data.render import LossOn, RenderedRow, Tokenizer, render_batch
from jaxlora.data.sources import locate, read_hub
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import sha256_of
from jaxlora.runtime.progress import progress_bar

BATCH_ROWS = 512  # rows tokenised together
BATCH_BYTES = 4 * 2**20  # but no more bytes than this, or a single row
SHOWN_LINES = 5  # skipped lines named in the printed report


@dataclass(frozen=True)
class RowOptions:
    """How to interpret rows.

    Only `columns` are read, renamed to the format's own keys (`{"prompt": "question"}`); `ignore_columns` are
    left out; `split` names the split of a Hub dataset.
    """

    loss_on: LossOn = "last"
    enable_thinking: bool = False
    columns: Mapping[str, str] | None = None
    ignore_columns: Collection[str] = ()
    split: str | None = None

    @classmethod
    def of(cls, data: DataConfig) -> RowOptions:
        """The options set in the configuration."""
        return cls(
            loss_on=data.loss_on,
            enable_thinking=data.enable_thinking,
            columns=dict(pair.split("=", 1) for pair in data.columns) or None,
            ignore_columns=data.ignore_columns,
            split=data.split,
        )


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be used, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class RowReport:
    """What was read: lines seen, rows used, rows skipped and why, and the shifted token count.

    `duplicates` counts used rows with the same tokens and weights as an earlier one. `sha256` is of the whole
    file as it was read; None for a split of a Hub dataset.
    """

    path: str
    lines: int
    used: int
    skipped: tuple[BadRow, ...]
    tokens: int
    kind: str = ""  # format and container, such as "Alpaca rows in CSV"
    duplicates: int = 0
    sha256: str | None = None

    @classmethod
    def of(cls, path: str, values: dict[str, Any]) -> RowReport:
        """Restore a report that was saved as a dictionary, for the file at this path."""
        skipped = tuple(BadRow(**bad) for bad in values["skipped"])
        return cls(**(values | {"path": path, "skipped": skipped}))

    def describe(self) -> str:
        """One line, such as `train.jsonl: 98 rows, 21,004 tokens; skipped 2: empty answer (line 7) ...`."""
        text = f"{self.path}: {self.used:,} rows, {self.tokens:,} tokens"
        if self.kind:
            text += f" ({self.kind})"
        if self.duplicates:
            text += f"; {self.duplicates:,} are copies of earlier rows"
        if not self.skipped:
            return text
        shown = "; ".join(f"line {bad.line}: {bad.reason}" for bad in self.skipped[:SHOWN_LINES])
        more = len(self.skipped) - SHOWN_LINES
        return f"{text}; skipped {len(self.skipped):,}: {shown}" + (
            f"; and {more:,} more" if more > 0 else ""
        )


def parse_rendered(line: bytes) -> dict[str, Any]:
    """Parse one rendered JSONL line: checks keys and types and fills in `row_id`; messages are checked later.

    Raises:
      ValueError: broken JSON, a missing or unknown field, or a wrong type; the message gives no position.
    """
    row = parse_object(line)
    return row | {"row_id": to_example(MESSAGES, row).row_id}


class _Reader:
    """Converts the records of one file; the first that fits a format decides for all."""

    def __init__(self, options: RowOptions) -> None:
        self.options = options
        self.format: Format | None = None

    def read(self, record: dict[str, Any] | ValueError) -> Example:
        """Convert a record; raises `ValueError` if it is an error itself or does not fit the format."""
        if isinstance(record, ValueError):
            raise record
        if self.options.columns is not None:
            record = choose_columns(record, self.options.columns)
        self.format = self.format or find_format(record)
        return to_example(self.format, record, self.options.ignore_columns)


def iter_rendered(
    records: Iterator[tuple[int, int, dict[str, Any] | ValueError]],
    tokenizer: Tokenizer,
    max_length: int | None,
    reader: _Reader,
    most: int | None = None,
) -> Iterator[tuple[int, RenderedRow | UserError]]:
    """Stream `(line, rendered row or the error)` in file order.

    Args:
      records: `(line, bytes, record)`; the number held at once is bounded by their bytes.
      max_length: in tokens.
      most: the number of rows needed; no more are read ahead.
    """
    options = reader.options
    used = 0
    while batch := _take(records, BATCH_ROWS if most is None else min(BATCH_ROWS, most - used)):
        results: dict[int, RenderedRow | UserError] = {}
        good: list[tuple[int, Example]] = []
        for number, record in batch:
            try:
                example = reader.read(record)
                _check_size(example, guard_of(tokenizer).longest_token, max_length)
                good.append((number, example))
            except (ValueError, UserError) as error:
                results[number] = UserError(str(error))
        rendered = render_batch(
            tokenizer,
            [example for _, example in good],
            loss_on=options.loss_on,
            enable_thinking=options.enable_thinking,
        )
        for (number, _), result in zip(good, rendered, strict=True):
            if max_length is not None and isinstance(result, RenderedRow) and len(result.tokens) > max_length:
                result = UserError(f"{len(result.tokens)} tokens, longer than data.max_length, {max_length}")
            results[number] = result
            used += isinstance(result, RenderedRow)
        yield from ((number, results[number]) for number, _ in batch)


def _take(records: Iterator[tuple[int, int, Any]], rows: int) -> list[tuple[int, Any]]:
    """The next records: at most `rows`, and about `BATCH_BYTES` unless a single one exceeds that."""
    batch: list[tuple[int, Any]] = []
    held = 0
    while len(batch) < rows and held < BATCH_BYTES and (record := next(records, None)):
        batch.append((record[0], record[2]))
        held += record[1]
    return batch


def _check_size(example: Example, longest_token: int, max_length: int | None) -> None:
    """Refuse a row with far too many characters before spending minutes and gigabytes on tokenising it."""
    messages = example.messages if isinstance(example.messages, list) else []  # checked later
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    characters = sum(map(len, strings_of([example.text, *contents])))
    at_least = characters // longest_token
    if max_length is not None and at_least > max_length:
        raise UserError(f"at least {at_least} tokens, longer than data.max_length, {max_length}")


def load_rendered_rows(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_bad_row: Literal["error", "skip"] = "error",
    limit: int | None = None,
    options: RowOptions | None = None,
    cache: RowCache | None = None,
) -> tuple[list[RenderedRow], RowReport]:
    """All rows of a file (local or `hf://`) or Hub dataset, or the first `limit` usable ones, in file order.

    Args:
      cache: where the rows of a large file are looked up first, and stored.

    Raises:
      UserError: a row cannot be used and `on_bad_row` is "error" (names file and line); or no row can be
        used; or the file changed while it was read.
    """
    reader = _Reader(options or RowOptions())
    file = None if reader.options.split is not None else locate(path)
    sha256 = None if file is None else sha256_of(file)
    key = None
    if cache is not None and file is not None and sha256 is not None:
        given = {"max_length": max_length, "on_bad_row": on_bad_row, "limit": limit}
        key = cache.key(file, sha256, given | dataclasses.asdict(reader.options))
        if key is not None and (found := cache.read(key)) is not None:
            return found[0], RowReport.of(str(path), found[1])
    records, total, container = _open(str(path), reader.options)
    rows: list[RenderedRow] = []
    skipped: list[BadRow] = []
    seen = 0
    shown = limit if total is None else min(limit or total, total)
    with progress_bar(f"tokenising {Path(path).name}", shown, "rows") as advance:
        for number, result in iter_rendered(records, tokenizer, max_length, reader, limit):
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
    if file is not None and sha256_of(file) != sha256:  # the rows may match neither version
        raise UserError(f"{path}: changed while it was being read; run the same command again")
    kind = f"{reader.format.name} rows in {container}" if reader.format else ""
    tokens = sum(row.n_tokens for row in rows)
    copies = count_duplicates(rows)
    report = RowReport(str(path), seen, len(rows), tuple(skipped), tokens, kind, copies, sha256)
    if cache is not None and key is not None:
        cache.keep(key, rows, dataclasses.asdict(report))
    return rows, report


def count_duplicates(rows: list[RenderedRow]) -> int:
    """The number of rows with the same tokens and weights as an earlier one."""
    distinct = {hashlib.sha256(row.tokens.tobytes() + row.weights.tobytes()).digest() for row in rows}
    return len(rows) - len(distinct)


def _open(source: str, options: RowOptions) -> tuple[Iterator[tuple[int, int, Any]], int | None, str]:
    """The records of a file or Hub dataset as `(line, bytes, record)`, their number, and container."""
    if options.split is not None:
        stream = read_hub(source, options.split, None)
        records = ((number, 0, record) for number, (_, record) in enumerate(stream, start=1))
        return records, None, f"the Hub's split {options.split}"
    file = locate(source)
    return read_rows(file), count_rows(file), container_of(file)
