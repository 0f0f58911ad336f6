"""Build a dataset, all or nothing: stream the source, filter it, group, split, and write the files.

    manifest = build(BuildPlan(source="rows.jsonl", split=None, out=Path("data/mine")))

The rules are in `jaxlora.data.curation`. Accepted rows go straight to a spool file; memory holds only each
row's offset in it and its problem key. Everything is written to a hidden folder next to the final one, which
is renamed at the end. A build that stops half-way leaves nothing under the final name, and the next build
first removes what an interrupted one left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from jaxlora.data import curation
from jaxlora.data.containers import container_of, parquet_bytes
from jaxlora.data.gsm8k_source import FIELDS as GSM8K_FIELDS
from jaxlora.data.gsm8k_source import convert
from jaxlora.data.render import SYSTEM_PROMPT
from jaxlora.data.sources import count_records, hub_revision, is_file_source, locate, read_records
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_object, sha256_of, write_json_atomic
from jaxlora.runtime.folders import put_back, put_in_place, sync
from jaxlora.runtime.progress import progress_bar

MANIFEST_NAME = "manifest.json"
FILES = ("raw/train.jsonl", "raw/val.jsonl", "rendered/train.jsonl", "rendered/val.jsonl")
PROGRESS_EVERY = 1000  # rows
MAX_ROW_BYTES = 32 * 2**20  # of one row, raw plus rendered: eight times the longest that training takes
# A compressed source may unpack to more than the disk holds. Real text compresses ten- to thirty-fold.
FREE_BYTES, MAX_EXPANSION = 2**28, 200
_EXPANDS = (
    f"the source unpacks to more than {MAX_EXPANSION} times its own size; is it a real dataset? If so,"
    " convert it to JSONL"
)


@dataclass(frozen=True)
class BuildPlan:
    """What to build, from which source, and where to put it."""

    source: str  # a file of rows or a Hub dataset
    split: str | None  # of a Hub dataset
    out: Path
    sources: tuple[str, ...] = curation.SOURCES  # values of `problem_source` to keep, in grouping order
    revision: str | None = None  # of a Hub dataset; None means the newest, which the manifest records
    overwrite: bool = False


_Counts = dict[str, Annotated[int, Field(ge=0, lt=2**63)]]


class _Manifest(TypedDict):
    """The fields of a manifest that later code reads."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    rows_read: Annotated[int, Field(ge=0, lt=2**63)]
    candidates: _Counts
    accepted: _Counts
    rejected: dict[str, _Counts]
    split_rows: dict[str, _Counts]
    split_groups: _Counts
    files: dict[str, Any]


_MANIFEST = TypeAdapter(_Manifest)


class _Spool:
    """Accepted rows: two lines each on disk, raw and rendered; 17 bytes and the problem key in memory."""

    def __init__(self, file: IO[bytes], sources: Sequence[str], limit: int | None) -> None:
        self.file = file
        self.limit = limit  # bytes; None: no limit
        self.sources = list(sources)
        self.starts = array("q")  # by row number, that is, in stream order
        self.origins = array("B")  # index of the row's source
        self.rows = {source: array("q") for source in sources}  # row numbers of each source
        self.keys: dict[str, list[bytes]] = {source: [] for source in sources}

    def add(self, source: str, key: bytes, lines: bytes) -> None:
        """Append a row; raises `ValueError` if the row is too long or the spool exceeds its limit."""
        if len(lines) > MAX_ROW_BYTES:
            raise ValueError(f"the row has {len(lines):,} bytes; at most {MAX_ROW_BYTES:,} can be used")
        if self.limit is not None and self.file.tell() + len(lines) > self.limit:
            raise ValueError(_EXPANDS)
        self.rows[source].append(len(self.starts))
        self.keys[source].append(key)
        self.origins.append(self.sources.index(source))
        self.starts.append(self.file.tell())
        self.file.write(lines)

    def read(self, row: int) -> tuple[str, bytes, bytes]:
        """Source, raw line and rendered line of a row."""
        self.file.seek(self.starts[row])
        return self.sources[self.origins[row]], self.file.readline(), self.file.readline()


def build(plan: BuildPlan) -> dict[str, Any]:
    """Build the dataset and return its manifest.

    Raises:
      UserError: a row lacks fields or has wrong types (the message gives file and row), nothing is accepted,
        `out` exists and `overwrite` is false, or the disk is full. Nothing is then left under `out`.
    """
    out = plan.out.resolve()
    _check_place(plan, out)
    with _disk_errors(out), _work_folder(out) as folder:
        _check_place(plan, out)  # again: what a killed build had moved aside has been restored by now
        manifest = _build_into(folder, plan)
        _publish(folder, out)
    return manifest


