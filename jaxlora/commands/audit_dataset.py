"""Audit a dataset: quality report, token statistics, and a sample of rows for human review.

    jaxlora data audit DIR --tokenizer Qwen/Qwen3-8B --out AUDIT_DIR

writes quality.json, tokens.json, review.jsonl and review.html (self-contained: open it in any browser).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxlora.cli import HelpFormatter
from jaxlora.data.audit import audit, find_rendered
from jaxlora.data.render import load_tokenizer
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.text import harmless

BAR_WIDTH = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR", help="dataset with rendered rows")
    parser.add_argument("--tokenizer", required=True, help="directory or Hub name of the model's tokenizer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the reports")
    parser.add_argument("--rows", type=int, default=100, help="rows in the review pack (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling the review pack (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing reports")
    parser.add_argument("--dry-run", action="store_true", help="print what would be audited and stop")
    options = parser.parse_args()
    if options.rows < 1:
        raise UserError(f"--rows is {options.rows}; it must be at least 1")
    files = find_rendered(options.dir)
    if options.dry_run:
        for split, path in files.items():
            print(f"would audit {split}: {path}")
        print(f"would write quality.json, tokens.json, review.jsonl and review.html to {options.out}")
        return
    tokenizer = load_tokenizer(options.tokenizer)
    reports = audit(
        files, tokenizer, options.tokenizer, options.out, options.seed, options.rows, options.overwrite
    )
    _print(reports["quality"]["all"], reports["tokens"]["all"])
    print(options.out / "review.html")


def _print(quality: dict[str, Any], tokens: dict[str, Any]) -> None:
    rate = quality["boxed_match_rate"]
    by_source = ", ".join(
        f"{rows:,} {source or 'unnamed'}" for source, rows in quality["rows_by_source"].items()
    )
    print(harmless(f"rows: {quality['rows']:,} ({by_source})"))
    print(f"boxed-match rate: {'no expected answers' if rate is None else f'{rate:.4f}'}")
    print(f"suspicious hits: {quality['suspicious_hits']:,}; wrappers: {quality['prompt_wrapper_hits']:,}")
    for name in ("with_system_prompt", "without_system_prompt"):
        part = tokens[name]
        figures = ", ".join(f"{key} {part[key]:,.1f}" for key in ("mean", "p50", "p90", "p95"))
        print(f"tokens {name.replace('_', ' ')}: total {part['total']:,}, {figures}, max {part['max']:,}")
    cost = tokens["system_prompt_tokens_per_row"]
    print(f"system prompt: {cost['min']} to {cost['max']} tokens per row")
    histogram = tokens["with_system_prompt"]["histogram"]
    most = max(rows for _, _, rows in histogram)
    for low, high, rows in histogram:
        if rows:
            bar = "#" * max(1, round(BAR_WIDTH * rows / most))
            print(f"{low:>6} to {high - 1:>5}  {bar:<{BAR_WIDTH}} {rows:,}")
