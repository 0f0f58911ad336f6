"""Audit a dataset: a quality report, token statistics, and a sample of rows for a person to read.

    audit(find_rendered(Path("data/mine")), tokenizer, "Qwen/Qwen3-8B", Path("audit"), seed=0, pack_rows=100)

writes `quality.json`, `tokens.json`, `review.jsonl` and `review.html`. Token counts are shifted counts, as in
training: the length of the rendered conversation minus one. Percentiles are interpolated linearly.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.data.boxes import last_box
from jaxlora.data.containers import count_rows, read_rows
from jaxlora.data.curation import is_prompt_wrapper, is_suspicious, normal_answer
from jaxlora.data.formats import find_format, to_example
from jaxlora.data.gates import find_pairs
from jaxlora.data.messages import Example
from jaxlora.data.render import RenderedRow, Tokenizer, render_batch
from jaxlora.data.review import review_page
from jaxlora.data.sources import locate
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import sha256_of, write_json_atomic, write_jsonl_atomic, write_text_atomic
from jaxlora.runtime.progress import progress_bar

OUTPUTS = ("quality.json", "tokens.json", "review.jsonl", "review.html")
BATCH_ROWS = 512  # rows tokenised together
BIN_TOKENS = 64
FLAGGED_SHARE = 0.3  # of the review pack, at most
LONGEST_ROWS = 10


@dataclass(frozen=True)
class RowFacts:
    """What the audit keeps about a row: where it is, which rules it breaks, and its shifted token counts."""

    split: str
    line: int
    row_id: str
    source: str
    has_expected: bool
    flags: tuple[str, ...]
    tokens: int
    tokens_without_system: int


def find_rendered(folder: Path) -> dict[str, str]:
    """The rendered files of a dataset by split, from its `rendered/` folder or else the folder itself.

    Raises:
      UserError: there are none.
    """
    pairs = find_pairs(folder)
    pair = next((pair for pair in pairs if Path(pair.train).parent.name == "rendered"), pairs[0])
    return {"train": pair.train, "val": pair.validation}


def flags_of(problem: str, solution: str, expected_answer: str | None) -> tuple[str, ...]:
    """Every rule of the acceptance gate that the row breaks, not just the first."""
    flags = []
    box = last_box(solution)
    if box is None:
        flags.append("missing_box")
    elif expected_answer is not None and normal_answer(box) != normal_answer(expected_answer):
        flags.append("boxed_mismatch")
    if is_suspicious(solution):
        flags.append("suspicious_pattern")
    if is_prompt_wrapper(problem):
        flags.append("problem_pattern")
    return tuple(flags)


@dataclass(frozen=True)
class _Row:
    """A row of a file: the record as stored, and the example parsed from it."""

    line: int
    record: dict[str, Any]
    example: Example

    @property
    def problem(self) -> str:
        """The user turns."""
        turns = self.example.messages
        return "\n".join(str(turn["content"]) for turn in turns if turn["role"] == "user")

    @property
    def solution(self) -> str:
        """The last turn, or the whole text if the row is plain text."""
        text = self.example.text
        return str(self.example.messages[-1]["content"]) if text is None else text


def _read(path: str) -> Iterator[_Row]:
    """The rows of a file in any format; raises `UserError` with file and line if one cannot be parsed."""
    for number, _, record in read_rows(locate(path)):
        try:
            if isinstance(record, ValueError):
                raise record
            yield _Row(number, record, to_example(find_format(record), record))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None


def _render(path: str, tokenizer: Tokenizer, rows: Sequence[_Row], with_system: bool) -> list[RenderedRow]:
    examples = [row.example for row in rows]
    if not with_system:
        examples = [
            replace(example, messages=[turn for turn in example.messages if turn["role"] != "system"])
            for example in examples
        ]
    rendered = []
    for row, result in zip(rows, render_batch(tokenizer, examples), strict=True):
        if isinstance(result, UserError):
            raise UserError(f"{path}:{row.line}: {result}")
        rendered.append(result)
    return rendered


def read_facts(split: str, path: str, tokenizer: Tokenizer) -> Iterator[RowFacts]:
    """Stream the facts of each row of a rendered file.

    Raises:
      UserError: a row cannot be used for training; the message gives file and line.
    """
    lines = _read(path)
    while rows := list(islice(lines, BATCH_ROWS)):
        complete = _render(path, tokenizer, rows, with_system=True)
        bare = _render(path, tokenizer, rows, with_system=False)
        for row, full, without in zip(rows, complete, bare, strict=True):
            expected = row.record.get("expected_answer")
            yield RowFacts(
                split=split,
                line=row.line,
                row_id=full.row_id,
                source=row.record.get("source") or "",
                has_expected=expected is not None,
                flags=flags_of(row.problem, row.solution, expected),
                tokens=full.n_tokens,
                tokens_without_system=without.n_tokens,
            )


def quality(facts: Sequence[RowFacts]) -> dict[str, Any]:
    """Row counts by source, the boxed-match rate, and the number of hits of each rule."""
    with_expected = [row for row in facts if row.has_expected]
    matches = sum(not {"missing_box", "boxed_mismatch"} & set(row.flags) for row in with_expected)
    hits = Counter(flag for row in facts for flag in row.flags)
    return {
        "rows": len(facts),
        "rows_by_source": dict(sorted(Counter(row.source for row in facts).items())),
        "distinct_row_ids": len({row.row_id for row in facts}),
        "rows_with_expected_answer": len(with_expected),
        "boxed_matches": matches,
        "boxed_match_rate": matches / len(with_expected) if with_expected else None,
        "missing_box": hits["missing_box"],
        "boxed_mismatch": hits["boxed_mismatch"],
        "suspicious_hits": hits["suspicious_pattern"],
        "prompt_wrapper_hits": hits["problem_pattern"],
    }


def token_statistics(counts: Sequence[int]) -> dict[str, Any]:
    """Total, mean, percentiles, extremes, and a histogram with bins `[from, below, rows]`."""
    values = np.asarray(counts)
    p50, p90, p95 = (float(value) for value in np.percentile(values, [50, 90, 95]))
    bins = np.bincount(values // BIN_TOKENS)
    histogram = [[i * BIN_TOKENS, (i + 1) * BIN_TOKENS, int(rows)] for i, rows in enumerate(bins)]
    return {
        "total": int(values.sum()),
        "mean": float(values.mean()),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "min": int(values.min()),
        "max": int(values.max()),
        "histogram": histogram,
    }


def tokens_report(facts: Sequence[RowFacts]) -> dict[str, Any]:
    """Token statistics with and without the system prompt, and the system prompt's tokens per row."""
    costs = [row.tokens - row.tokens_without_system for row in facts]
    return {
        "with_system_prompt": token_statistics([row.tokens for row in facts]),
        "without_system_prompt": token_statistics([row.tokens_without_system for row in facts]),
        "system_prompt_tokens_per_row": {"min": min(costs), "max": max(costs)},
    }


