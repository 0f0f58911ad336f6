"""Where data comes from: a local file, or a file or split of a Hub dataset.

    locate("rendered/train.jsonl")                                      # a local file, as it is
    locate("hf://sumitdotml/lora-and-friends-dataset/rendered/train.jsonl")   # fetched once, then cached
    for place, row in read_records("train.parquet", split=None): ...    # place is "train.parquet:17"

Only explicit names (`hf://`, or a dataset name given to `read_records`) reach the network, and a fetch is
announced on stderr first. `containers` reads the contents of files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlora.data.containers import (
    SUFFIXES,
    count_rows,
    read_rows,
)
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import announce, first_line, resolve

HUB_PREFIX = "hf://"


def locate(path: str | Path) -> Path:
    """The local file for `path`: a local path, `embedded:PATH`, or `hf://OWNER/NAME[@REVISION]/PATH`.

    Raises:
      UserError: the file does not exist, or cannot be fetched.
    """
    text = str(path)
    if text.startswith(HUB_PREFIX):
        return _fetch_from_hub(text)
    local = resolve(text)
    if os.path.isdir(local):  # unlike pathlib, returns False for names that cannot be paths
        raise UserError(f"{text}: is a directory; give one file of rows")
    if not os.path.isfile(local):
        raise UserError(f"{text}: no such file; give a file of rows or hf://OWNER/NAME/PATH")
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
    ) as error:  # the Hub client raises many types: network, authorisation, missing file, offline
        raise UserError(f"{address}: cannot be fetched: {first_line(error)}") from None


def is_file_source(source: str) -> bool:
    """Whether `source` is a file rather than the name of a Hub dataset."""
    return source.endswith(SUFFIXES) or os.path.exists(source)


def count_records(source: str) -> int | None:
    """Number of rows in a file, for a progress bar; None if only reading the file would tell."""
    if not is_file_source(source):
        return None
    return count_rows(locate(source))


def hub_revision(name: str, revision: str | None) -> str:
    """The commit that `revision` (None: the newest) of a Hub dataset currently refers to.

    Raises:
      UserError: not the name of a dataset, or the Hub does not answer.
    """
    from huggingface_hub import HfApi

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file; give a file of rows or a Hub dataset OWNER/NAME")
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # the Hub client raises many types: network, authorisation, missing, offline
        raise UserError(f"{name}: the Hub does not provide it: {first_line(error)}") from None


def read_records(
    source: str, split: str | None, columns: list[str] | None, revision: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream `(place, record)` from a file in any container or from `split` of a Hub dataset.

    `place` is `FILE:ROW`, with rows counted from 1, for error messages.

    Raises:
      UserError: there is nothing to read, or a row cannot be read; names the file and the row.
    """
    if not is_file_source(source):
        yield from read_hub(source, split, columns, revision)
        return
    path = locate(source)
    for number, _, row in read_rows(path, columns):
        if isinstance(row, ValueError):
            raise UserError(f"{path}:{number}: {row}")
        yield f"{path}:{number}", row


def read_hub(
    name: str, split: str | None, columns: list[str] | None, revision: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream `(place, record)` from a split of a Hub dataset, restricted to `columns` unless that is None.

    Raises:
      UserError: no split is named, or the Hub does not provide it.
    """
    if not split:
        raise UserError(f"{name}: name the split of the Hub dataset, such as --split train")
    import datasets

    announce(f"streaming {name}, split {split}, from the Hugging Face Hub (nothing is kept on disk)")
    number = 0
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True, revision=revision)
        if columns is not None:
            names = stream.column_names or columns
            stream = stream.select_columns([column for column in columns if column in names])
        for row in stream:
            number += 1
            yield f"{name}[{split}]:{number}", row
    except Exception as error:  # datasets raises many types: network, missing split, broken shard
        raise UserError(f"{name}[{split}]:{number + 1}: cannot be streamed: {first_line(error)}") from None
