"""Read row files: JSON lines, a JSON list, CSV or Parquet, each optionally compressed with gzip or zstd.

    for number, size, row in read_rows(Path("train.json.zst")): ...   # row: a dict, or the ValueError of one
    for number, line in read_lines(Path("train.jsonl.gz")): ...

A file's first bytes determine compression and container, except that CSV is recognised by its suffix. A UTF-8
byte order mark at the beginning and empty lines at the end are ignored. Everything is streamed except a JSON
list, which is read whole but parsed one element at a time, so memory use is bounded by bytes, not by rows.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from jaxlora.runtime.errors import UserError

Record = dict[str, Any]
Row = tuple[int, int, "Record | ValueError"]  # row number from 1, size in bytes, and the row
MAX_LINE_BYTES = 64 * 1024 * 1024  # a longer "line" means the file is not JSONL
MAX_LIST_BYTES = 256 * 1024 * 1024  # a JSON list is read whole
MAX_UNPACKED_BYTES = 4 * 2**30  # a Parquet file inside gzip or zstd is unpacked to disk
PARQUET_BATCH_ROWS = 32
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_FOREIGN = {
    b"PK\x03\x04": "a ZIP archive (.zip, .xlsx)",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
}
_ENCODINGS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_UTF8_MARK = b"\xef\xbb\xbf"
_BETWEEN = re.compile(r"[ \t\r\n]*")


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of a file in order, each a dict or the `ValueError` that says what is wrong with it.

    Args:
      columns: for a Parquet file, the columns to read if present; None means all.

    Raises:
      UserError: reading cannot continue; the message gives the file and the position.
    """
    kind = container_of(path)
    if kind == "Parquet":
        yield from _read_parquet(path, columns)
    elif kind == "JSON list":
        yield from _read_list(path)
    elif kind == "CSV":
        yield from _read_csv(path)
    else:
        for number, line in read_lines(path):
            try:
                yield number, len(line), parse_object(line)
            except ValueError as error:
                yield number, len(line), error


def container_of(path: Path) -> str:
    """ "JSON lines", "JSON list", "CSV" or "Parquet".

    Raises:
      UserError: the file cannot be read, or is of an unsupported kind.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    with _errors(path, lambda: 1), _open(path) as file:
        start = file.peek(4096)
    if start.startswith(b"PAR1") or suffixes[-1:] == [".parquet"]:
        return "Parquet"
    if suffixes[-1:] in ([".csv"], [".tsv"]):
        return "CSV"
    return "JSON list" if start.removeprefix(_UTF8_MARK).lstrip().startswith(b"[") else "JSON lines"


def count_rows(path: Path) -> int | None:
    """Number of rows in a file, for a progress bar; None if only reading the file would tell."""
    kind = container_of(path)
    if _compression(path) or kind not in ("JSON lines", "Parquet"):
        return None
    if kind == "JSON lines":
        return count_lines(path)
    import pyarrow.parquet

    with _errors(path, lambda: 1, "Parquet "):
        return int(pyarrow.parquet.read_metadata(path).num_rows)


def parquet_bytes(path: Path) -> int:
    """Uncompressed bytes of a Parquet file's columns according to its metadata; 0 inside gzip or zstd."""
    with _errors(path, lambda: 1, "Parquet "):
        if _compression(path):
            return 0
        import pyarrow.parquet

        file = pyarrow.parquet.read_metadata(path)
        return sum(int(file.row_group(i).total_byte_size) for i in range(file.num_row_groups))


