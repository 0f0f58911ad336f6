"""Checkpoints of a run: published completely or not at all, and verified before use.

    with RunState(run_dir / "checkpoints", identity) as store:
        found = store.restore(like=state)            # the newest intact one, or None
        store.save(step, state, progress, best)      # returns once the arrays are copied to the host

    checkpoints/<step>/
      state/           trained weights and optimizer state, written by Orbax
      progress.json    the caller's position: step, validations, length of metrics.jsonl, identity of the run
      sha256.json      size and SHA-256 of every file above, and of this list itself

Nothing else is needed: the order of rows and all random numbers of a run are functions of its seed and the
step.

A checkpoint is written to a folder `.writing-<step>`, read back, hashed, synced to disk and renamed to its
step number, all in a thread while training continues. Only folders named by a number count. The last two and
the best are kept.
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

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs traces of errors raised here
_unraisable = sys.unraisablehook


def _without_closed_loops(found: Any) -> None:
    """Drop these traces: after an error Orbax closes its event loop, and each running writer raises."""
    if "Event loop is closed" not in str(found.exc_value):
        _unraisable(found)


sys.unraisablehook = _without_closed_loops
REWARD_FILE = "rl.reward's file"  # key of an identity; None: there is none, or an older run did not record it
KEPT = 2  # number of newest checkpoints kept, besides the best
STATE, PROGRESS, HASHES = "state", "progress.json", "sha256.json"
READ_BACK = 2**20  # bytes; larger arrays are opened before a checkpoint is published, but not read whole
_OPEN_FOLDERS = Path("/proc/self/fd")  # on Linux, paths of this process's open files


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint, with arrays sharded as requested."""

    step: int
    state: Any
    progress: dict[str, Any]


class RunState:
    """The checkpoints of one run directory. Leaving the context waits for the save in progress."""

    def __init__(self, folder: Path, identity: dict[str, Any] | None):
        """`identity` identifies the run; checkpoints with a different one are refused. None: accept any."""
        self._folder = folder.resolve()
        self._identity = json.loads(json.dumps(identity))
        if hosts.is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
        hosts.barrier("checkpoint folder")
        # Orbax interprets `[` and `\\` in a path as a pattern and `gs:/` as a bucket: it gets the number of
        # the open folder instead of its name.
        self._handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        number = _OPEN_FOLDERS / str(self._handle)
        self._for_orbax = number if number.exists() else self._folder
        self._good = self._published()  # the checkpoints considered when pruning
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
        """Save without waiting for the disk; `best` is the step to keep besides the newest.

        Raises:
          UserError: the disk is full. Other file-system errors are raised unchanged. Either may belong to the
            previous save, and may also be raised by `check` or `wait`.
        """
        self.wait()
        staging = self._folder / f".writing-{step}"
        if hosts.is_main():
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        hosts.barrier("checkpoint begins")
        # Files take whole blocks, so the size of the last checkpoint on disk is the better measure.
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
        """Raise the error of the last save if it has failed by now; never waits."""
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
            self._orbax.wait_until_finished()  # on every host, so that all have written
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
        """Raise `UserError` if what was written cannot be read, or is not what was saved."""
        found = self._stored(place)
        if found is None or Counter((array.shape, array.dtype.name) for array in found) != shapes:
            raise UserError(
                f"{self._folder}: written files cannot be read back; give another --config.results_dir,"
                " on a local disk and with a plain name"
            )

    def _stored(self, place: Path) -> list[Any] | None:
        """Open every array of a state, and read the small ones; None if that fails."""
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
        if place.exists():  # damaged, or from before a validation that the new one includes
            place.rename(_trash(place))
        staging.rename(place)
        sync(self._folder, below=False)

    def _prune(self) -> None:
        """Delete everything not kept: older and damaged checkpoints, and leftovers of a crash."""
        for entry in self._folder.iterdir():
            if entry.name not in map(str, self._good):
                if entry.name.isdigit():  # renamed first: a number must never name a partial checkpoint
                    entry = entry.rename(_trash(entry))
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _failed(self, error: Exception, step: int, staging: Path, size: int) -> None:
        if not hosts.is_main():
            raise error
        _remove(staging)  # its partial files may be what fills the disk
        if not is_disk_full(error):
            raise error
        stands = (
            f"The checkpoint of step {self._good[-1]} is intact" if self._good else "There is no earlier one"
        )
        free = shutil.disk_usage(self._folder).free
        raise UserError(
            f"{self._folder}: the disk is full. The checkpoint of step {step} needs {size / 1e6:,.1f} MB,"
            f" and {free / 1e6:,.1f} MB are free. {stands}: free some space, then run the same command"
            " to resume"
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
        """The newest intact checkpoint (before a step); None if there is none to go back to.

        Args:
          like: arrays, or `jax.ShapeDtypeStruct` with shardings, in the structure of the state.
          usable: given a checkpoint's progress, returns a reason to skip it, or None.

        Raises:
          UserError: all existing checkpoints are damaged, or the checkpoint belongs to another run.
        """
        self.wait()
        step = hosts.broadcast(self._newest_sound(before, usable) if hosts.is_main() else None)
        self._good = [] if step is None else [s for s in self._published() if s <= step]
        return None if step is None else self.read(step, like)

    def read(self, step: int, like: Any) -> Restored:
        """Read one checkpoint that has been verified.

        Raises:
          UserError: its arrays differ from `like`, or it belongs to another run.
        """
        progress = read_object(self._folder / str(step) / PROGRESS)
        self._check_identity(step, progress)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.StandardRestore(target)
        place = self._for_orbax / str(step) / STATE
        shapes = [Counter(x.shape for x in jax.tree.leaves(tree)) for tree in (self._stored(place), like)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{self._folder / str(step)}: holds arrays of different shapes than those trained here;"
                " resume with the settings (placement, rank, lora or full) that it was saved with"
            )
        return Restored(step, self._orbax.restore(place, args=args), progress)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints after a step, to recompute them."""
        self.wait()
        self._good = [s for s in self._published() if s <= step]
        hosts.barrier("checkpoints listed")
        if hosts.is_main():
            self._prune()

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in words; None if it is intact. The same on every host."""
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
            console.print(f"skipping the checkpoint of step {step}: {problem}", markup=False)
        if found and before is None:
            raise UserError(
                f"{self._folder}: no checkpoint can be used: {', '.join(found)}. Restore an intact copy,"
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
    """What is wrong with a checkpoint's files, in words; None if all are as they were written."""
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
    """Delete a folder that Orbax may still be writing to: after an error its other writers continue."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


def _trash(place: Path) -> Path:
    trash = place.with_name(f".deleted-{place.name}")
    shutil.rmtree(trash, ignore_errors=True)
    return trash
