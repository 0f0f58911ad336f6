"""The gates between a dataset and training: no benchmark question in train, nothing shared with validation.

    report = check([FilePair(train, validation)], Benchmark("openai/gsm8k", questions))
    status = require_gates(train_path, validation_path, None, allow_ungated=False)

`check` returns what it compared, by which rule and with what result, plus the SHA-256 of every input. Saved
as `contamination.json`, this is the report that `require_gates` looks for. Data is refused if its report is
missing, failed, stale (a file has changed since) or made under other rules. "Canonical" means NFKC, lower
case and white space collapsed; `jaxlora.data.leaks` also finds benchmark questions in other forms.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlora.data.containers import count_rows, is_text, read_rows
from jaxlora.data.curation import problem_key
from jaxlora.data.formats import find_format, to_example
from jaxlora.data.leaks import CONTAINED_LETTERS, CONTAINED_WORDS, EQUAL, LEAK_RULES, QuestionIndex
from jaxlora.data.sources import HUB_PREFIX, locate
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_object, sha256_of
from jaxlora.runtime.progress import console, progress_bar
from jaxlora.runtime.remote import resolve

REPORT_NAME = "contamination.json"
PROGRESS_EVERY = 1000  # rows
RULES = {
    "benchmark_overlap": (
        "no benchmark question is in a training row, whatever its source; every turn is searched. equal: the"
        " row's problem is the question, both canonical (Unicode NFKC, lower case, stripped, white space"
        " collapsed). same_words: a turn is the question but for case, punctuation and white space."
        f" contained: a turn contains it (only questions of {CONTAINED_WORDS} words and"
        f" {CONTAINED_LETTERS} letters or more)"
    ),
    "shared_row_id": "no row_id is in both train and validation",
    "shared_problem": "no canonical problem is in both train and validation",
}


@dataclass(frozen=True)
class FilePair:
    """A training file and its validation file: local paths or `hf://`."""

    train: str
    validation: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's questions, as `(example id, question)` pairs, and their origin."""

    name: str
    questions: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class GateStatus:
    """What training records about its data: whether it passed the gates, by which report, or why not."""

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
    """What the gates compare of one file, row by row in file order."""

    path: str
    sha256: str
    size: int
    ids: list[str]
    problems: list[bytes]  # problem keys
    sources: list[str]
    lines: array[int]
    leaks: list[dict[str, Any]]  # rows that contain a benchmark question, as listed in the report


def find_pairs(folder: Path) -> list[FilePair]:
    """The file pairs of a dataset: `train.jsonl` and `val.jsonl` in the folder, in `raw/` and in `rendered/`.

    Raises:
      UserError: there is no such folder, it contains no pair, or half of a pair is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the --out of tools/build_dataset.py")
    pairs = []
    for place in (folder, folder / "raw", folder / "rendered"):
        train, validation = place / "train.jsonl", place / "val.jsonl"
        if train.exists() != validation.exists():
            missing = validation if train.exists() else train
            raise UserError(f"{missing}: no such file, although the other half of the split exists")
        if train.exists():
            pairs.append(FilePair(str(train), str(validation)))
    if not pairs:
        raise UserError(f"{folder}: holds no train.jsonl and val.jsonl, nor raw/ or rendered/ with them")
    return pairs


@dataclass(frozen=True)
class GateRow:
    """What the gates need from a row: its id, its problem, its source, and all of its texts, turn by turn."""

    row_id: str
    problem: str  # in a conversation, the user turns
    source: str
    texts: tuple[str, ...]


def read_row(record: dict[str, Any]) -> GateRow:
    """Read a raw row, or a row of any format that can be trained on.

    Raises:
      ValueError: the record is neither, or contains an unpaired surrogate; the message gives no position.
    """
    row = _raw_row(record) if "problem" in record and "messages" not in record else _training_row(record)
    if not all(map(is_text, (row.row_id, row.source, *row.texts))):
        raise ValueError("holds half a surrogate pair, which is not text")
    return row


def _raw_row(record: dict[str, Any]) -> GateRow:
    for name in ("row_id", "source", "problem"):
        if not isinstance(record.get(name), str):
            raise ValueError(
                f"no text in field {name!r}; raw rows have 'row_id', 'source' and 'problem', others messages"
            )
    texts = _strings([record["problem"], record.get("generated_solution")])
    return GateRow(record["row_id"], record["problem"], record["source"], tuple(texts))


def _training_row(record: dict[str, Any]) -> GateRow:
    try:
        row_format = find_format(record)
    except ValueError:
        return _raw_row(record)  # raises an error that says what a row needs here
    example = to_example(row_format, record)
    source = record.get("source") or ""
    if example.text is not None:
        return GateRow(example.row_id, example.text, source, (example.text,))
    turns = example.messages if isinstance(example.messages, list) else []
    asked = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
    if not asked or not all(isinstance(content, str) for content in asked):
        raise ValueError("messages hold no user turn with text")
    texts = _strings([turns, example.tools])
    return GateRow(example.row_id, "\n".join(map(str, asked)), source, tuple(texts))


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, in order: a turn may have parts, tool calls and reasoning."""
    stack = [value]  # not recursive: JSON may be nested as deeply as Python's stack
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            stack += reversed(value)
        elif isinstance(value, dict):
            stack += reversed([item for name, item in value.items() if name != "role"])


