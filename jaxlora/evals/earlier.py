"""Answer lengths from an earlier evaluation of the same prompts, so that the longest answers can start first.

    expected = earlier_lengths(Path("results"), inputs["prompts_sha256"], near=out_dir)     # or None

Any evaluation in the results directory will do, including the base's: the answers of two models to one
question differ less in length than answers to two questions. Lengths only affect the order of work, never an
answer, so malformed files are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json, read_jsonl


def earlier_lengths(results_dir: Path, prompts_sha256: str, near: Path) -> list[float] | None:
    """Generated tokens of each prompt, in the benchmark's order, from the newest evaluation of these prompts.

    Args:
      prompts_sha256: hash of the prompts' token ids, as recorded in summaries.
      near: where this evaluation will be written; an older one of the same run is preferred.
    """
    summaries = [path / "summary.json" for path in (near, *sorted(results_dir.glob("*/evaluation")))]
    found = [path for path in summaries if path.is_file() and _matches(path, prompts_sha256)]
    newest_first = sorted(found, key=lambda path: (path.parent != near, -path.stat().st_mtime, path))
    return next(filter(None, map(_lengths, newest_first)), None)


def _matches(summary: Path, prompts_sha256: str) -> bool:
    try:
        values: Any = read_json(summary)
    except (UserError, OSError):
        return False
    return isinstance(values, dict) and values.get("prompts_sha256") == prompts_sha256


def _lengths(summary: Path) -> list[float] | None:
    try:
        records = read_jsonl(summary.with_name("predictions.jsonl"))
        values = {record["benchmark_index"]: record["generated_token_count"] for record in records}
        lengths = [values[i] for i in range(len(records))]
    except (UserError, OSError, KeyError, TypeError):
        return None
    return [float(n) for n in lengths] if all(type(n) is int and n >= 0 for n in lengths) else None
