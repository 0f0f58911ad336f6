"""Build a dataset: stream the source, accept, group and split rows, write raw and rendered files.

    jaxlora data build --out DIR                                   # the study's data, from the Hub
    jaxlora data build --source rows.jsonl --out DIR               # or rows.parquet
    jaxlora data build --source OWNER/NAME --split train --out DIR
    jaxlora data build --out DIR --verify-study                    # DIR exists: compare, build nothing

DIR gets raw/{train,val}.jsonl, rendered/{train,val}.jsonl and manifest.json. The source has the fields
problem, generated_solution, expected_answer and problem_source; GSM8K's own rows (question, and answer with
its `#### 72`) are also accepted: <<...>> marks are removed, and the answer is boxed. Next: jaxlora data check
DIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxlora.cli import HelpFormatter
from jaxlora.data.build import BuildPlan, build, verify
from jaxlora.data.curation import SOURCES
from jaxlora.data.sources import is_file_source
from jaxlora.data.study_dataset import SOURCE, SPLIT, differences
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console
from jaxlora.runtime.text import harmless


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        epilog="exit codes: 0 done, 1 built but different from the study's data, 2 nothing built",
    )
    parser.add_argument(
        "--source", default=SOURCE, help=f"FILE.jsonl, FILE.parquet or Hub dataset ({SOURCE})"
    )
    parser.add_argument("--split", help=f"split of a Hub dataset ({SPLIT} for the default source)")
    parser.add_argument("--revision", help="commit of a Hub dataset [the newest, which the manifest records]")
    parser.add_argument(
        "--sources",
        nargs="+",
        default=list(SOURCES),
        metavar="NAME",
        help="values of problem_source to keep; problems are grouped in this order",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR once the new build is complete")
    parser.add_argument(
        "--verify-study",
        action="store_true",
        help="compare counts and hashes with the study's; exit code 1 if any differs",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
    options = parser.parse_args()

    is_study = (
        options.source == SOURCE and options.split in (None, SPLIT) and options.sources == list(SOURCES)
    )
    split = SPLIT if options.source == SOURCE and options.split is None else options.split
    if is_file_source(options.source) and (split or options.revision):
        raise UserError(f"{options.source} is a file: --split and --revision are for Hub datasets")
    only_verify = options.verify_study and options.out.exists() and not options.overwrite
    plan = BuildPlan(
        options.source, split, options.out, tuple(options.sources), options.revision, options.overwrite
    )
    if options.dry_run:
        action = "compare the files of" if only_verify else "build"
        place = options.source if split is None else f"{options.source}, split {split}"
        print(f"would {action} {options.out}" + ("" if only_verify else f" from {place}"))
        if options.out.exists() and not (only_verify or options.overwrite):
            print(f"but {options.out} exists: give --overwrite")
        return 0
    if only_verify:
        console.print(f"{options.out} exists: comparing it, building nothing", markup=False)
        manifest = verify(options.out)
    else:
        manifest = build(plan)
    _summarise(manifest)
    if not (is_study or options.verify_study):
        return 0
    return _compare(manifest)


def _summarise(manifest: dict[str, Any]) -> None:
    """Print counts, one line per source and one per file."""
    print(f"rows read: {manifest['rows_read']:,}")
    for source, candidates in manifest["candidates"].items():
        reasons = ", ".join(
            f"{count:,} {name}" for name, count in manifest["rejected"][source].items() if count
        )
        accepted = manifest["accepted"][source]
        counts = f"{candidates:,} candidates, {accepted:,} accepted; rejected: {reasons or 'none'}"
        print(harmless(f"{source}: {counts}"))
    for part, rows in manifest["split_rows"].items():
        print(f"{part}: {rows['total']:,} rows in {manifest['split_groups'][part]:,} groups")
    for name, file in manifest["files"].items():
        print(f"{file['sha256']}  {file['bytes']:>13,} bytes  {name}")


def _compare(manifest: dict[str, Any]) -> int:
    lines = differences(manifest)
    for line in lines:
        console.print(harmless(f"differs: {line}"), style="red", markup=False)
    if lines:
        console.print(f"not the study's data: {len(lines)} figures differ", style="bold red")
        return 1
    console.print("the study's data, to the byte", style="green")
    return 0
