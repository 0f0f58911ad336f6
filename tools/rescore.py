"""Score a predictions file again from its generated text and print the counts as JSON.

python tools/rescore.py RESULTS/RUN_ID/evaluation/predictions.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxlora.evals.gsm8k import count, rescore
from jaxlora.runtime.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Score a GSM8K predictions file again from its text and print the counts as JSON. "
        "The scores stored in the file are ignored; nothing is written."
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.jsonl", help="the file to score")
    print(json.dumps(count(rescore(parser.parse_args().predictions)), indent=2))


if __name__ == "__main__":
    run_main(main)
