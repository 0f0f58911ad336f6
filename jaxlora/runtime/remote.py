"""Locating models and files: shipped with the package, in a folder, on the Hub, or in a bucket.

    resolve("embedded:base").name               # "base"; any other path is returned unchanged
    folder = mirror("gs://bucket/Qwen3-8B")     # ~/.cache/jaxlora/bases/gs%3A%2F%2Fbucket%2FQwen3-8B
    weights_of(folder)                          # "gs://bucket/Qwen3-8B"

For a base in a bucket, the small files are copied to this machine and the weights are read in place. A mirror
is a model's directory without weights, and its name says where those are. To code that reads configurations
and tokenizers it is a directory like any other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import write_bytes_atomic
from jaxlora.runtime.folders import file_in
from jaxlora.runtime.progress import console

TOKENIZER_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
EMBEDDED = "embedded:"  # the prefix of shipped files
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_BYTES = 200 * 2**20  # a tokenizer has 10 to 30 MiB


def embedded_path(name: str) -> Path:
    """Path of a shipped file or folder, such as `base` or `data/train.jsonl`.

    Raises `UserError` if the package ships nothing of that name.
    """
    root = Path(str(resources.files("jaxlora.embedded")))
    path = root / name
    if not name or not path.resolve().is_relative_to(root.resolve()) or not path.exists():
        known = sorted(
            entry.relative_to(root).as_posix()
            for entry in [root / "base", root / "start", *(root / "data").glob("*")]
            if entry.exists()
        )
        raise UserError(
            f"the package ships no {EMBEDDED}{name}; it ships "
            + ", ".join(EMBEDDED + entry for entry in known)
        )
    return path


def resolve(path: str) -> Path:
    """The file or folder named by a config path: shipped if it starts with `embedded:`, else as given."""
    if path.startswith(EMBEDDED):
        return embedded_path(path.removeprefix(EMBEDDED))
    return Path(path)


def announce(text: str) -> None:
    """Announce on stderr what is about to be fetched."""
    print(text, file=sys.stderr, flush=True)


def fetch_folder(
    named: str,
    repository: str,
    patterns: Sequence[str],
    missing: Callable[[Path], str],
    revision: str | None = None,
) -> Path:
    """The folder of a model repository in the Hub's cache, fetched (with a message) unless complete.

    Args:
      named: the user's input, for error messages.
      patterns: patterns of the files to fetch.
      missing: returns what a folder lacks, in words; empty if nothing. The cache may be incomplete: fetching
        only a tokenizer leaves a folder with nothing else in it.

    Raises:
      UserError: the Hub does not provide it, or not completely.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, repository, revision=revision, allow_patterns=list(patterns))
    with suppress(Exception):  # not cached yet: the Hub client raises several kinds
        folder = Path(fetch(local_files_only=True))
        if not missing(folder):
            return folder
    announce(f"fetching {repository} from the Hugging Face Hub (kept in its local cache)")
    try:
        folder = Path(fetch())
    except Exception as error:
        raise UserError(f"{named}: cannot be fetched: {first_line(error)}") from None
    if reason := missing(folder):  # without a network the client returns whatever is cached
        raise UserError(f"{named}: was not fetched completely: {reason}")
    return folder


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its text, which for Hub clients has many."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def is_hub_name(name: str) -> bool:
    """Whether this is `OWNER/NAME` and not an existing folder."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def cached_name(path: str | Path) -> str | None:
    """`OWNER/NAME` of a folder in the Hub client's cache; None for any other folder."""
    for part in Path(path).parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    return None


def is_remote(path: str | Path) -> bool:
    """Whether this is an address, such as `gs://bucket/folder`, rather than a local path."""
    return "://" in str(path)


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path within it.

    Raises:
      UserError: no installed package reads such addresses.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UserError(f"{address}: {error}; for gs:// run `pip install gcsfs`") from None
    except ValueError as error:
        raise UserError(f"{address}: {error}") from None


@cache  # every run of a study asks for its base
def mirror(address: str) -> Path:
    """Copy a base's configuration and tokenizer files, once per process, and return their local folder.

    Raises:
      UserError: the address cannot be read, or there is no config.json.
    """
    address = address.rstrip("/")
    folder = mirrors() / quote(address, safe="")
    console.print(f"copying configuration and tokenizer of {address} to {folder}", markup=False)
    try:
        copies = dict(_small_files(address))
        if "config.json" not in copies:
            raise UserError(f"{address}: no config.json there; give a Hugging Face model directory")
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if file.name not in copies and not file.name.startswith("."):  # those may be being written
                file.unlink(missing_ok=True)
        for name, content in copies.items():  # each atomically: other processes may be reading
            write_bytes_atomic(file_in(folder, name), content)
    except OSError as error:
        raise UserError(f"{address}: cannot be copied: {error}") from None
    return folder


def mirrors() -> Path:
    """The folder of all mirrors."""
    return Path.home() / ".cache" / "jaxlora" / "bases"


def weights_of(directory: str | Path) -> str:
    """The location of a model directory's weights: the directory itself or, for a mirror, its address."""
    folder = Path(directory)
    if not is_remote(directory) and folder.parent == mirrors():
        return unquote(folder.name)
    return str(directory).rstrip("/")


def weight_files(directory: str | Path) -> list[str]:
    """The safetensors files of a model's directory, sorted: paths or addresses."""
    place = weights_of(directory)
    if not is_remote(place):
        return sorted(map(str, Path(place).glob("*.safetensors")))
    system, path = file_system(place)
    try:
        found = system.ls(path, detail=False)
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error}") from None
    names = sorted(str(file).rpartition("/")[2] for file in found)
    return [f"{place}/{name}" for name in names if name.endswith(".safetensors")]


def _small_files(address: str) -> Iterator[tuple[str, bytes]]:
    system, path = file_system(address)
    for entry in system.ls(path, detail=True):
        name = str(entry["name"]).rpartition("/")[2]
        wanted = Path(name).suffix in TOKENIZER_SUFFIXES and not name.startswith(".")
        if entry["type"] != "file" or not wanted:
            continue
        if entry["size"] > SMALL_BYTES:
            raise UserError(f"{address}/{name}: larger than {SMALL_BYTES} bytes; no model needs such a file")
        yield name, system.cat_file(entry["name"])
