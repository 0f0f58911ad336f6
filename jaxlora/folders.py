"""Files of a folder that came from elsewhere, such as a model's or an adapter's: no name leads out of it.

file_in("path/to/Qwen3-8B", "model-00001-of-00005.safetensors")
"""

from __future__ import annotations

import os
from pathlib import Path

from jaxlora.errors import UserError


def file_in(folder: str | Path, name: str) -> Path:
    """The path of a file directly in `folder`; it need not be there.

    A link may lead to another place in the folder or, in a snapshot of the Hub's cache, to the cache's
    `blobs`, where the Hub's client keeps the files.

    Raises:
      UserError: the name is a path, or a link leads out of the folder.
    """
    path = Path(folder) / name
    if not name.isprintable() or name in ("", ".", "..") or os.path.basename(name) != name:
        raise UserError(f"{folder}: {name!r:.200} is not the name of a file in this folder")
    root = Path(os.path.realpath(folder))
    places = [root] + [
        place.parent.parent / "blobs" for place in (root, *root.parents) if place.parent.name == "snapshots"
    ]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(place) for place in places):
        raise UserError(f"{path}: is a link out of its folder, which is not followed; copy the file instead")
    return path