def _check_place(plan: BuildPlan, out: Path) -> None:
    if out.exists() and not plan.overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{plan.out} exists; choose another --out, or pass --overwrite")
    if out.exists() and not out.is_dir():
        raise UserError(f"{plan.out} is a file; choose another --out")


def _build_into(folder: Path, plan: BuildPlan) -> dict[str, Any]:
    revision = None if is_file_source(plan.source) else hub_revision(plan.source, plan.revision)
    source_sha256 = _source_sha256(plan)
    with (folder / "spool").open("w+b") as file:
        spool = _Spool(file, plan.sources, _most_bytes(plan.source))
        counts = _accept_rows(plan, revision, spool)
        accepted = {source: len(rows) for source, rows in spool.rows.items()}
        split = curation.split_by_problem([(spool.rows[s], spool.keys[s]) for s in plan.sources])
        by_source, files = {}, {}
        for part, rows in (("train", split.train), ("val", split.validation)):
            by_source[part] = _write_part(folder, part, spool, rows)
    (folder / "spool").unlink()
    if _source_sha256(plan) != source_sha256:  # otherwise the manifest would describe a file with other rows
        raise UserError(f"{plan.source}: changed while it was being read; build again")
    for name in FILES:
        path = folder / name
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {
        "source": {
            "name": plan.source,
            "split": plan.split,
            "revision": revision,
            "sha256": source_sha256,
            "problem_sources": list(plan.sources),
        },
        "seed": curation.SEED,
        "validation_share": curation.VALIDATION_SHARE,
        "system_prompt": SYSTEM_PROMPT,
        **counts,
        "accepted": accepted,
        "split_rows": by_source,
        "split_groups": {"train": split.train_groups, "val": split.validation_groups},
        "files": files,
    }
    write_json_atomic(folder / MANIFEST_NAME, manifest)
    return manifest


def _source_sha256(plan: BuildPlan) -> str | None:
    """The hash of a source file; None for the Hub, where the commit is recorded instead."""
    return sha256_of(locate(plan.source)) if is_file_source(plan.source) else None


def _most_bytes(source: str) -> int | None:
    """How far a compressed source may expand, in bytes; None for plain text and for the Hub (streamed)."""
    if not is_file_source(source) or source.endswith((".jsonl", ".json")):
        return None
    path = locate(source)
    limit = FREE_BYTES + MAX_EXPANSION * path.stat().st_size
    if container_of(path) == "Parquet" and parquet_bytes(path) > limit:  # pages are unpacked whole, in memory
        raise UserError(f"{source}: {_EXPANDS}")
    return limit


def _accept_rows(plan: BuildPlan, revision: str | None, spool: _Spool) -> dict[str, Any]:
    """Stream the source into the spool; return counts of rows read, candidates, and rejects by reason."""
    candidates: Counter[str] = Counter()
    rejected: Counter[tuple[str, str]] = Counter()
    others: Counter[str] = Counter()
    read = 0
    fields = [*curation.FIELDS, *GSM8K_FIELDS]
    records = read_records(plan.source, plan.split, fields, revision)
    with progress_bar("reading the source", count_records(plan.source) or 0, "rows") as advance:
        for read, (place, record) in enumerate(records, start=1):
            if read % PROGRESS_EVERY == 0:
                advance(PROGRESS_EVERY)
            record = _source_row(place, record)
            source = record["problem_source"]
            if source not in spool.rows:
                others[source] += 1
                continue
            candidates[source] += 1
            problem, solution = record["problem"], record["generated_solution"]
            expected = record["expected_answer"]
            reason = curation.reject_reason(problem, solution, expected)
            if reason is not None:
                rejected[source, reason] += 1
                continue
            try:
                key = curation.problem_key(problem)
                lines = curation.row_lines(source, problem, solution, expected)
                spool.add(source, key, "\n".join((*lines, "")).encode())
            except UnicodeEncodeError:
                raise UserError(f"{place}: holds half a surrogate pair, which is not text") from None
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None
    if not read:
        raise UserError(f"{plan.source}: is empty; there are no rows to build from")
    wanted = " or ".join(plan.sources)
    if not candidates:
        seen = ", ".join(name for name, _ in others.most_common(5))
        raise UserError(
            f"{plan.source}: no row has problem_source {wanted}, only {seen}; choose from these with"
            " --sources"
        )
    if rejected.total() == candidates.total():
        reasons = ", ".join(f"{reason} {count}" for (_, reason), count in rejected.most_common(3))
        raise UserError(f"{plan.source}: none of {candidates.total()} candidates was accepted ({reasons})")
    return {
        "rows_read": read,
        "other_sources": dict(sorted(others.items())),
        "candidates": {source: candidates[source] for source in plan.sources},
        "rejected": {s: {r: rejected[s, r] for r in curation.REASONS} for s in plan.sources},
    }


