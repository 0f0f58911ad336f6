"""Where data comes from: a local file, a Hub dataset's file or split.

    locate("rendered/train.jsonl")                                      # a local file, as it is
    locate("hf://sumitdotml/lora-and-friends-dataset/rendered/train.jsonl")   # fetched once, then cached
    for place, row in read_records("train.parquet", split=None): ...    # place is "train.parquet:17"

Only a name that says so (`hf://`, or a dataset name given to `read_records`) reaches the network, and what
is fetched is announced on stderr first. Everything is streamed: no function holds more than a batch of rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import announce, first_line, resolve

HUB_PREFIX = "hf://"
PARQUET_BATCH_ROWS = 1024
MAX_LINE_BYTES = 64 * 1024 * 1024  # a "line" longer than this is not JSONL but another kind of file


def locate(path: str | Path) -> Path:
    """The local file for `path`: a local path, `embedded:PATH`, or `hf://OWNER/NAME[@REVISION]/PATH`.

    Raises:
      UserError: the file does not exist, or cannot be fetched.
    """
    text = str(path)
    if text.startswith(HUB_PREFIX):
        return _fetch_from_hub(text)
    local = resolve(text)
    if os.path.isdir(local):  # unlike pathlib's, it answers False where the name cannot be a path
        raise UserError(f"{text}: is a directory; give one JSONL file")
    if not os.path.isfile(local):
        raise UserError(f"{text}: no such file; give a JSONL file or hf://OWNER/NAME/PATH")
    return local


def _fetch_from_hub(address: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    parts = address.removeprefix(HUB_PREFIX).removeprefix("datasets/").split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(f"{address}: not a Hub file; write hf://OWNER/NAME/PATH/IN/DATASET")
    owner, name, file = parts
    name, _, revision = name.partition("@")
    wanted: dict[str, Any] = {"repo_id": f"{owner}/{name}", "filename": file, "repo_type": "dataset"}
    if revision:
        wanted["revision"] = revision
    if not isinstance(try_to_load_from_cache(**wanted), str):
        announce(f"fetching {address} from the Hugging Face Hub (kept in its local cache)")
    try:
        return Path(hf_hub_download(**wanted))
    except (
        Exception
    ) as error:  # the Hub client raises many kinds: network, authorisation, missing file, offline
        raise UserError(f"{address}: cannot be fetched: {first_line(error)}") from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file as `(line number from 1, bytes without the newline)`; only "\\n" ends a line."""
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}:{number}: line is longer than {MAX_LINE_BYTES} bytes; is this JSONL?"
                    )
                yield number, line.removesuffix(b"\n")
    except OSError as error:
        raise UserError(f"{path}:{number + 1}: cannot be read: {error.strerror or error}") from None


def count_lines(path: Path) -> int:
    """Lines of a file; a last line without its newline counts."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def parse_object(line: bytes) -> dict[str, Any]:
    """One JSONL line as a dict.

    Raises:
      ValueError: not UTF-8, not JSON, or not an object; the message is short and has no place in it.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError("empty line" if not line.strip() else f"broken JSON: {error}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    except ValueError:
        raise ValueError("broken JSON: a number of thousands of digits") from None
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {type(value).__name__}, not an object")
    return value


def is_text(value: Any) -> bool:
    """Whether the value is text that can be written: half a surrogate pair cannot."""
    return isinstance(value, str) and (
        value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    )


def is_file_source(source: str) -> bool:
    """Whether `source` is a file rather than the name of a Hub dataset."""
    return source.endswith((".jsonl", ".json", ".parquet")) or os.path.exists(source)


def count_records(source: str) -> int | None:
    """Rows of a file, for a progress bar; None where only reading would tell."""
    if not is_file_source(source):
        return None
    path = locate(source)
    if path.suffix != ".parquet":
        return count_lines(path)
    with _parquet_errors(path, lambda: 1):
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows


def hub_revision(name: str, revision: str | None) -> str:
    """The commit of a Hub dataset that `revision` (none: the newest) means now.

    Raises:
      UserError: not the name of a dataset, or the Hub does not answer.
    """
    from huggingface_hub import HfApi

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file; give a .jsonl or .parquet file or a Hub dataset OWNER/NAME")
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # the Hub client raises many kinds: network, authorisation, missing, offline
        raise UserError(f"{name}: the Hub does not give it: {first_line(error)}") from None


def read_records(
    source: str, split: str | None, columns: list[str], revision: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream `(place, record)` from a `.jsonl` or `.parquet` file or from `split` of a Hub dataset.

    `place` is `FILE:ROW` with rows counted from 1; it goes into error messages.

    Raises:
      UserError: nothing there, or a row that cannot be read; names the file and the row.
    """
    if is_file_source(source):
        path = locate(source)
        if path.suffix == ".parquet":
            yield from _read_parquet(path, columns)
        elif path.suffix == ".jsonl":
            for number, line in read_lines(path):
                try:
                    yield f"{path}:{number}", parse_object(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: {error}") from None
        else:
            raise UserError(f"{source}: not a .jsonl or .parquet file; convert it to one of these first")
    else:
        yield from _read_hub(source, split, columns, revision)


@contextmanager
def _parquet_errors(path: Path, row: Callable[[], int]) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}:{row()}: Parquet cannot be read: {first_line(error)}") from None


def _read_parquet(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    number = 0
    with _parquet_errors(path, lambda: number + 1), pyarrow.parquet.ParquetFile(path) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=present):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row


def _read_hub(
    name: str, split: str | None, columns: list[str], revision: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    if not split:
        raise UserError(f"{name}: name the split of the Hub dataset, such as --split train")
    import datasets

    announce(f"streaming {name}, split {split}, from the Hugging Face Hub (nothing is kept on disk)")
    number = 0
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True, revision=revision)
        names = stream.column_names or columns
        for row in stream.select_columns([column for column in columns if column in names]):
            number += 1
            yield f"{name}[{split}]:{number}", row
    except Exception as error:  # datasets raises many kinds: network, missing split, broken shard
        raise UserError(f"{name}[{split}]:{number + 1}: cannot be streamed: {first_line(error)}") from None
