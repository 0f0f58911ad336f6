"""The gates between a dataset and training: no benchmark question in train, nothing shared with validation.

    report = check([FilePair(train, validation)], Benchmark("openai/gsm8k", questions))
    status = require_gates(train_path, validation_path, None, allow_ungated=False)

`check` returns what it compared, by which rule, with which result, and the SHA-256 of every input; kept as
`contamination.json`, it is the report that `require_gates` asks for: data whose report is missing, stale (a
file changed since) or failed is refused. All comparisons are between canonical problems: NFKC, lower case,
white space collapsed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlora.data.curation import problem_key
from jaxlora.data.rows import parse_rendered
from jaxlora.data.sources import HUB_PREFIX, count_lines, locate, parse_object, read_lines
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_object, sha256_of
from jaxlora.runtime.progress import console, progress_bar
from jaxlora.runtime.remote import resolve

REPORT_NAME = "contamination.json"
RULES = {
    "benchmark_overlap": (
        "no benchmark question equals the problem of a training row, whatever its source, both canonical"
        " (Unicode NFKC, lower case, stripped, white space collapsed)"
    ),
    "shared_row_id": "no row_id is in both train and validation",
    "shared_problem": "no canonical problem is in both train and validation",
}


@dataclass(frozen=True)
class FilePair:
    """One training file and the validation file that goes with it: local paths or `hf://`."""

    train: str
    validation: str


@dataclass(frozen=True)
class Benchmark:
    """Where the questions come from, and `(example id, question)` pairs."""

    name: str
    questions: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class GateStatus:
    """What training records about its data: is it gated, by which report, and if not, why."""

    passed: bool
    overridden: bool
    reason: str | None
    report: str | None
    report_sha256: str | None
    train_sha256: str
    validation_sha256: str
    gates: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """Ids, problem keys and sources of one file, in file order."""

    path: str
    sha256: str
    size: int
    ids: list[str]
    problems: list[bytes]  # problem keys
    sources: list[str]


def find_pairs(folder: Path) -> list[FilePair]:
    """The pairs of files of a dataset: `train.jsonl` and `val.jsonl` in it, in `raw/` and in `rendered/`.

    Raises:
      UserError: there is no folder or no pair, or a training file is without its validation file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the --out of tools/build_dataset.py")
    pairs = []
    for place in (folder, folder / "raw", folder / "rendered"):
        train, validation = place / "train.jsonl", place / "val.jsonl"
        if train.exists() != validation.exists():
            missing = validation if train.exists() else train
            raise UserError(f"{missing}: no such file, but the other half of the split is there")
        if train.exists():
            pairs.append(FilePair(str(train), str(validation)))
    if not pairs:
        raise UserError(f"{folder}: holds no train.jsonl and val.jsonl, nor raw/ or rendered/ with them")
    return pairs


def read_problem(line: bytes) -> tuple[str, str, str]:
    """Row id, problem and source of a raw or a rendered row; the problem of a rendered row is its user turns.

    Raises:
      ValueError: the line is neither; the message has no place in it.
    """
    row = parse_object(line)
    if "messages" in row:
        row = parse_rendered(line)
        turns = row["messages"] if isinstance(row["messages"], list) else []
        asked = [
            turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"
        ]
        if not asked or not all(isinstance(content, str) for content in asked):
            raise ValueError("messages hold no user turn with text")
        return row["row_id"], "\n".join(map(str, asked)), row.get("source") or ""
    for name in ("row_id", "source", "problem"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"no text in field {name!r}; a row has messages, or row_id, source and problem")
    return row["row_id"], row["problem"], row["source"]


def _read(path: str, root: str) -> _Rows:
    file = locate(path)
    name = path.removeprefix(root.rstrip("/") + "/") if root else path
    ids, problems, sources = [], [], []
    with progress_bar(f"reading {name}", count_lines(file), "rows") as advance:
        for number, line in read_lines(file):
            try:
                row_id, problem, source = read_problem(line)
                problems.append(problem_key(problem))
            except UnicodeEncodeError:
                raise UserError(f"{path}:{number}: the problem holds half a surrogate pair") from None
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            ids.append(row_id)
            sources.append(source)
            advance(1)
    if not ids:
        raise UserError(f"{path}: is empty; there is nothing to check")
    return _Rows(name, sha256_of(file), file.stat().st_size, ids, problems, sources)


