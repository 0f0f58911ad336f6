r"""Convert GSM8K rows to the schema of the curation source, so that tools/build_dataset.py can read them.

python tools/gsm8k_to_openmath.py gsm8k/train.jsonl --out rows.jsonl                 # or --out rows.parquet
python tools/gsm8k_to_openmath.py gsm8k/train.jsonl --out rows.jsonl --rows 1000000  # load test: rows repeat

`question` becomes `problem`; `answer` becomes `generated_solution` with its calculator marks `<<...>>`
dropped and its last line `#### 72` written as `The final answer is $\boxed{72}$.`; `expected_answer` is the
text after `####`; `problem_source` is `gsm8k`. With --rows, repeated problems get their round's number at the
end, so that they are different problems.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from jaxlora.data.containers import parse_object, read_lines
from jaxlora.data.gsm8k_source import convert
from jaxlora.data.sources import locate
from jaxlora.runtime.errors import UserError, run_main
from jaxlora.runtime.progress import progress_bar

PARQUET_GROUP_ROWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="FILE.jsonl", help="GSM8K rows with question and answer")
    parser.add_argument("--out", type=Path, required=True, help="FILE.jsonl or FILE.parquet")
    parser.add_argument("--rows", type=int, help="write this many rows, repeating the input")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    options = parser.parse_args()
    if options.out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {options.out}: end it in .jsonl or .parquet")
    if options.out.exists() and not options.overwrite:
        raise UserError(f"{options.out} exists; choose another --out, or pass --overwrite")
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows is {options.rows}; it must be at least 1")
    rows = _converted(options.input)
    total = len(rows) if options.rows is None else options.rows
    with progress_bar("converting", total, "rows") as advance:
        stream = _repeated(rows, total)
        if options.out.suffix == ".jsonl":
            with options.out.open("w", encoding="utf-8", newline="\n") as file:
                for row in stream:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    advance(1)
        else:
            _write_parquet(options.out, stream, advance)
    print(f"{options.out}: {total:,} rows")


def _converted(path: str) -> list[dict[str, str]]:
    rows = []
    for number, line in read_lines(locate(path)):
        try:
            rows.append(convert(parse_object(line)))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not rows:
        raise UserError(f"{path}: is empty; give GSM8K rows")
    return rows


def _repeated(rows: list[dict[str, str]], total: int) -> Iterator[dict[str, str]]:
    for number in range(total):
        row = rows[number % len(rows)]
        again = number // len(rows)
        yield row if not again else row | {"problem": f"{row['problem']} (variant {again})"}


def _write_parquet(path: Path, rows: Iterator[dict[str, str]], advance) -> None:
    from itertools import islice

    import pyarrow
    import pyarrow.parquet

    writer = None
    with path.open("wb") as file:
        while group := list(islice(rows, PARQUET_GROUP_ROWS)):
            table = pyarrow.Table.from_pylist(group)
            writer = writer or pyarrow.parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
            advance(len(group))
        if writer:
            writer.close()


if __name__ == "__main__":
    run_main(main)
