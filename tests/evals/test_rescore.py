"""Promises of tools/rescore.py: the counts of a predictions file, or one line that says what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jaxlora.evals.gsm8k import Problem, score

PROBLEM = Problem(0, "gsm8k-0000", "How much?", "460")
RECORDS = [
    score(PROBLEM, r"\boxed{460}", 10, 1, "stop"),
    score(PROBLEM, r"\boxed{\$460}", 10, 2, "stop"),
    score(PROBLEM, r"\boxed{7}", 10, 2, "stop"),
    score(PROBLEM, r"\boxed{460} and \boxed{46", 10, 512, "length"),
]


@pytest.fixture
def rescore(repository, tmp_path):
    def run(text: str | None) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "predictions.jsonl"
        if text is not None:
            path.write_text(text, encoding="utf-8")
        return subprocess.run(
            [sys.executable, repository / "tools" / "rescore.py", path],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )

    return run


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_it_prints_the_five_counts_and_ignores_stored_scores(rescore):
    wrong_scores = [record | {"correct": True, "correct_numeric": True} for record in RECORDS]
    for records in (RECORDS, wrong_scores):
        result = rescore(lines(records))
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == {
            "total": 4,
            "correct_strict": 1,
            "correct_numeric": 2,
            "extraction_failures": 1,
            "truncated": 1,
        }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "predictions.jsonl does not exist"),
        ("", "predictions.jsonl holds no predictions"),
        (lines(RECORDS) + '{"generated', "predictions.jsonl:5: not a JSON line"),
        (lines(RECORDS) + "7\n", "predictions.jsonl:5: the line holds int"),
        (
            lines([RECORDS[0], {"reference_answer": "1"}]),
            "predictions.jsonl:2: the field `generated_text` is missing",
        ),
        (
            lines([RECORDS[0] | {"reference_answer": 460}]),
            "predictions.jsonl:1: the field `reference_answer`",
        ),
        (lines([RECORDS[0] | {"stop_reason": "eos"}]), 'predictions.jsonl:1: stop_reason is "eos"'),
    ],
)
def test_a_file_that_cannot_be_scored_ends_in_one_line_and_exit_code_2(rescore, text, message):
    result = rescore(text)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
