"""Answer lengths of an earlier evaluation decide the order of work, whatever state its files are in."""

from __future__ import annotations

import json
import os

import pytest

from jaxlora.evals.earlier import earlier_lengths


def write(folder, sha256="aa", lengths=(3, 5), age=0, records=None):
    folder = folder / "evaluation"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"prompts_sha256": sha256}))
    records = records or [
        {"benchmark_index": i, "generated_token_count": n} for i, n in reversed([*enumerate(lengths)])
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    os.utime(folder / "summary.json", (1e9 - age, 1e9 - age))
    return folder


def test_the_newest_evaluation_of_the_same_prompts_counts_and_the_runs_own_before_it(tmp_path):
    assert earlier_lengths(tmp_path, "aa", tmp_path / "x" / "evaluation") is None
    write(tmp_path / "old", lengths=(3, 5), age=10)
    write(tmp_path / "new", lengths=(4, 6))
    write(tmp_path / "of other prompts", "bb", lengths=(9, 9))
    own = write(tmp_path / "own", lengths=(1, 2), age=20)
    assert earlier_lengths(tmp_path, "aa", tmp_path / "x" / "evaluation") == [4, 6]
    assert earlier_lengths(tmp_path, "aa", own) == [1, 2]


@pytest.mark.parametrize(
    "records",
    [
        [{"benchmark_index": 0}],
        [{"benchmark_index": 1, "generated_token_count": 2}],
        [{"benchmark_index": [], "generated_token_count": 2}],
        [{"benchmark_index": 0, "generated_token_count": "2"}],
        [{"benchmark_index": 0, "generated_token_count": True}],
        [7],
    ],
    ids=str,
)
def test_an_odd_file_is_passed_over(tmp_path, records):
    write(tmp_path / "odd", records=records)
    write(tmp_path / "sound", lengths=(4, 6), age=10)
    assert earlier_lengths(tmp_path, "aa", tmp_path / "x") == [4, 6]
    (tmp_path / "sound" / "evaluation" / "predictions.jsonl").unlink()
    (tmp_path / "odd" / "evaluation" / "summary.json").write_text("{")
    assert earlier_lengths(tmp_path, "aa", tmp_path / "x") is None