def _read(path: str, root: str, index: QuestionIndex | None = None) -> _Rows:
    """Read one file; with an index, search it for benchmark questions."""
    file = locate(path)
    name = path.removeprefix(root.rstrip("/") + "/") if root else path
    rows = _Rows(name, sha256_of(file), file.stat().st_size, [], [], [], array("q"), [])
    with progress_bar(f"reading {name}", count_rows(file), "rows") as advance:
        for number, _, record in read_rows(file):
            try:
                if isinstance(record, ValueError):
                    raise record
                row = read_row(record)
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            key = problem_key(row.problem)
            rows.ids.append(row.row_id)
            rows.problems.append(key)
            rows.sources.append(row.source)
            rows.lines.append(number)
            if index and (hits := index.find(row.texts, row.problem, key)):
                leak = {"row_id": row.row_id, "source": row.source, "line": number}
                rows.leaks.append(
                    leak | {"example_ids": [hit for hit, _ in hits], "rules": [rule for _, rule in hits]}
                )
            if number % PROGRESS_EVERY == 0:
                advance(PROGRESS_EVERY)
    if not rows.ids:
        raise UserError(f"{path}: is empty; there is nothing to check")
    return rows


def check(pairs: Sequence[FilePair], benchmark: Benchmark, root: str = "") -> dict[str, Any]:
    """Run all gates on each pair of files and return the report; `report["passed"]` is the verdict.

    The report names files inside the folder `root` by their path relative to it.

    Raises:
      UserError: a file is missing, empty, or has a row that is neither raw nor rendered.
    """
    index = QuestionIndex(benchmark.questions)
    texts = "\n".join(json.dumps(question) for _, question in benchmark.questions)
    files: list[dict[str, Any]] = []
    gates: list[dict[str, Any]] = []
    for pair in pairs:
        train, validation = _read(pair.train, root, index), _read(pair.validation, root)
        for role, rows in (("train", train), ("validation", validation)):
            files.append(
                {"role": role, "path": rows.path, "sha256": rows.sha256, "bytes": rows.size}
                | {"rows": len(rows.ids), "rows_by_source": dict(sorted(Counter(rows.sources).items()))}
            )
        gates += _gates(train, validation)
    return {
        "passed": all(gate["passed"] for gate in gates),
        "benchmark": {
            "name": benchmark.name,
            "sha256": sha256_of(resolve(benchmark.name)) if resolve(benchmark.name).is_file() else None,
            "questions": len(benchmark.questions),
            "questions_too_short_for_containment": index.short_questions,
            "questions_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        },
        "files": files,
        "gates": gates,
    }


def _gates(train: _Rows, validation: _Rows) -> list[dict[str, Any]]:
    ids, problems = set(train.ids), set(train.problems)
    rows = list(zip(validation.lines, validation.ids, validation.problems, strict=True))
    shared_ids = [{"row_id": row_id, "line": line} for line, row_id, _ in rows if row_id in ids]
    shared_problems = [{"row_id": row_id, "line": line} for line, row_id, key in rows if key in problems]
    compared = {"train_sha256": train.sha256, "validation_sha256": validation.sha256}
    counts = {"train_rows": len(train.ids), "validation_rows": len(validation.ids)}
    results: list[dict[str, Any]] = []
    for name, found in zip(RULES, (train.leaks, shared_ids, shared_problems), strict=True):
        results.append(
            {"name": name, "rule": RULES[name], "passed": not found, "overlaps": len(found)}
            | {"counts": counts, **compared, "overlapping": found}
        )
    strictest = Counter(leak["rules"][0] for leak in train.leaks)
    results[0]["overlaps_by_rule"] = {rule: strictest[rule] for rule in LEAK_RULES}
    # The study's own gate only looks at rows from gsm8k and only applies the first rule; this is its count.
    results[0]["overlaps_with_source_gsm8k"] = sum(
        leak["source"] == "gsm8k" and leak["rules"][0] == EQUAL for leak in train.leaks
    )
    return results


def report_place(train_path: str, given: str | None = None) -> Path | None:
    """The path of the report: `given`, or else next to the training file or its folder `rendered/` or `raw/`.

    None for a file on the Hub, unless `given` is set.
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
    """Refuse data that has not passed the gates; with `allow_ungated`, print a red warning and continue.

    Raises:
      UserError: the report is missing, stale or failed (names the gate), or a data file does not exist.
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
        raise UserError(
            f"data gates: {reason}; --config.data.allow_ungated=true trains anyway; rows of your own that are"
            " not for a benchmark need none: --config own"
        )
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
    """The verdict of each gate for exactly these two files, and the reason they are refused, if any."""
    try:
        report = read_object(place)
        entries = [
            (str(gate["name"]), gate["passed"] is True and gate["overlaps"] == 0, int(gate["overlaps"]))
            for gate in report["gates"]
            if (gate["train_sha256"], gate["validation_sha256"]) == (train, validation)
        ]
        rules = {str(gate["name"]): gate["rule"] for gate in report["gates"]}
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
    if other := [name for name, rule in RULES.items() if rules[name] != rule]:
        return gates, (
            f"gate {', '.join(other)}: {place} was written by a version with another rule; run"
            " tools/check_dataset.py again"
        )
    if failed := [f"gate {name} failed with {n} overlaps" for name, passed, n in entries if not passed]:
        return gates, f"{'; '.join(failed)} (see {place}); remove these rows from the data"
    return gates, None