def _source_row(place: str, record: dict[str, Any]) -> dict[str, Any]:
    """The record in the source's schema; GSM8K's own rows are converted to it."""
    try:
        if "problem" not in record and all(name in record for name in GSM8K_FIELDS):
            record = convert(record)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    for name in curation.FIELDS:
        if not isinstance(record.get(name), str):
            raise UserError(f"{place}: {_wrong_field(name, record)}")
    return record


def _write_part(folder: Path, part: str, spool: _Spool, rows: Sequence[int]) -> dict[str, int]:
    """Write both files of a part with these rows in this order; return row counts by source."""
    counts: Counter[str] = Counter()
    for kind in ("raw", "rendered"):
        (folder / kind).mkdir(exist_ok=True)
    with (
        (folder / "raw" / f"{part}.jsonl").open("wb") as raw_file,
        (folder / "rendered" / f"{part}.jsonl").open("wb") as rendered_file,
        progress_bar(f"writing {part}", len(rows), "rows") as advance,
    ):
        for number, row in enumerate(rows, start=1):
            source, raw, rendered = spool.read(row)
            counts[source] += 1
            raw_file.write(raw)
            rendered_file.write(rendered)
            if number % PROGRESS_EVERY == 0:
                advance(PROGRESS_EVERY)
    return {source: counts[source] for source in spool.sources} | {"total": counts.total()}


def _wrong_field(name: str, record: dict[str, Any]) -> str:
    if name not in record:
        needed = f"{', '.join(curation.FIELDS)}, or GSM8K's {' and '.join(GSM8K_FIELDS)}"
        return f"field {name!r} is missing; rows need {needed}"
    return f"field {name!r} is {type(record[name]).__name__}, not text"


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder next to `out`: empty, locked for exclusive use, and removed afterwards."""
    folder = out.parent / f".{out.name}.building"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another build of {out} is running; wait for it, or choose another --out"
            ) from None
        if not folder.exists() or not os.path.samestat(os.fstat(lock), folder.stat()):
            raise UserError(f"another build of {out} has just finished; look at it first")
        _empty(folder)  # what an interrupted build left behind
        put_back(out)
        try:
            yield folder
        finally:
            if folder.exists():
                shutil.rmtree(folder)
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _publish(folder: Path, out: Path) -> None:
    """Sync the finished folder to disk, then move it into place."""
    sync(folder)
    put_in_place(folder, out)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"the disk of {out.parent} is full; nothing was written under {out}") from None
        raise UserError(
            f"{error.filename or out}: {error.strerror}; nothing was written under {out}"
        ) from None


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a built dataset, with the hashes and sizes that its files actually have.

    Raises:
      UserError: there is no manifest, it is damaged, or a file is missing.
    """
    manifest = read_object(folder / MANIFEST_NAME)
    try:
        _MANIFEST.validate_python(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{folder / MANIFEST_NAME}: {name}: {first['msg']}; build the dataset again"
        ) from None
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; build the dataset again")
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return manifest


def check_built(folder: Path) -> None:
    """Refuse a built dataset if its files do not match the hashes in its manifest.

    A folder without a manifest, or with another program's, does not count as a built dataset.

    Raises:
      UserError: names the file.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return
    recorded = read_object(folder / MANIFEST_NAME).get("files")
    if not isinstance(recorded, dict):
        return
    for name in FILES:
        file = recorded.get(name)
        expected = file.get("sha256") if isinstance(file, dict) else None
        path = folder / name
        if expected is not None and (not path.is_file() or sha256_of(path) != expected):
            raise UserError(
                f"{path}: is not what was built (its SHA-256 differs from the one in {MANIFEST_NAME}); build"
                " the dataset again"
            )