# --- Lines --------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file as `(line number from 1, bytes without the newline)`; only "\\n" ends a line.

    A UTF-8 byte order mark at the beginning is stripped, and empty lines at the end are ignored.
    """
    number = empty = 0
    with _errors(path, lambda: number + 1), _open_text(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}:{number}: line is longer than {MAX_LINE_BYTES} bytes; is this JSONL?"
                )
            if not line.strip():
                empty += 1
                continue
            yield from ((number - ahead, b"") for ahead in range(empty, 0, -1))
            empty = 0
            yield number, line.removesuffix(b"\n")


def count_lines(path: Path) -> int:
    """The number of lines as `read_lines` counts them, stopping at one that is too long."""
    lines = last = open_bytes = 0
    with _errors(path, lambda: lines + 1), _open_text(path) as file:
        while (block := file.read(1 << 20)) and open_bytes <= MAX_LINE_BYTES:
            newlines = block.count(b"\n")
            text = block.rstrip(b" \t\r\n\v\f")
            if text:
                last = lines + text.count(b"\n") + 1
            lines += newlines
            open_bytes = open_bytes + len(block) if not newlines else 0
    return last


def parse_object(line: bytes) -> Record:
    """Parse one JSONL line into a dict.

    Raises:
      ValueError: not UTF-8, not JSON, or not an object; the message is short and gives no position.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        reason = f"broken JSON: {error}; JSONL has one whole object on each line"
        raise ValueError(reason if line.strip() else "empty line") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    except ValueError:
        raise ValueError("broken JSON: a number of thousands of digits") from None
    return _object(value)


def is_text(value: Any) -> bool:
    """Whether the value is a string that can be encoded, that is, has no unpaired surrogates."""
    return isinstance(value, str) and (
        value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    )


def strings_of(value: Any) -> Iterator[str]:
    """All strings in a JSON value, including field names."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):  # Parquet maps are lists of pairs
            waiting += item


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {type(value).__name__}, not an object")
    return value


# --- Other containers ---------------------------------------------------------------------------------------


def _read_list(path: Path) -> Iterator[Row]:
    number = 1
    with _errors(path, lambda: number), _open_text(path) as file:
        content = file.read(MAX_LIST_BYTES + 1)
        if len(content) > MAX_LIST_BYTES:
            raise UserError(
                f"{path}: a JSON list of more than {MAX_LIST_BYTES} bytes; write one row per line (JSONL)"
            )
        text = content.decode("utf-8")
        del content
        decoder = json.JSONDecoder()
        at = _after(text, text.index("[") + 1)
        while not text.startswith("]", at):
            try:
                value, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                reason = error if isinstance(error, json.JSONDecodeError) else "too deep, or a huge number"
                raise UserError(f"{path}:{number}: broken JSON list: {reason}") from None
            try:
                yield number, end - at, _object(value)
            except ValueError as error:
                yield number, end - at, error
            at = _after(text, end)
            if text.startswith(",", at):
                at = _after(text, at + 1)
            elif not text.startswith("]", at):
                raise UserError(f"{path}:{number}: broken JSON list: no comma after the element")
            number += 1
        if text[at + 1 :].strip():
            raise UserError(
                f"{path}: there is more after the JSON list; give one list, or one object per line"
            )


def _after(text: str, at: int) -> int:
    """The next position that is not white space."""
    found = _BETWEEN.match(text, at)
    assert found is not None  # it also matches the empty string
    return found.end()


def _read_csv(path: Path) -> Iterator[Row]:
    """Rows of a CSV file with a header, which decides the separator: comma, semicolon or tab."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the csv module's own limit is 128 KiB
    number = -1  # lines read after the header
    with _errors(path, lambda: number + 2), _open_text(path) as file:
        header = file.readline(MAX_LINE_BYTES)
        separator = max(",\t;", key=lambda mark: header.count(mark.encode()))
        (names,) = csv.reader([header.decode("utf-8")], delimiter=separator) if header.strip() else [[]]
        if not all(names) or len(set(names)) < len(names) or not names:
            raise UserError(
                f"{path}:1: the first line of a CSV file must name each column once (pandas"
                " does with index=False)"
            )
        number = 0
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        reader = csv.reader(text, delimiter=separator, strict=True)
        for cells in reader:
            number = reader.line_num
            if not cells or (len(cells) < len(names) and not cells[0].strip() and len(cells) == 1):
                continue  # an empty line
            size = sum(map(len, cells))
            if len(cells) != len(names):
                yield number + 1, size, ValueError(f"{len(cells)} cells, but the header names {len(names)}")
            else:
                yield number + 1, size, {name: _cell(cell) for name, cell in zip(names, cells, strict=True)}


