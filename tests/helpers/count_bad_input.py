"""Run the tests of bad input and print how many inputs they tried, by kind.

python tests/helpers/count_bad_input.py                                  # as in the default run
HYPOTHESIS_PROFILE=thorough python tests/helpers/count_bad_input.py      # ten times as many
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def main() -> int:
    tests = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(tests))
    words = [*map(str, sorted(tests.glob("hostile/test_*.py"))), "-n", "0", "-q", "-m", "", *sys.argv[1:]]
    code = int(pytest.main(words))
    from helpers.bad_input import TRIED

    print("\n| kind of input | tried |\n|---|---|")
    for kind, count in sorted(TRIED.items()):
        print(f"| {kind} | {count:,} |")
    print(f"| all | {TRIED.total():,} |")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
