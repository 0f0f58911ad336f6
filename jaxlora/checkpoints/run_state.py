"""Checkpoints of a run: published whole or not at all, and verified before they are used.

    with RunState(run_dir / "checkpoints", identity) as store:
        found = store.restore(like=state)            # the newest sound one, or None
        store.save(step, state, progress, best)      # returns once the arrays are copied to the host

    checkpoints/<step>/
      state/           what is trained and the optimizer's state, written by Orbax
      progress.json    the caller's position: step, validations, length of metrics.jsonl, what run it is
      sha256.json      size and SHA-256 of every file above, and of this list itself

That is everything: the order of the rows is a function of the step, and the only random numbers of a run are
those of its first adapter, which the seed gives.

A checkpoint is written in a folder `.writing-<step>`, read back, hashed, synced to the disk, and renamed to
its number; all this happens on a thread, beside training. Only folders named by a number count. The last two
and the best are kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError, one_line
from jaxlora.runtime.files import Record, is_disk_full, read_object, sha256_of, write_json_atomic
from jaxlora.runtime.folders import sync
from jaxlora.runtime.progress import console

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traces of errors that are raised here
_unraisable = sys.unraisablehook


def _without_closed_loops(found: Any) -> None:
    """After an error Orbax closes its event loop; each writer still on its way would print a trace."""
    if "Event loop is closed" not in str(found.exc_value):
        _unraisable(found)


sys.unraisablehook = _without_closed_loops
REWARD_FILE = "rl.reward's file"  # of an identity; None: there is none, or an older run did not record it
KEPT = 2  # newest checkpoints that are kept, beside the best
STATE, PROGRESS, HASHES = "state", "progress.json", "sha256.json"
READ_BACK = 2**20  # bytes; larger arrays are opened before a checkpoint is published, but not read whole
_OPEN_FOLDERS = Path("/proc/self/fd")  # of Linux: names for what this process has open


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint, with the arrays laid out as they were asked for."""

    step: int
    state: Any
    progress: dict[str, Any]