def _cell(cell: str) -> Any:
    """The value of a cell; messages stored as JSON are parsed, because CSV itself only has text."""
    if not cell.lstrip().startswith("[") or not ('"role"' in cell or '"from"' in cell):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    are_messages = all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    return value if are_messages else cell


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[Row]:
    """Rows one at a time. Until then texts stay dictionary-encoded, as a small file may repeat a long one."""
    import pyarrow.parquet

    number = 0
    with _errors(path, lambda: number + 1, "Parquet "), _seekable(path) as source:
        schema = pyarrow.parquet.ParquetFile(source).schema
        leaves = [schema.column(index) for index in range(len(schema))]
        texts = [leaf.path for leaf in leaves if leaf.converted_type == "UTF8"]
        file = pyarrow.parquet.ParquetFile(source, read_dictionary=texts)
        present = None if columns is None else [c for c in columns if c in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=present):
            for row in (row for i in range(len(batch)) for row in batch.slice(i, 1).to_pylist()):
                number += 1
                size = sum(map(len, strings_of(row)))
                if size > MAX_LINE_BYTES:
                    raise UserError(f"{path}:{number}: row is longer than {MAX_LINE_BYTES} letters")
                yield number, size, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Drop null fields: in Parquet, every row has the fields of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# --- Bytes --------------------------------------------------------------------------------------------------


def _compression(path: Path) -> str | None:
    """How the file is compressed, according to its first bytes."""
    with path.open("rb") as file:
        start = file.read(16)
    for mark, name in _FOREIGN.items():
        if start.startswith(mark):
            raise UserError(
                f"{path}: is {name}; give JSONL, a JSON list, CSV or Parquet, plain or .gz or .zst"
            )
    return next((name for mark, name in _COMPRESSED.items() if start.startswith(mark)), None)


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed."""
    compression = _compression(path)
    if compression is None:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow

    with pyarrow.input_stream(str(path), compression=compression) as stream:
        yield io.BufferedReader(cast(io.RawIOBase, stream), 1 << 16)


@contextmanager
def _open_text(path: Path) -> Iterator[io.BufferedReader]:
    """Like `_open`, but past the UTF-8 byte order mark; refuses any other encoding by name."""
    with _open(path) as file:
        start = file.peek(4)[:4]
        encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), None)
        if encoding is None and len(start) > 1 and (start[0] == 0) != (start[1] == 0):
            encoding = "UTF-16"  # without a BOM: every other byte of plain text is zero
        if encoding:
            raise UserError(
                f"{path}: is {encoding}; convert it to UTF-8, as with iconv -f {encoding} -t UTF-8"
            )
        if start.startswith(_UTF8_MARK):
            file.read(len(_UTF8_MARK))
        yield file


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO | str]:
    """A seekable source for Parquet, which is read from its end."""
    if _compression(path) is None:
        yield str(path)
        return
    with _open(path) as packed, tempfile.TemporaryFile() as file:
        while block := packed.read(1 << 20):
            if file.tell() > MAX_UNPACKED_BYTES:
                raise UserError(f"{path}: more than {MAX_UNPACKED_BYTES} bytes unpacked; unpack it yourself")
            file.write(block)
        file.seek(0)
        yield file


@contextmanager
def _errors(path: Path, place: Callable[[], int], kind: str = "") -> Iterator[None]:
    """Turn whatever the readers raise for malformed bytes into a one-line error with the position."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError:
        raise UserError(
            f"{path}:{place()}: {kind}cannot be read: it is not UTF-8; convert it first"
        ) from None
    except OSError as error:
        raise UserError(f"{path}:{place()}: {kind}cannot be read: {error.strerror or error}") from None
    except (pyarrow.ArrowException, csv.Error, ValueError, OverflowError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}:{place()}: {kind}cannot be read: {reason}") from None
