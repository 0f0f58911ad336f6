"""The generated data files of the embedded default as bytes, and functions to write and compare files.

>>> check_files(data_files(), embedded_path("data"))      # raises UserError on the first difference
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlora.embedded.word_problems import benchmark_row, distinct_problems, rendered_row
from jaxlora.runtime.errors import UserError

SEEDS = {"train": 1, "val": 2, "test": 3}
ROWS = {"train": 1200, "val": 160, "test": 200}


def data_files() -> dict[str, bytes]:
    """`train.jsonl` and `val.jsonl` in the rendered schema, `test.jsonl` in GSM8K's."""
    files = {}
    for split, count in ROWS.items():
        row = benchmark_row if split == "test" else rendered_row
        problems = distinct_problems(random.Random(SEEDS[split]), split, count)
        files[f"{split}.jsonl"] = _jsonl(row(item) for item in problems)
    return files


def check_files(files: dict[str, bytes], folder: Path) -> None:
    """Raise `UserError` for the first file that is missing in `folder` or differs from the given bytes."""
    for name, content in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: write it with --out")
        if path.read_bytes() != content:
            raise UserError(
                f"{path} is not what this script generates: write it again with --out and --overwrite"
            )


def write_files(files: dict[str, bytes], folder: Path, overwrite: bool) -> list[Path]:
    """Write all files, or none if one exists and `overwrite` is false. Returns the paths written."""
    paths = [folder / name for name in files]
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists: choose another --out, or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.write_bytes(files[path.name])
    return paths


def _jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
