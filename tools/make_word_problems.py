"""Generate the data of the embedded default: train.jsonl, val.jsonl and test.jsonl.

python tools/make_word_problems.py --check                          # compare with the shipped files
python tools/make_word_problems.py --out DIR                        # write the three files
python tools/make_word_problems.py --out DIR --pretraining 100000   # and pretraining.jsonl, not shipped
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxlora.data.render import load_tokenizer
from jaxlora.embedded.corpus import pretraining_texts
from jaxlora.embedded.files import check_files, data_files, write_files
from jaxlora.runtime.errors import UserError, add_number, run_main
from jaxlora.runtime.remote import embedded_path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to; existing files are kept unless --overwrite"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files in --out")
    parser.add_argument("--check", action="store_true", help="compare with the shipped files, byte for byte")
    add_number(
        parser,
        "--pretraining",
        zero=True,
        default=0,
        metavar="N",
        help="also write N pretraining texts",
    )
    add_number(
        parser,
        "--pretraining-seed",
        zero=True,
        default=0,
        help="seed for the pretraining texts (default 0)",
    )
    options = parser.parse_args()
    if not options.check and options.out is None:
        raise UserError("nothing to do: give --out DIR or --check")
    if options.pretraining and options.out is None:
        raise UserError("--pretraining needs --out DIR")
    files = data_files()
    if options.check:
        check_files(files, embedded_path("data"))
        print(f"the shipped data is reproduced byte for byte: {', '.join(files)}")
    if options.out is not None:
        if options.pretraining:
            texts = pretraining_texts(
                options.pretraining_seed, options.pretraining, load_tokenizer("embedded:base")
            )
            files["pretraining.jsonl"] = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        for path in write_files(files, options.out, options.overwrite):
            print(path)


if __name__ == "__main__":
    run_main(main)