class RunState:
    """The checkpoints of one run directory. Leaving the context waits for the save in progress."""

    def __init__(self, folder: Path, identity: dict[str, Any] | None):
        """`identity` says what run this is; a checkpoint that holds another one is refused. None: any."""
        self._folder = folder.resolve()
        self._identity = json.loads(json.dumps(identity))
        if hosts.is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
        hosts.barrier("checkpoint folder")
        # Orbax takes `[` and `\\` in a path for a pattern and `gs:/` for a bucket: it gets the open folder's
        # number instead of its name.
        self._handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        number = _OPEN_FOLDERS / str(self._handle)
        self._for_orbax = number if number.exists() else self._folder
        self._good = self._published()  # those that count for what is kept
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self.wait()
        except Exception as late:
            if error is None:
                raise
            console.print(f"the save in progress failed as well: {one_line(late)}", markup=False)
        finally:
            self._thread.shutdown()
            self._orbax.close()
            os.close(self._handle)

    # --- Writing --------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, progress: dict[str, Any], best: int | None = None) -> None:
        """Save without waiting for the disk; `best` is the step to keep beside the newest ones.

        Raises:
          UserError: the disk is full. Other errors of the file system as they come. Either may also be one
            of the save before, and may also come from `check` or `wait`.
        """
        self.wait()
        staging = self._folder / f".writing-{step}"
        if hosts.is_main():
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        hosts.barrier("checkpoint begins")
        # Files take whole blocks: what the last checkpoint takes is the better measure, where there is one.
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        size = max([size, *(_disk_use(self._folder / str(good)) for good in self._good[-1:])])
        try:
            if hosts.is_main() and shutil.disk_usage(self._folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            place = self._for_orbax / staging.name / STATE
            self._orbax.save(place, args=ocp.args.StandardSave(state))
        except Exception as error:
            self._failed(error, step, staging, size)
        shapes = Counter((x.shape, np.dtype(x.dtype).name) for x in jax.tree.leaves(state))
        progress = progress | {"identity": self._identity}
        self._pending = self._thread.submit(self._finish, step, staging, size, shapes, progress, best)

    def check(self) -> None:
        """Raise the error of the last save, if it has failed by now; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is published; raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _finish(
        self, step: int, staging: Path, size: int, shapes: Counter, progress: Record, best: int | None
    ) -> None:
        try:
            self._orbax.wait_until_finished()  # on every host; then all of them have written
            if hosts.is_main():
                self._read_back(self._for_orbax / staging.name / STATE, shapes)
                write_json_atomic(staging / PROGRESS, progress)
                write_json_atomic(staging / HASHES, hashes(staging))
                sync(staging)
                self._publish(step, staging)
        except Exception as error:
            self._failed(error, step, staging, size)
        self._good = sorted({*self._good, step})
        wanted = {best, *self._good[-KEPT:]}
        self._good = [s for s in self._good if s in wanted]
        if hosts.is_main():
            self._prune()

    def _read_back(self, place: Path, shapes: Counter) -> None:
        """Raises `UserError` where what was written cannot be read, or is not what was saved."""
        found = self._stored(place)
        if found is None or Counter((array.shape, array.dtype.name) for array in found) != shapes:
            raise UserError(
                f"{self._folder}: what was written cannot be read back; give another --config.results_dir,"
                " on a local disk and with a plain name"
            )

    def _stored(self, place: Path) -> list[Any] | None:
        """Every array of a state, opened, the small ones also read; None: they cannot be."""
        found: Any = self._orbax.metadata(place).item_metadata
        if found is None:
            return None
        driver, arrays = "zarr3" if found.use_zarr3 else "zarr", []
        for array in jax.tree.leaves(found.tree):
            base = {"driver": "file", "path": f"{place}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{array.name}/"}
            try:
                stored = tensorstore.open({"driver": driver, "kvstore": kvstore}, open=True).result()
                if stored.size * stored.dtype.numpy_dtype.itemsize <= READ_BACK:
                    stored.read().result()
            except ValueError:
                return None
            arrays.append(jax.ShapeDtypeStruct(stored.shape, stored.dtype.numpy_dtype))
        return arrays

    def _publish(self, step: int, staging: Path) -> None:
        place = self._folder / str(step)
        if place.exists():  # damaged, or of before a validation that is in the new one
            place.rename(_trash(place))
        staging.rename(place)
        sync(self._folder, below=False)

    def _prune(self) -> None:
        """Delete what is not kept: older checkpoints, damaged ones, and what a crash left behind."""
        for entry in self._folder.iterdir():
            if entry.name not in map(str, self._good):
                if entry.name.isdigit():  # renamed first: half a checkpoint must never carry a number
                    entry = entry.rename(_trash(entry))
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _failed(self, error: Exception, step: int, staging: Path, size: int) -> None:
        if not hosts.is_main():
            raise error
        _remove(staging)  # what was written of it may be what fills the disk
        if not is_disk_full(error):
            raise error
        stands = (
            f"The checkpoint of step {self._good[-1]} stands" if self._good else "There is none before it"
        )
        free = shutil.disk_usage(self._folder).free
        raise UserError(
            f"{self._folder}: the disk is full. The checkpoint of step {step} needs {size / 1e6:,.1f} MB,"
            f" {free / 1e6:,.1f} MB are free. {stands}: make room, then give the same command to go on"
        ) from error

    @property
    def has_any(self) -> bool:
        """Whether a checkpoint has been published."""
        return bool(self._good)

    # --- Reading --------------------------------------------------------------------------------------------

    def restore(
        self,
        like: Any,
        before: int | None = None,
        usable: Callable[[dict[str, Any]], str | None] = lambda progress: None,
    ) -> Restored | None:
        """The newest sound checkpoint (before a step); None where there is none to go back to.

        Args:
          like: arrays, or `jax.ShapeDtypeStruct` with shardings, in the form of the state.
          usable: gets a checkpoint's progress and returns a reason to pass it over, or None.

        Raises:
          UserError: there are checkpoints, but all are damaged; or it belongs to another run.
        """
        self.wait()
        step = hosts.broadcast(self._newest_sound(before, usable) if hosts.is_main() else None)
        self._good = [] if step is None else [s for s in self._published() if s <= step]
        return None if step is None else self.read(step, like)

    def read(self, step: int, like: Any) -> Restored:
        """One checkpoint, which has been verified.

        Raises:
          UserError: it holds other arrays than `like`, or belongs to another run.
        """
        progress = read_object(self._folder / str(step) / PROGRESS)
        self._check_identity(step, progress)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.StandardRestore(target)
        place = self._for_orbax / str(step) / STATE
        shapes = [Counter(x.shape for x in jax.tree.leaves(tree)) for tree in (self._stored(place), like)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{self._folder / str(step)}: holds arrays of other shapes than what is trained here;"
                " resume with the settings (placement, rank, lora or full) that it was saved with"
            )
        return Restored(step, self._orbax.restore(place, args=args), progress)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints after a step, to compute them again."""
        self.wait()
        self._good = [s for s in self._published() if s <= step]
        hosts.barrier("checkpoints listed")
        if hosts.is_main():
            self._prune()

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in words; None if it is sound. The same on every host."""
        self.wait()
        return hosts.broadcast(damage(self._folder / str(step)) if hosts.is_main() else None)

    def _published(self) -> list[int]:
        return sorted(int(entry.name) for entry in self._folder.iterdir() if entry.name.isdigit())

    def _newest_sound(self, before: int | None, usable: Callable[[dict], str | None]) -> int | None:
        found = []
        steps = [step for step in self._published() if before is None or step < before]
        for step in reversed(steps):
            problem = damage(self._folder / str(step))
            if problem is None and self._stored(self._for_orbax / str(step) / STATE) is None:
                problem = "its arrays cannot be read"
            problem = problem or usable(read_object(self._folder / str(step) / PROGRESS))
            if problem is None:
                return step
            found.append(f"step {step} ({problem})")
            console.print(f"passing over the checkpoint of step {step}: {problem}", markup=False)
        if found and before is None:
            raise UserError(
                f"{self._folder}: no checkpoint can be used: {', '.join(found)}. Put a sound copy there,"
                " or give --config.overwrite=true to train again from step 1"
            )
        return None

    def _check_identity(self, step: int, progress: dict[str, Any]) -> None:
        theirs = progress.get("identity")
        if different := differences(theirs if isinstance(theirs, dict) else {}, self._identity or {}):
            raise UserError(
                f"{self._folder / str(step)}: of another run; it differs in {'; '.join(different)}"
            )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Where two identities differ, in words."""
    known = [key for key in new if key != REWARD_FILE or old.get(key) is not None]
    return [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in known if old.get(key) != new[key]
    ]


def hashes(folder: Path) -> dict[str, Any]:
    """`{"files": {name: {"bytes": n, "sha256": ...}}, "sha256": of this list}` of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASHES)
    table = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        table[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return {"files": table, "sha256": _digest(table)}


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if every one is as it was written."""
    try:
        listed = json.loads((folder / HASHES).read_bytes())
        table, own = listed["files"], listed["sha256"]
    except FileNotFoundError:
        return f"{HASHES} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{HASHES} is not what was written"
    if not isinstance(table, dict) or own != _digest(table) or PROGRESS not in table:
        return f"{HASHES} is not what was written"
    for name, expected in table.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _disk_use(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*"))


def _digest(table: Any) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _remove(folder: Path) -> None:
    """Delete a folder into which Orbax may still write: after an error its other writers go on."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


def _trash(place: Path) -> Path:
    trash = place.with_name(f".deleted-{place.name}")
    shutil.rmtree(trash, ignore_errors=True)
    return trash
