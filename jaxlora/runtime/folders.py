"""Folders: reading files from an untrusted one, and creating one completely or not at all.

file_in("path/to/Qwen3-8B", "model-00001-of-00005.safetensors")   # no name can lead out of the folder
with claimed(Path("adapter")), new_folder(Path("adapter")) as folder:     # renamed once all is written
    (folder / "adapter_config.json").write_text(text)

A claim is an operating-system lock: it is released when its process ends, for any reason. Its holder knows
that partial copies beside the path are leftovers of a dead process, and removes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.files import is_disk_full

TRUSTED = "JAXLORA_TRUSTED_FOLDERS"


class Taken(UserError):
    """Another process holds the claim."""


def file_in(folder: str | Path, name: str) -> Path:
    """The path of a file directly in `folder`; it need not exist.

    A link may lead elsewhere within the folder or, in a snapshot of the Hub's cache, to the cache's `blobs`,
    where the Hub client keeps the files. If models are links into a shared store, the machine's owner names
    that store in `JAXLORA_TRUSTED_FOLDERS` (several are separated by colons), which no file of a model can
    set.

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
    places += [Path(os.path.realpath(place)) for place in os.environ.get(TRUSTED, "").split(":") if place]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(place) for place in places):
        raise UserError(
            f"{path}: is a link that leads out of its folder, so it is not followed; copy the file, or"
            f" name the target folder in {TRUSTED}"
        )
    return path


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` at the end; after an error nothing has changed."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        _settle(folder)
        put_in_place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, out: Path) -> None:
    """Rename a finished folder to `out`; an older one is removed only once the new one is in place."""
    old = _aside(out)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    folder.rename(out)
    sync(out.parent, below=False)
    if old.exists():  # also a leftover of a process killed between the two renames
        shutil.rmtree(old)


def put_back(out: Path) -> None:
    """Restore an older folder's name if a process was killed before the new one was in place."""
    if _aside(out).exists() and not out.exists():
        _aside(out).rename(out)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _settle(folder: Path) -> None:
    """Give all files the mode of the user's umask (some libraries write 0600), and sync them."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
    sync(folder)


def sync(folder: Path, below: bool = True) -> None:
    """Wait until a folder's entries, and with `below` all of its contents, are on disk.

    Raises:
      OSError: some file systems report only now that they are full.
    """
    for path in (*(folder.rglob("*") if below else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def claimed(out: Path, wait: bool = False) -> Iterator[None]:
    """Hold the exclusive right to write `out`, and remove leftovers of dead processes.

    Args:
      wait: wait until the other process is done instead of raising.

    Raises:
      Taken: another process is writing it.
      UserError: the lock file is a link.
    """
    file = out.with_name(f".{out.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(file, out, wait)
    try:
        _clear(out)
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held, since a new file is a new lock
        os.close(handle)


def is_claimed(out: Path) -> bool:
    """Whether some process holds the claim to write `out`."""
    try:
        handle = os.open(out.with_name(f".{out.name}.lock"), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def enough_room(out: Path) -> Iterator[None]:
    """Turn a full disk into one line (`MachineError`); atomically written files are unchanged."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise MachineError(f"{out}: no space left on the disk; free some and start again") from error


def _locked(file: Path, out: Path, wait: bool) -> int:
    """The descriptor of the locked file, never of one that its holder has meanwhile removed."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UserError(f"{file}: is a link; remove it, as a lock must be a regular file") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if file.exists() and os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise Taken(f"{out}: another process is writing it; wait for it or stop it") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _clear(out: Path) -> None:
    """Remove partial folders and files; restore an older folder that was only moved aside."""
    put_back(out)
    left = re.compile(rf"\.{re.escape(out.name)}\.(\d+\.partial|\d+\.tmp|replaced)")
    for path in list(out.parent.iterdir()):
        if left.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def replace_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files in a folder: all are on disk before the first is renamed into place, in this order.

    A process stopped before that has changed nothing. The caller has claimed the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    for path in staged:
        _clear(path)
    try:
        for path, temporary in staged.items():
            with temporary.open("wb") as file:
                file.write(contents[path.name])
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
