"""Train the tokenizer of the embedded default on the word-problem corpus.

python tools/make_tiny_tokenizer.py --check       # compare with the shipped files
python tools/make_tiny_tokenizer.py --out DIR     # write tokenizer.json and tokenizer_config.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxlora.embedded.files import check_files, write_files
from jaxlora.embedded.tokenizer import tokenizer_files
from jaxlora.runtime.errors import UserError, run_main
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
    options = parser.parse_args()
    if not options.check and options.out is None:
        raise UserError("nothing to do: give --out DIR or --check")
    files = tokenizer_files()
    if options.check:
        check_files(files, embedded_path("base"))
        print(f"the shipped tokenizer is reproduced byte for byte: {', '.join(files)}")
    if options.out is not None:
        for path in write_files(files, options.out, options.overwrite):
            print(path)


if __name__ == "__main__":
    run_main(main)