def choose_rows(facts: Sequence[RowFacts], seed: int, count: int) -> list[tuple[RowFacts, str]]:
    """Choose at most `count` rows, each with the reason: flagged rows, the longest, and random draws.

    The same rows and seed always give the same pack.
    """
    generator = random.Random(seed)
    flagged = [row for row in facts if row.flags]
    flagged = generator.sample(flagged, min(len(flagged), int(FLAGGED_SHARE * count)))
    chosen = {(row.split, row.line): (row, f"flagged: {', '.join(row.flags)}") for row in flagged}
    for row in sorted(facts, key=lambda row: -row.tokens)[: min(LONGEST_ROWS, count - len(chosen))]:
        chosen.setdefault((row.split, row.line), (row, f"one of the {LONGEST_ROWS} longest"))
    rest = [row for row in facts if (row.split, row.line) not in chosen]
    for row in generator.sample(rest, min(len(rest), count - len(chosen))):
        chosen[row.split, row.line] = (row, "random draw")
    return list(chosen.values())


def review_pack(
    chosen: Sequence[tuple[RowFacts, str]], files: dict[str, str], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The chosen rows in full, with the text split into the parts with and without loss."""
    wanted = {(row.split, row.line) for row, _ in chosen}
    rows = {
        (split, row.line): row
        for split, path in files.items()
        for row in _read(path)
        if (split, row.line) in wanted
    }
    pack = []
    for index, (facts, reason) in enumerate(chosen, start=1):
        row = rows[facts.split, facts.line]
        (rendered,) = _render(files[facts.split], tokenizer, [row], with_system=True)
        cut = rendered.prompt_length
        pack.append(
            {
                "number": index,
                "reason": reason,
                "split": facts.split,
                "line": facts.line,
                "row_id": facts.row_id,
                "source": facts.source,
                "expected_answer": row.record.get("expected_answer"),
                "box": last_box(row.solution),
                "flags": list(facts.flags),
                "prompt_tokens": cut,
                "answer_tokens": len(rendered.tokens) - cut,
                "messages": row.example.messages,
                "masked_text": tokenizer.decode(rendered.tokens[:cut], clean_up_tokenization_spaces=False),
                "learned_text": tokenizer.decode(rendered.tokens[cut:], clean_up_tokenization_spaces=False),
            }
        )
    return pack


def audit(
    files: dict[str, str],
    tokenizer: Tokenizer,
    tokenizer_name: str,
    out: Path,
    seed: int,
    pack_rows: int,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Audit the rendered files (`{split: path}`), write all reports to `out`, and return them.

    Raises:
      UserError: a row cannot be used, a file is empty, or a report exists and `overwrite` is false.
    """
    existing = [out / name for name in OUTPUTS if (out / name).exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists; choose another --out, or pass --overwrite")
    facts: list[RowFacts] = []
    for split, path in files.items():
        before = len(facts)
        with progress_bar(f"auditing {split}", count_rows(locate(path)), "rows") as advance:
            for row in read_facts(split, path, tokenizer):
                facts.append(row)
                advance(1)
        if len(facts) == before:
            raise UserError(f"{path}: is empty; there is nothing to audit")
    inputs = {split: {"path": path, "sha256": sha256_of(locate(path))} for split, path in files.items()}
    parts = {split: [row for row in facts if row.split == split] for split in files} | {"all": facts}
    reports = {
        "quality": {"inputs": inputs} | {name: quality(rows) for name, rows in parts.items()},
        "tokens": {"inputs": inputs, "tokenizer": tokenizer_name}
        | {name: tokens_report(rows) for name, rows in parts.items()},
    }
    pack = review_pack(choose_rows(facts, seed, pack_rows), files, tokenizer)
    page = review_page(pack, inputs, tokenizer.all_special_tokens, seed)
    out.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        write_json_atomic(out / f"{name}.json", report)
    write_jsonl_atomic(out / "review.jsonl", pack)
    write_text_atomic(out / "review.html", page)
    return reports | {"review": pack}
