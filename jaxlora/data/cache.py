"""A cache of tokenised rows, keyed by everything that determines them.

    cache = RowCache(default_folder(), lambda: tokenizer_sha256(tokenizer))
    if (found := cache.read(key)) is not None:       # the rows as views of files, and their report
        rows, report = found
    cache.keep(key, rows, report)

A key is a hash of the file's bytes, the tokenizer and template, every setting that affects a row, and the
rendering code; if any of these changes, the rows are rebuilt. Entries are verified by their hashes when read,
and damaged ones are rebuilt too. Only the newest few entries are kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.data.render import RenderedRow
from jaxlora.runtime.files import sha256_of
from jaxlora.runtime.folders import claimed, new_folder
from jaxlora.runtime.progress import say

SMALLEST = 2**20  # bytes; smaller files are tokenised in a few seconds
ENTRIES = 8  # kept at most
_DTYPES = {"tokens": np.int32, "weights": np.float32, "ends": np.int64}
_INDEX = "rows.json"


def default_folder() -> Path:
    """Where rows are cached: `$JAXLORA_ROWS`, or `~/.cache/jaxlora/rows`."""
    return Path(os.environ.get("JAXLORA_ROWS") or Path.home() / ".cache" / "jaxlora" / "rows")


@dataclass(frozen=True)
class RowCache:
    """A folder of tokenised files for one tokenizer."""

    folder: Path
    tokenizer_sha256: Callable[[], str]  # slow (reads the tokenizer), so only called for cached files
    smallest: int = SMALLEST

    def key(self, file: Path, sha256: str, settings: Mapping[str, Any]) -> str | None:
        """The key of a file's rows under these settings; None if the file is too small to cache."""
        if file.stat().st_size < self.smallest:
            return None
        versions = {
            name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")
        }
        parts = [sha256, self.tokenizer_sha256(), settings, versions, _code()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    def read(self, key: str) -> tuple[list[RenderedRow], dict[str, Any]] | None:
        """An entry's rows, as views of its files, and its report; None if there is no intact entry."""
        folder = self.folder / key
        try:
            index = json.loads((folder / _INDEX).read_bytes())
            if any(sha256_of(folder / name) != sha256 for name, sha256 in index["sha256"].items()):
                raise ValueError("not what was kept")
            arrays = {name: _mapped(folder / name, dtype) for name, dtype in _DTYPES.items()}
            names = json.loads((folder / "names").read_bytes())
            os.utime(folder)  # mark it as the newest
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            say(f"{folder}: is not what was kept there; its rows are tokenised again")
            shutil.rmtree(folder, ignore_errors=True)
            return None
        starts = np.concatenate([[0], arrays["ends"][:-1]])
        # Each slice of a memmap would keep a reference to the file; views of a plain array are a third as
        # large.
        tokens, weights = np.asarray(arrays["tokens"]), np.asarray(arrays["weights"])
        bounds = zip(starts.tolist(), arrays["ends"].tolist(), *names, strict=True)
        rows = [RenderedRow(row, tokens[a:b], weights[a:b], prompt) for a, b, row, prompt in bounds]
        return rows, index["report"]

    def keep(self, key: str, rows: Sequence[RenderedRow], report: dict[str, Any]) -> None:
        """Store rows under a key. A full disk or an unwritable folder only means that nothing is cached."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with claimed(self.folder / key, wait=True):
                if not (self.folder / key / _INDEX).is_file():
                    self._write(self.folder / key, rows, report)
            self._prune()
        except OSError as error:
            say(f"{self.folder}: the tokenised rows are not kept: {error.strerror or error}")

    def _write(self, folder: Path, rows: Sequence[RenderedRow], report: dict[str, Any]) -> None:
        with new_folder(folder) as staging:
            with (staging / "tokens").open("wb") as tokens, (staging / "weights").open("wb") as weights:
                for row in rows:
                    tokens.write(np.asarray(row.tokens, np.int32).tobytes())
                    weights.write(np.asarray(row.weights, np.float32).tobytes())
            ends = np.cumsum([len(row.tokens) for row in rows], dtype=np.int64)
            (staging / "ends").write_bytes(ends.tobytes())
            names = [[row.row_id for row in rows], [row.prompt_id for row in rows]]
            (staging / "names").write_text(json.dumps(names))
            hashes = {name: sha256_of(staging / name) for name in (*_DTYPES, "names")}
            (staging / _INDEX).write_text(json.dumps({"sha256": hashes, "report": report}))

    def _prune(self) -> None:
        """Remove all but the newest entries."""
        entries = [path for path in self.folder.iterdir() if (path / _INDEX).is_file()]
        for old in sorted(entries, key=lambda path: path.stat().st_mtime)[:-ENTRIES]:
            shutil.rmtree(old, ignore_errors=True)


def _mapped(file: Path, dtype: Any) -> np.ndarray:
    """A file's numbers, read from disk on use."""
    return np.memmap(file, dtype, "r")


@cache
def _code() -> str:
    """A hash of the code that turns rows into tokens."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