def check(pairs: Sequence[FilePair], benchmark: Benchmark, root: str = "") -> dict[str, Any]:
    """Run all gates on each pair of files and return the report; `report["passed"]` is the verdict.

    The report names files relative to the folder `root` where they lie in it.

    Raises:
      UserError: a file is missing, empty, or has a row that is neither raw nor rendered.
    """
    questions: dict[bytes, list[str]] = {}
    for example_id, question in benchmark.questions:
        questions.setdefault(problem_key(question), []).append(example_id)
    texts = "\n".join(json.dumps(question) for _, question in benchmark.questions)
    files: list[dict[str, Any]] = []
    gates: list[dict[str, Any]] = []
    for pair in pairs:
        train, validation = _read(pair.train, root), _read(pair.validation, root)
        for role, rows in (("train", train), ("validation", validation)):
            files.append(
                {"role": role, "path": rows.path, "sha256": rows.sha256, "bytes": rows.size}
                | {"rows": len(rows.ids), "rows_by_source": dict(sorted(Counter(rows.sources).items()))}
            )
        gates += _gates(train, validation, questions)
    return {
        "passed": all(gate["passed"] for gate in gates),
        "benchmark": {
            "name": benchmark.name,
            "sha256": sha256_of(resolve(benchmark.name)) if resolve(benchmark.name).is_file() else None,
            "questions": len(benchmark.questions),
            "questions_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        },
        "files": files,
        "gates": gates,
    }


def _gates(train: _Rows, validation: _Rows, questions: dict[bytes, list[str]]) -> list[dict[str, Any]]:
    leaks = [
        {"row_id": row_id, "source": source, "line": line, "example_ids": questions[problem]}
        for line, (row_id, problem, source) in enumerate(
            zip(train.ids, train.problems, train.sources, strict=True), start=1
        )
        if problem in questions
    ]
    ids, problems = set(train.ids), set(train.problems)
    shared_ids = [
        {"row_id": row_id, "line": line}
        for line, row_id in enumerate(validation.ids, start=1)
        if row_id in ids
    ]
    shared_problems = [
        {"row_id": row_id, "line": line}
        for line, (row_id, problem) in enumerate(
            zip(validation.ids, validation.problems, strict=True), start=1
        )
        if problem in problems
    ]
    compared = {"train_sha256": train.sha256, "validation_sha256": validation.sha256}
    counts = {"train_rows": len(train.ids), "validation_rows": len(validation.ids)}
    results: list[dict[str, Any]] = []
    for name, found in zip(RULES, (leaks, shared_ids, shared_problems), strict=True):
        results.append(
            {"name": name, "rule": RULES[name], "passed": not found, "overlaps": len(found)}
            | {"counts": counts, **compared, "overlapping": found}
        )
    # The study's own rule looks at rows from gsm8k only; ours contains it, and this is its count.
    results[0]["overlaps_with_source_gsm8k"] = sum(leak["source"] == "gsm8k" for leak in leaks)
    return results


def report_place(train_path: str, given: str | None = None) -> Path | None:
    """Where the report is: as given, or of a local training file beside it or beside its `rendered/` folder.

    None: of a Hub file, unless it is given.
    """
    if given:
        return Path(given)
    if train_path.startswith(HUB_PREFIX):
        return None
    folder = locate(train_path).parent
    if folder.name in ("rendered", "raw") and not (folder / REPORT_NAME).exists():
        return folder.parent / REPORT_NAME
    return folder / REPORT_NAME


def require_gates(
    train_path: str, validation_path: str, report_path: str | None, allow_ungated: bool
) -> GateStatus:
    """Refuse to train on data that is not gated; with `allow_ungated`, say so in red and go on.

    Raises:
      UserError: the report is missing, stale or failed, naming the gate; or a data file does not exist.
    """
    train = sha256_of(locate(train_path))
    validation = sha256_of(locate(validation_path))
    place = report_place(train_path, report_path)
    report_hash: str | None = None
    gates: dict[str, bool] = {}
    how = f"python tools/check_dataset.py --train {train_path} --validation {validation_path} --benchmark ..."
    if place is None or not place.is_file():
        where = place or f"data.gate_report is not set, and {train_path} is on the Hub"
        reason: str | None = f"all gates: the report is missing ({where}); write it with {how}"
        place = None
    else:
        report_hash = sha256_of(place)
        gates, reason = _judge(place, train, validation)
    if reason and not allow_ungated:
        raise UserError(f"data gates: {reason}; --config.data.allow_ungated=true trains anyway")
    if reason:
        console.print(f"UNGATED DATA: {reason}", style="bold red", markup=False, soft_wrap=True)
    return GateStatus(
        passed=reason is None,
        overridden=reason is not None,
        reason=reason,
        report=str(place) if place else None,
        report_sha256=report_hash,
        train_sha256=train,
        validation_sha256=validation,
        gates=gates,
    )


def _judge(place: Path, train: str, validation: str) -> tuple[dict[str, bool], str | None]:
    """Verdict of each gate for exactly these two files, and why they may not be used."""
    try:
        report = read_object(place)
        entries = [
            (str(gate["name"]), gate["passed"] is True and gate["overlaps"] == 0, int(gate["overlaps"]))
            for gate in report["gates"]
            if (gate["train_sha256"], gate["validation_sha256"]) == (train, validation)
        ]
        known = {str(file["sha256"]) for file in report["files"]}
    except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return (
            {},
            f"all gates: {place} is not a gate report ({type(error).__name__}: {error}); write it again",
        )
    gates = {name: passed for name, passed, _ in entries}
    stale = [role for role, sha in (("train", train), ("validation", validation)) if sha not in known]
    if stale:
        return {}, (
            f"all gates: {place} is stale: the {' and '.join(stale)} file is not the one that was checked"
            " (SHA-256 differs); run tools/check_dataset.py again"
        )
    if missing := [name for name in RULES if name not in gates]:
        return (
            gates,
            f"gate {', '.join(missing)}: not in {place} for these files; run tools/check_dataset.py again",
        )
    if failed := [f"gate {name} failed with {n} overlaps" for name, passed, n in entries if not passed]:
        return gates, f"{'; '.join(failed)} (see {place}); remove these rows from the data"
    return gates, None
