"""One writer at a time for a file or folder that is made outside the training loop.

with claimed(Path("results/run/evaluation")):     # refused while another process holds it
    ...

The claim is a lock of the operating system: it goes when its process ends, however it ends. Whoever holds it
knows that half-made copies beside the place are a dead process', and removes them.
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
from jaxlora.runtime.folders import put_back


@contextmanager
def claimed(out: Path, wait: bool = False) -> Iterator[None]:
    """Hold the right to write `out`, and clear away what dead processes left of it.

    Args:
      wait: until the other process is done, instead of an error.

    Raises:
      UserError: another process is writing it, or the lock is a link.
    """
    file = out.with_name(f".{out.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(file, out, wait)
    try:
        _clear(out)
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: a new file is a new lock
        os.close(handle)


@contextmanager
def enough_room(out: Path) -> Iterator[None]:
    """Turn a full disk into one line (`MachineError`); what is written whole or not at all is unchanged."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise MachineError(f"{out}: no room left on the disk; make room and start again") from error


def _locked(file: Path, out: Path, wait: bool) -> int:
    """The descriptor of the locked file; never one that its holder has removed meanwhile."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UserError(f"{file}: is a link; remove it, a lock must be a file of its own") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if file.exists() and os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"{out}: another process is writing it; wait for it or stop it") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _clear(out: Path) -> None:
    """Remove half-made folders and files; put back an older folder that was only moved aside."""
    put_back(out)
    left = re.compile(rf"\.{re.escape(out.name)}\.(\d+\.partial|\d+\.tmp|replaced)")
    for path in list(out.parent.iterdir()):
        if left.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def replace_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a folder: all are on the disk before the first one takes its place, in this order.

    Whoever is stopped earlier has changed nothing. The caller has claimed the folder.
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
