"""GSM8K, or any questions with a rule: load problems, score generated solutions, aggregate the scores.

    problems = load_problems("openai/gsm8k")                       # or a local JSONL file, or an hf:// path
    records = [score(problem, text, prompt_tokens, generated_tokens, "stop") for problem, text in ...]
    aggregate(records)["correct_strict"]

A record holds everything needed to score it again later: see `rescore`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlora.data.boxes import extract_boxed
from jaxlora.data.containers import is_text
from jaxlora.data.sources import read_records
from jaxlora.evals.answers import normalize, numeric_match, read_number, strict_match
from jaxlora.evals.rules import Rule, rule_named
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_numbered_jsonl
from jaxlora.runtime.remote import resolve

HUB_DATASET = "openai/gsm8k"
STOP_REASONS = ("stop", "length")  # the model's end-of-turn token, or the limit on new tokens


@dataclass(frozen=True)
class Problem:
    """One benchmark problem; `index` counts from 0 in the benchmark's own order."""

    index: int
    example_id: str
    question: str
    reference_answer: str


# --- Loading ------------------------------------------------------------------------------------------------


def load_problems(path: str, limit: int | None = None) -> list[Problem]:
    """The problems in benchmark order, all of them or the first `limit`.

    `path` is a local JSONL file with `question` and `answer`, the name of a shipped one (`embedded:...`), an
    `hf://datasets/...` path to a JSONL or Parquet file, or `openai/gsm8k` for the benchmark on the Hugging
    Face Hub (configuration `main`, split `test`). Raises `UserError` with file and row if a row is unusable.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of benchmark problems is {limit}; it must be at least 1, or none")
    problems: list[Problem] = []
    for place, row in _rows(path):
        problems.append(_problem(place, row, len(problems)))
        if len(problems) == limit:
            break
    if not problems:
        raise UserError(f"{path} holds no benchmark problems")
    return problems


def load_questions(
    path: str, rule: Rule, columns: Mapping[str, str], limit: int | None = None
) -> list[Problem]:
    """Questions and answers from any file of rows (JSONL, a JSON list, CSV, Parquet, `.gz`, `.zst`).

    Args:
      rule: how references are read.
      columns: the names of the `question` and `answer` columns; if not given, the usual names are tried.

    Raises:
      UserError: no such file or column, or a row without text in one; names file and row.
    """
    problems: list[Problem] = []
    stem = Path(path).name.partition(".")[0] or "question"
    for place, row in read_records(path, None, None):
        question, answer = (_cell(place, row, name, columns.get(name)) for name in ("question", "answer"))
        reference = rule.reference(answer)
        if not reference:
            raise UserError(f"{place}: the answer is empty")
        problems.append(Problem(len(problems), f"{stem}-{len(problems):04d}", question, reference))
        if len(problems) == limit:
            break
    if not problems:
        raise UserError(f"{path} holds no questions")
    return problems


_USUAL = {
    "question": ("question", "prompt", "instruction", "input", "problem", "query"),
    "answer": ("answer", "completion", "output", "target", "response", "solution"),
}


def _cell(place: str, row: Record, name: str, column: str | None) -> str:
    found = column or next((usual for usual in _USUAL[name] if usual in row), None)
    if found is None or found not in row:
        have = ", ".join(map(repr, list(row)[:12]))
        what = f"column {found!r:.80}" if found else f"column for the {name}"
        raise UserError(f"{place}: no {what}; it has {have}; name it: --columns {name}=COLUMN")
    value = row[found]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not is_text(value) or not value.strip():
        raise UserError(f"{place}: the column {found!r:.80} is empty or not text")
    return str(value)


def _rows(path: str) -> Iterable[tuple[str, Record]]:
    """The rows of the benchmark, each with its position for error messages."""
    if path.startswith("hf://") or path == HUB_DATASET:
        return _hub_rows(path)
    file = resolve(path)
    if file.exists():
        rows = read_numbered_jsonl(file, torn_last_line="refuse")
        return [(f"{path}:{line}", row) for line, row in rows]
    raise UserError(f"{path} does not exist; give a local JSONL file, an hf:// path or {HUB_DATASET}")


def _hub_rows(path: str) -> Iterable[tuple[str, Record]]:
    import datasets  # takes a second to import; local files do not need it

    try:
        if path == HUB_DATASET:
            rows = datasets.load_dataset(HUB_DATASET, "main", split="test")
        else:
            kind = "parquet" if path.endswith(".parquet") else "json"
            rows = datasets.load_dataset(kind, data_files={"test": path}, split="test")
    except Exception as error:  # datasets and the Hub client raise many types
        raise UserError(f"could not load {path} from the Hugging Face hub: {error}") from None
    return [(f"{path} row {index}", dict(row)) for index, row in enumerate(rows)]


def _problem(place: str, row: Record, index: int) -> Problem:
    for field in ("question", "answer"):
        if not is_text(row.get(field)) or not row[field].strip():
            raise UserError(f"{place}: the field `{field}` is missing or is not text")
    if "####" not in row["answer"]:
        raise UserError(
            f"{place}: the answer has no `####` before its final value; for another form give --rule"
        )
    reference = row["answer"].rsplit("####", 1)[1].strip()
    if not reference:
        raise UserError(f"{place}: there is no value after the last `####`")
    return Problem(index, f"gsm8k-{index:04d}", row["question"], reference)


# --- Scoring ------------------------------------------------------------------------------------------------


def score(
    problem: Problem,
    generated_text: str,
    prompt_token_count: int,
    generated_token_count: int,
    stop_reason: str,
    rule: Rule | None = None,
) -> Record:
    """One record of `predictions.jsonl`: the study's fields, plus `correct_numeric` next to `correct`.

    `generated_text` excludes the end-of-turn token; `stop_reason` is one of STOP_REASONS.
    """
    if stop_reason not in STOP_REASONS:
        raise ValueError(f"stop_reason is {stop_reason!r}; it must be one of {', '.join(STOP_REASONS)}")
    return {
        "example_id": problem.example_id,
        "benchmark_index": problem.index,
        "question": problem.question,
        "reference_answer": problem.reference_answer,
        "generated_text": generated_text,
        **score_text(generated_text, problem.reference_answer, rule),
        "prompt_token_count": prompt_token_count,
        "generated_token_count": generated_token_count,
        "stop_reason": stop_reason,
    }


def score_text(generated_text: str, reference_answer: str, rule: Rule | None = None) -> Record:
    """The scored part of a record.

    Without a box (or whatever the rule looks for), the prediction is null, and wrong by both scores.
    """
    answer = extract_boxed(generated_text) if rule is None else rule.found(generated_text)
    right = strict_match if rule is None else rule.right
    return {
        "extracted_answer": answer,
        "normalized_prediction": None if answer is None else normalize(answer),
        "normalized_reference": normalize(reference_answer),
        "correct": answer is not None and right(answer, reference_answer),
        "correct_numeric": answer is not None and numeric_match(answer, reference_answer),
        **({} if rule is None else {"rule": rule.name}),
    }


def count(records: Sequence[Record]) -> dict[str, int]:
    """Counts of prediction records: total, correct by each score, without an answer, and truncated."""
    return {
        "total": len(records),
        "correct_strict": sum(record["correct"] for record in records),
        "correct_numeric": sum(record["correct_numeric"] for record in records),
        "extraction_failures": sum(record["extracted_answer"] is None for record in records),
        "truncated": sum(record["stop_reason"] == "length" for record in records),
    }


def needs_separator(reference: str) -> bool:
    """Whether the strict score accepts this reference only with its thousands separators.

    `2,125` is such a reference: the strict score compares text unless both sides are decimals, so a correct
    answer written as `2125` counts as wrong. This affects 14 of the 1,319 references in GSM8K's test set.
    """
    number = read_number(reference)
    return "," in reference and number is not None and not strict_match(reference.replace(",", ""), reference)


def count_separators(records: Sequence[Record]) -> dict[str, int]:
    """How much of the strict score depends on thousands separators in the references.

    Returns:
      `references_with_separators`: records whose reference has them (see `needs_separator`);
      `wrong_by_separators`: those among them whose answer is the right number but wrong by the strict score.
    """
    affected = [record for record in records if needs_separator(record["reference_answer"])]
    return {
        "references_with_separators": len(affected),
        "wrong_by_separators": sum(
            record["correct_numeric"] and not record["correct"] for record in affected
        ),
    }


def aggregate(records: Sequence[Record]) -> dict[str, Any]:
    """Counts, rates (null if there are no records) and token totals over prediction records."""
    counts = count(records)

    def rate(name: str) -> float | None:
        return counts[name] / len(records) if records else None

    return counts | {
        "accuracy": rate("correct_strict"),
        "accuracy_numeric": rate("correct_numeric"),
        "extraction_failure_rate": rate("extraction_failures"),
        "truncation_rate": rate("truncated"),
        **count_separators(records),
        "prompt_tokens": sum(record["prompt_token_count"] for record in records),
        "generated_tokens": sum(record["generated_token_count"] for record in records),
    }


# --- Scoring again ------------------------------------------------------------------------------------------


def rescore(path: Path) -> list[Record]:
    """Read a predictions file and score every record again from its text, ignoring the stored scores.

    Raises `UserError` with file and line if a record cannot be scored.
    """
    records = []
    for line, record in read_numbered_jsonl(path, torn_last_line="refuse"):
        for field in ("generated_text", "reference_answer"):
            if not is_text(record.get(field)):
                raise UserError(f"{path}:{line}: the field `{field}` is missing or is not text")
        for field in ("example_id", "question"):
            if field in record and not is_text(record[field]):
                raise UserError(f"{path}:{line}: the field `{field}` is not text")
        for field in ("benchmark_index", "prompt_token_count", "generated_token_count"):
            if field in record and not (type(record[field]) is int and 0 <= record[field] < 2**31):
                raise UserError(f"{path}:{line}: the field `{field}` is not a count")
        if record.get("stop_reason") not in STOP_REASONS:
            raise UserError(
                f"{path}:{line}: stop_reason is {json.dumps(record.get('stop_reason'))}; "
                f"it must be {' or '.join(STOP_REASONS)}"
            )
        rule = record.get("rule")
        if rule is not None and not isinstance(rule, str):
            raise UserError(f"{path}:{line}: the field `rule` is not text")
        own = None if rule is None else rule_named(rule)
        records.append(record | score_text(record["generated_text"], record["reference_answer"], own))
    if not records:
        raise UserError(f"{path} holds no predictions")
    return records
