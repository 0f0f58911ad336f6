"""The embedded default: a tiny Qwen3 base, its tokenizer and its data, shipped with the package.

Config paths name these files with the prefix `embedded:`, so that the tiny job needs no download.

    >>> resolve("embedded:base").name
    'base'
    >>> embedded_path("data/test.jsonl").name
    'test.jsonl'
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jaxlora.runtime.errors import UserError

PREFIX = "embedded:"


def embedded_path(name: str) -> Path:
    """Path of a shipped file or folder, such as `base` or `data/train.jsonl`.

    Raises `UserError` when the package ships nothing under that name.
    """
    root = Path(str(resources.files(__name__)))
    path = root / name
    if not name or not path.resolve().is_relative_to(root.resolve()) or not path.exists():
        known = sorted(
            entry.relative_to(root).as_posix()
            for entry in [root / "base", *(root / "data").glob("*")]
            if entry.exists()
        )
        raise UserError(
            f"the package ships no {PREFIX}{name}; it ships " + ", ".join(PREFIX + entry for entry in known)
        )
    return path


def resolve(path: str) -> Path:
    """The file or folder that a config path means: shipped if it starts with `embedded:`, else as given."""
    if path.startswith(PREFIX):
        return embedded_path(path.removeprefix(PREFIX))
    return Path(path)
