"""Promises of the benchmark loader, the prediction records, and the files of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlora.evals.gsm8k import Problem, aggregate, load_problems, needs_separator, rescore, score
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import append_jsonl, read_json, read_jsonl, write_json_atomic, write_jsonl_atomic
from jaxlora.runtime.records import METRIC_FIELDS, SUMMARY_FIELDS, metric_record, summary_record

PROBLEM = Problem(3, "gsm8k-0003", "How much?", "460")


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# --- Loading the benchmark ----------------------------------------------------------------------------------


def test_the_reference_is_the_text_after_the_last_marker(tmp_path):
    path = write_rows(
        tmp_path / "test.jsonl",
        {"question": "Q one", "answer": "#### 4 was a try\n####  5 "},
        {"question": "Q two", "answer": "2+2\n#### 1,000\n"},
    )
    assert load_problems(path) == [
        Problem(0, "gsm8k-0000", "Q one", "5"),
        Problem(1, "gsm8k-0001", "Q two", "1,000"),
    ]
    assert load_problems(path, limit=1) == load_problems(path)[:1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", ":2: not a JSON line"),
        ("[1]", ":2: the line holds list"),
        ({"question": "Q"}, ":2: the field `answer` is missing"),
        ({"question": "  ", "answer": "#### 1"}, ":2: the field `question` is missing or is not text"),
        ({"question": "Q", "answer": "1"}, ":2: the answer has no `####`"),
        ({"question": "Q", "answer": "1 ####  "}, ":2: there is no value after the last `####`"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(tmp_path, row, message):
    path = write_rows(tmp_path / "test.jsonl", {"question": "Q", "answer": "#### 1"}, row)
    with pytest.raises(UserError, match="test.jsonl" + message.replace("[", r"\[")):
        load_problems(path)


def test_a_missing_or_empty_benchmark_is_an_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="holds no benchmark problems"):
        load_problems(write_rows(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="limit of benchmark problems is 0"):
        load_problems(str(tmp_path / "empty.jsonl"), limit=0)


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("openai/gsm8k", ("openai/gsm8k", "main")),
        ("hf://datasets/openai/gsm8k/main/test.parquet", ("parquet",)),
        ("hf://datasets/openai/gsm8k/test.jsonl", ("json",)),
    ],
)
def test_the_hub_gives_the_same_problems_as_a_local_file(monkeypatch, tmp_path, path, arguments):
    datasets = pytest.importorskip("datasets")
    row = {"question": "Q", "answer": "#### 5"}
    asked = []

    def load_dataset(*positional, split, data_files=None):
        asked.append((positional, split, data_files))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_problems(path) == load_problems(write_rows(tmp_path / "test.jsonl", row))
    assert asked == [(arguments, "test", {"test": path} if path.startswith("hf://") else None)]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="could not load openai/gsm8k from the Hugging Face hub: offline"):
        load_problems("openai/gsm8k")


def test_the_real_benchmark_has_its_1319_problems(shared):
    problems = load_problems(str(shared / "data" / "gsm8k" / "test.jsonl"))
    reference = json.loads((shared / "reference" / "study.json").read_text())
    assert len(problems) == reference["gsm8k_test"]["rows"] == 1319
    assert problems[0].reference_answer == "18"
    assert [problem.index for problem in problems] == list(range(1319))
    assert len({problem.example_id for problem in problems}) == 1319


# --- Prediction records -------------------------------------------------------------------------------------


def test_a_prediction_has_the_fields_of_the_study_and_the_numeric_score_beside_them():
    record = score(PROBLEM, r"It is \boxed{ $\$460$ }", 104, 52, "stop")
    assert record == {
        "example_id": "gsm8k-0003",
        "benchmark_index": 3,
        "question": "How much?",
        "reference_answer": "460",
        "generated_text": r"It is \boxed{ $\$460$ }",
        "extracted_answer": r" $\$460$ ",
        "normalized_prediction": r"\$460",
        "normalized_reference": "460",
        "correct": False,
        "correct_numeric": True,
        "prompt_token_count": 104,
        "generated_token_count": 52,
        "stop_reason": "stop",
    }


def test_no_box_is_wrong_and_has_no_prediction():
    record = score(PROBLEM, "The answer is 460", 104, 512, "length")
    assert record["extracted_answer"] is None
    assert record["normalized_prediction"] is None
    assert record["correct"] is False
    assert record["correct_numeric"] is False


def test_an_empty_box_is_wrong_but_was_extracted():
    record = score(PROBLEM, r"\boxed{}", 104, 3, "stop")
    assert (record["extracted_answer"], record["correct"], record["correct_numeric"]) == ("", False, False)


def test_an_unknown_stop_reason_is_refused():
    with pytest.raises(ValueError, match="stop_reason is 'eos'"):
        score(PROBLEM, "x", 1, 1, "eos")


def test_the_aggregate_adds_up_every_record():
    records = [
        score(PROBLEM, r"\boxed{460}", 10, 1, "stop"),
        score(PROBLEM, r"\boxed{\$460}", 20, 2, "stop"),
        score(PROBLEM, r"\boxed{461}", 30, 3, "stop"),
        score(PROBLEM, "no", 40, 512, "length"),
    ]
    assert aggregate(records) == {
        "total": 4,
        "correct_strict": 1,
        "correct_numeric": 2,
        "accuracy": 0.25,
        "accuracy_numeric": 0.5,
        "extraction_failures": 1,
        "extraction_failure_rate": 0.25,
        "truncated": 1,
        "truncation_rate": 0.25,
        "references_with_separators": 0,
        "wrong_by_separators": 0,
        "prompt_tokens": 100,
        "generated_tokens": 518,
    }
    assert aggregate([])["accuracy"] is None


def test_right_answers_that_are_wrong_for_a_comma_are_counted_and_stay_wrong():
    problem = Problem(0, "gsm8k-0000", "How much?", "2,125")
    answers = [r"\boxed{2125}", r"\boxed{2,125}", r"\boxed{\$2125}", r"\boxed{2126}", "none"]
    totals = aggregate([score(problem, answer, 1, 1, "stop") for answer in answers])
    assert totals["correct_strict"] == 1
    assert totals["correct_numeric"] == 3
    assert totals["references_with_separators"] == 5
    assert totals["wrong_by_separators"] == 2
    assert not needs_separator("1, 2")
    assert not needs_separator("2125")


def test_fourteen_references_of_the_real_benchmark_need_their_comma(shared):
    problems = load_problems(str(shared / "data" / "gsm8k" / "test.jsonl"))
    plain = [problem.reference_answer.replace(",", "") for problem in problems]
    records = [
        score(p, f"\\boxed{{{answer}}}", 1, 1, "stop") for p, answer in zip(problems, plain, strict=True)
    ]
    totals = aggregate(records)
    assert totals["references_with_separators"] == totals["wrong_by_separators"] == 14
    assert totals["correct_strict"] == 1319 - 14
    assert totals["correct_numeric"] == 1319


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\r\n\r\n", "\n  \n\t\n"])
def test_a_byte_order_mark_and_blank_last_lines_are_no_problems(tmp_path, ending):
    content = "\ufeff" + json.dumps({"question": "Q", "answer": "#### 1"}) + ending
    (tmp_path / "test.jsonl").write_text(content, encoding="utf-8", newline="")
    assert [problem.question for problem in load_problems(str(tmp_path / "test.jsonl"))] == ["Q"]
    record = score(PROBLEM, r"\boxed{460}", 1, 1, "stop")
    (tmp_path / "p.jsonl").write_text("\ufeff" + json.dumps(record) + ending, encoding="utf-8", newline="")
    assert rescore(tmp_path / "p.jsonl") == [record]
    (tmp_path / "one.json").write_text("\ufeff{}" + ending, encoding="utf-8", newline="")
    assert read_json(tmp_path / "one.json") == {}


# --- Files of a run -----------------------------------------------------------------------------------------


def test_a_field_that_does_not_apply_is_null_and_extra_fields_follow():
    row = metric_record(run_id="r", step=1, split="train", loss=1.5, tokens_per_second=10.0)
    assert tuple(row)[: len(METRIC_FIELDS)] == METRIC_FIELDS
    assert row["eval_metric"] is None
    assert row["loss"] == 1.5
    assert row["tokens_per_second"] == 10.0
    assert tuple(summary_record(status="completed")) == SUMMARY_FIELDS
    with pytest.raises(ValueError, match="split is 'dev'"):
        metric_record(split="dev")


def test_appended_records_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    for step in range(3):
        append_jsonl(path, {"step": step, "text": "é\n"})
    assert read_jsonl(path) == [{"step": step, "text": "é\n"} for step in range(3)]
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("torn", ['{"step": 2', '{"ste', "{", '{"text": "\udcc3'])
def test_a_torn_last_line_is_dropped_by_readers_and_mended_by_the_next_append(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn.encode("utf-8", "surrogateescape"))
    assert read_jsonl(path) == [{"step": 1}]
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a JSON line"):
        read_jsonl(path, torn_last_line="refuse")
    append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_complete_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}')
    assert read_jsonl(path, torn_last_line="refuse") == [{"step": 1}]
    append_jsonl(path, {"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a JSON line"):
        read_jsonl(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"status": "completed"})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json_atomic(path, {"loss": float("nan")})
    with pytest.raises(ValueError, match="Out of range float"):
        append_jsonl(tmp_path / "metrics.jsonl", {"loss": float("inf")})
    with pytest.raises(UnicodeEncodeError):
        write_json_atomic(path, {"text": "\ud800"})
    assert read_json(path) == {"status": "completed"}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_rewritten_jsonl_replaces_the_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    write_jsonl_atomic(path, [{"step": 5}, {"step": 6}])
    assert read_jsonl(path) == [{"step": 5}, {"step": 6}]


def test_a_missing_or_broken_json_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json is not a JSON file"):
        read_json(tmp_path / "bad.json")
