"""Run the data gates and write the report that training requires.

    jaxlora data check DIR --benchmark openai/gsm8k        # -> DIR/contamination.json
    jaxlora data check DIR --benchmark gsm8k/test.jsonl
    jaxlora data check --train hf://OWNER/NAME/rendered/train.jsonl \\
        --validation hf://OWNER/NAME/rendered/val.jsonl --benchmark openai/gsm8k --report contamination.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxlora.data.build import check_built
from jaxlora.data.gates import REPORT_NAME, Benchmark, FilePair, check, find_pairs
from jaxlora.data.leaks import CONTAINED, EQUAL, SAME_WORDS
from jaxlora.evals.gsm8k import load_problems
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import write_json_atomic
from jaxlora.runtime.progress import console
from jaxlora.runtime.text import harmless

VERBS = {EQUAL: "is", SAME_WORDS: "has the words of", CONTAINED: "contains"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Check that no benchmark question is in the training rows, and that train and validation"
        " share no row and no problem. The report holds the SHA-256 of every file; training accepts it only"
        " for these files.",
        epilog="exit codes: 0 all gates passed, 1 a gate failed, 2 the check could not be run",
    )
    parser.add_argument(
        "dir",
        nargs="?",
        metavar="DIR",
        help="folder with train.jsonl and val.jsonl, directly or in raw/ and rendered/",
    )
    parser.add_argument("--train", help="instead of DIR: one training file, local or hf://")
    parser.add_argument("--validation", help="instead of DIR: the validation file that goes with it")
    parser.add_argument(
        "--benchmark", required=True, help="GSM8K-like test rows: a JSONL file, hf:// path, or openai/gsm8k"
    )
    parser.add_argument(
        "--report",
        type=Path,
        help=f"file to write the report to (default: DIR/{REPORT_NAME}); an existing one is replaced",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be compared and stop")
    options = parser.parse_args()

    if options.dir and not (options.train or options.validation):
        check_built(Path(options.dir))
        pairs, root = find_pairs(Path(options.dir)), options.dir
        report_path = options.report or Path(options.dir) / REPORT_NAME
    elif options.train and options.validation and not options.dir:
        pairs, root = [FilePair(options.train, options.validation)], ""
        if options.report is None:
            raise UserError(f"give a file for the report: --report {REPORT_NAME}")
        report_path = options.report
    else:
        raise UserError("give either DIR, or both --train and --validation")
    if options.dry_run:
        for pair in pairs:
            print(f"would compare {pair.train} with {pair.validation} and with {options.benchmark}")
        print(f"would write {report_path}")
        return 0

    problems = load_problems(options.benchmark)
    questions = [(problem.example_id, problem.question) for problem in problems]
    report = check(pairs, Benchmark(options.benchmark, questions), root)
    write_json_atomic(report_path, report)
    for gate in report["gates"]:
        colour, verdict = ("green", "passed") if gate["passed"] else ("bold red", "FAILED")
        file = next(file["path"] for file in report["files"] if file["sha256"] == gate["train_sha256"])
        text = f"{verdict}  {gate['name']:<18} {gate['overlaps']:>6,} overlaps  {file}"
        console.print(text, style=colour, markup=False)
        for row in gate["overlapping"][:3]:
            hits = zip(row.get("example_ids", ()), row.get("rules", ()), strict=True)
            also = ", ".join(f"{VERBS[rule]} {example_id}" for example_id, rule in hits)
            line = harmless(f"          row {row['row_id']} (line {row['line']}) {also}".rstrip())
            console.print(line, markup=False, soft_wrap=True)
    print(report_path)
    return 0 if report["passed"] else 1
