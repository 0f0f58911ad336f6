"""Coverage-guided fuzzing finds no input that breaks a reader; see helpers/fuzz_bytes.py."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from helpers.bad_input import TRIED

SECONDS = 120 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 20


@pytest.mark.slow
@pytest.mark.parametrize("target", ["safetensors", "row", "prediction", "latex", "answer"])
def test_no_bytes_break_a_reader(repository, target):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; pip install atheris")
    words = [sys.executable, str(repository / "tests/helpers/fuzz_bytes.py"), target, str(SECONDS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS + 120)
    assert done.returncode == 0, done.stderr[-3000:]
    (runs,) = re.findall(r"Done (\d+) runs", done.stderr)
    TRIED[f"bytes guided by coverage: {target}"] += int(runs)
    assert int(runs) > 1000
