"""The benchmark counts real tokens only, runs on any device, and prints a table and one JSON line."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from jaxlora.errors import UserError

SMALL = ["--model", "embedded:base", "--num-layers", "1", "--dtype", "float32"]


@pytest.fixture
def bench(repository, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench_tool", repository / "tools" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        assert module.main() == 0
        printed = capsys.readouterr()
        assert "tokens per second" in printed.err
        return json.loads(printed.out)

    return run


def test_training_counts_real_tokens_and_compilations(bench, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"rows": [[5, 21], [7, 41], [3, 11], [9, 61]] * 3}))
    words = ["train", *SMALL, "--rows", str(rows), "--batch-rows", "2", "--buffer-sizes", "1"]
    result = bench(*words, "--no-validation")
    assert (result["steps"], result["compilations"]) == (6, 1)
    assert result["padding_efficiency"] == pytest.approx(130 / 256)  # 60 and 70 tokens in buffers of 128
    assert result["real_tokens_per_second"] > 0
    assert (result["device"], result["peak_tflops"]) == ("cpu", None)


def test_decoding_gives_each_prompt_its_forced_length(bench, tmp_path):
    lengths = tmp_path / "lengths.json"
    lengths.write_text(json.dumps({"prompt_tokens": [5, 9, 7, 6], "adapter_generated_tokens": [3, 8, 1, 4]}))
    result = bench("decode", *SMALL, "--lengths", str(lengths), "--slots", "2")
    assert (result["prompt_tokens"], result["generated_tokens"], result["merged"]) == (27, 16, True)
    with pytest.raises(UserError, match="adapter_generated_tokens"):
        bench("decode", *SMALL, "--lengths", str(lengths), "--answers", "base")
