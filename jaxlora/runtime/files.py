"""JSON and JSONL files, written completely or not at all, and read within size limits.

    write_json_atomic(folder / "summary.json", {"status": "completed"})
    append_jsonl(folder / "metrics.jsonl", {"step": 1, "loss": 1.14})
    records = read_jsonl(folder / "metrics.jsonl")

A crash never leaves a partial JSON file, and at most one torn last line in a JSONL file, which readers and
the next append repair.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlora.runtime.errors import UserError

Record = dict[str, Any]
MAX_JSON_BYTES = 256 * 2**20  # larger files are not ours, and are refused before reading
MAX_JSONL_BYTES = 2 * 2**30


# --- Writing ------------------------------------------------------------------------------------------------


def _to_line(record: Record) -> str:
    """One JSON line. Raises `ValueError` for NaN and infinities, which JSON cannot hold."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def append_jsonl(path: Path, record: Record) -> None:
    """Append one record, first removing a torn last line left by a crash."""
    line = _to_line(record).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if _ends_torn(file):
            _mend_last_line(file)
        file.write(line)


def write_jsonl_atomic(path: Path, records: Iterable[Record]) -> None:
    """Write the file atomically: readers see the old content or the new, never a mixture."""
    write_text_atomic(path, "".join(_to_line(record) for record in records))


def write_json_atomic(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically; `ValueError` for NaN and infinities."""
    write_text_atomic(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, and rename it once it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cut_jsonl(path: Path, size: int) -> None:
    """Truncate a JSONL file to its first `size` bytes, which end with a whole line."""
    with open(path, "ab") as file:
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one of its causes, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):  # from C++
            return True
        error = error.__cause__ or error.__context__
    return False


def _ends_torn(file: Any) -> bool:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"


def _mend_last_line(file: Any) -> None:
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    try:
        json.loads(content[start:])
    except ValueError:
        file.truncate(start)
    else:
        file.write(b"\n")  # complete, only its newline is missing


# --- Reading ------------------------------------------------------------------------------------------------


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file; `UserError` if it is missing, broken or larger than `limit` bytes."""
    try:
        return _parse(read_file(path, limit))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> Record:
    """Like `read_json`, for a file that holds one JSON object."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def _parse(content: bytes) -> Any:
    value = json.loads(content.decode("utf-8"))
    if b"\\u" in content:  # an escape can be a lone surrogate, which cannot be written again
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of an ordinary text file, without the byte-order mark that some editors put first.

    Raises:
      UserError: it is missing, not a regular file, or larger than `limit`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is a directory or a device; name a file")
        if status.st_size > limit:
            raise UserError(f"{path} is larger than {limit} bytes; is it the right file?")
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UserError(f"{path} cannot be read: {error}") from None


def sha256_of(path: Path, size: int | None = None) -> str:
    """Hex SHA-256 of a file's bytes, or of its first `size` bytes, read in pieces."""
    with path.open("rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
        return digest.hexdigest()


def read_jsonl(path: Path, torn_last_line: str = "drop") -> list[Record]:
    """All records of a JSONL file, in order.

    A last line without a newline that is not JSON was left by a crash: it is dropped, or refused with
    `torn_last_line="refuse"`. Any other broken line is a `UserError` with file and line. Empty lines are
    skipped.
    """
    return [record for _, record in read_numbered_jsonl(path, torn_last_line)]


def read_numbered_jsonl(path: Path, torn_last_line: str = "drop") -> list[tuple[int, Record]]:
    """Like `read_jsonl`, with the line number of each record (the first line is 1)."""
    lines = read_file(path, MAX_JSONL_BYTES).split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _parse(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and torn_last_line == "drop":
                break
            raise UserError(f"{path}:{number}: not a JSON line: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: the line holds {type(record).__name__}, not a JSON object")
        records.append((number, record))
    return records
