"""Bad rows, benchmark files, predictions and gate reports are one line that names file and place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.bad_input import TEXTS, VALUES, assert_exit_2, attempt, bad_json, damaged, refused, tries
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.audit import audit
from jaxlora.data.boxes import extract_boxed
from jaxlora.data.build import BuildPlan, build
from jaxlora.data.containers import MAX_LINE_BYTES, parse_object
from jaxlora.data.gates import Benchmark, FilePair, check, require_gates
from jaxlora.data.gsm8k_source import convert
from jaxlora.data.render import load_tokenizer
from jaxlora.data.rows import load_rendered_rows
from jaxlora.evals.answers import numeric_match, strict_match
from jaxlora.evals.gsm8k import aggregate, count, load_problems, rescore
from jaxlora.runtime.files import read_jsonl
from jaxlora.runtime.remote import embedded_path

ROW = {
    "row_id": "a1",
    "source": "gsm8k",
    "expected_answer": "4",
    "messages": [
        {"role": "system", "content": "Be careful."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is \\boxed{4}"},
    ],
}
RAW = {
    "problem": "2 + 2?",
    "generated_solution": "\\boxed{4}",
    "expected_answer": "4",
    "problem_source": "gsm8k",
}
PREDICTION = {
    "example_id": "gsm8k-0000",
    "benchmark_index": 0,
    "question": "What is 2 + 2?",
    "reference_answer": "4",
    "generated_text": "It is \\boxed{4}",
    "prompt_token_count": 10,
    "generated_token_count": 5,
    "stop_reason": "stop",
}
PROBLEM = {"question": "What is 2 + 2?", "answer": "It is 4.\n#### 4"}
ROWS, RAW_ROWS, BENCHMARK = "rendered JSONL row", "raw JSONL row", "benchmark row"
PREDICTIONS, GATES, ANSWERS = "prediction", "gate report", "answer text"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded:base")


def file(folder: Path, *lines: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


class TestRows:
    @tries(100)
    @given(bad_json(ROW))
    def test_a_row_is_used_or_named(self, tokenizer, tmp_path, line):
        path = file(tmp_path, json.dumps(ROW).encode(), line)
        message = attempt(ROWS, load_rendered_rows, path, tokenizer, max_length=500)
        assert message is None or f"{path}:" in message
        rows, report = load_rendered_rows(path, tokenizer, max_length=500, on_bad_row="skip")
        assert len(rows) + len(report.skipped) == report.lines

    @pytest.mark.parametrize(
        "line",
        [
            b'{"messages": ' + b"[" * 2_000_000,
            b'{"messages": ' + b'{"a":' * 990 + b"1" + b"}" * 990 + b"}",
            b'{"messages": 1' + b"0" * 5000 + b"}",
            b'{"messages": 1e999}',
            b'{"messages": NaN}',
            b'"messages"',
            b"\x00" * 1000,
            b" \xef\xbb\xbf" + json.dumps(ROW).encode(),
            json.dumps(ROW | {"messages": [{"role": "user", "content": "\ud800"}]}).encode(),
            json.dumps(ROW | {"messages": [*ROW["messages"]] * 100_000}).encode(),
            json.dumps(ROW | {"messages": [{"role": "user", "content": "word " * 10**6}]}).encode(),
            json.dumps(ROW | {"messages": [{"role": ["user"], "content": "x"}]}).encode(),
            json.dumps(ROW | {"row_id": "a" * 10_000 + "\x1b[2J", "messages": None}).encode(),
        ],
        ids=lambda line: str(line[:40]),
    )
    def test_what_cannot_be_a_row_is_refused(self, tokenizer, tmp_path, line):
        refused(ROWS, load_rendered_rows, file(tmp_path, line), tokenizer, max_length=500)

    def test_depths_around_the_limit_of_the_parser(self, tokenizer, tmp_path):
        for depth in range(100, 1100, 50):
            line = b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"
            refused(ROWS, load_rendered_rows, file(tmp_path, line), tokenizer, max_length=500)

    def test_a_line_without_an_end_is_not_read_into_memory(self, tokenizer, tmp_path):
        path = tmp_path / "rows.jsonl"
        with path.open("wb") as handle:
            handle.truncate(100 * 2**20)  # one "line" of zero bytes
        assert str(MAX_LINE_BYTES) in refused(ROWS, load_rendered_rows, path, tokenizer, max_length=500)

    @tries(50)
    @given(st.lists(bad_json(RAW), min_size=1, max_size=3))
    def test_a_source_is_built_or_refused_and_leaves_nothing_half(self, tmp_path, lines):
        path = file(tmp_path, *[line.replace(b"\n", b" ") for line in lines], json.dumps(RAW).encode())
        out = tmp_path / "out"
        line = attempt(RAW_ROWS, build, BuildPlan(str(path), None, out, overwrite=True))
        if line is None:
            rows = [json.loads(row) for row in (out / "rendered/train.jsonl").read_text("utf-8").splitlines()]
            assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
        assert not [place for place in tmp_path.iterdir() if place.name.startswith(".")]

    @tries(50)
    @given(bad_json(ROW))
    def test_the_gates_and_the_audit_name_a_bad_row(self, tokenizer, tmp_path, line):
        path = file(tmp_path, line)
        other = tmp_path / "val.jsonl"
        other.write_text(json.dumps(ROW) + "\n")
        attempt(ROWS, check, [FilePair(str(path), str(other))], Benchmark("b", [("1", "What?")]))
        files = {"train": str(path), "val": str(other)}
        attempt(ROWS, audit, files, tokenizer, "t", tmp_path / "audit", 0, 10, overwrite=True)

    @tries(100)
    @given(damaged(embedded_path("data/val.jsonl").read_bytes()[:3000]))
    def test_damaged_files(self, tokenizer, tmp_path, content):
        (tmp_path / "rows.jsonl").write_bytes(content)
        attempt(ROWS, load_rendered_rows, tmp_path / "rows.jsonl", tokenizer, max_length=500)

    @pytest.mark.parametrize(
        "name",
        [".", "/dev/zero", "/dev/stdin", "no/such", "a\0b", "x" * 300, "hf://", "hf://a/b", "embedded:../x"],
    )
    def test_places_that_are_no_files(self, tokenizer, name):
        refused(ROWS, load_rendered_rows, name, tokenizer, max_length=500)

    @tries(100)
    @given(st.binary(max_size=300))
    def test_bytes_with_the_name_of_a_parquet_file(self, tmp_path, content):
        path = tmp_path / "rows.parquet"
        path.write_bytes(b"PAR1" + content + b"PAR1")
        refused(RAW_ROWS, build, BuildPlan(str(path), None, tmp_path / "out"))

    @tries(100)
    @given(VALUES)
    def test_a_parsed_line_is_an_object(self, value):
        try:
            found = parse_object(json.dumps(value).encode())
        except ValueError:
            return
        assert isinstance(found, dict)


class TestBenchmarks:
    @tries(200)
    @given(bad_json(PROBLEM))
    def test_a_problem_is_used_or_named(self, tmp_path, line):
        path = file(tmp_path, line)

        def use() -> None:
            for problem in load_problems(str(path)):
                assert problem.question.strip()
                assert problem.reference_answer
                problem.question.encode()

        message = attempt(BENCHMARK, use)
        assert message is None or str(path) in message

    @tries(100)
    @given(st.dictionaries(st.sampled_from(["question", "answer"]), st.one_of(TEXTS, VALUES)))
    def test_a_source_row_is_converted_or_refused(self, row):
        try:
            found = convert(row)
        except ValueError:
            return
        assert "\\boxed{" in found["generated_solution"]


class TestPredictions:
    @tries(250)
    @given(bad_json(PREDICTION))
    def test_a_record_is_scored_or_named(self, tmp_path, line):
        path = file(tmp_path, line)

        def use() -> None:
            records = rescore(path)
            assert count(records)["total"] == len(records)
            if set(PREDICTION) <= set(records[0]):
                assert aggregate(records)["prompt_tokens"] >= 0

        message = attempt(PREDICTIONS, use)
        assert message is None or str(path) in message

    @pytest.mark.parametrize(
        "content", [b"", b"\n\n", b"[" * 100_000, b'{"a":' * 990, b"\xff\n", b"null\n", b"{}\n"]
    )
    def test_the_tool_ends_with_one_line_and_code_2(self, repository, tmp_path, capsys, content):
        path = tmp_path / "predictions.jsonl"
        path.write_bytes(content)
        assert_exit_2(PREDICTIONS, repository / "tools/rescore.py", [str(path)], capsys)

    @pytest.mark.parametrize("place", [".", "/dev/zero", "no/such.jsonl", "x" * 300])
    def test_the_tool_refuses_what_is_no_file(self, repository, capsys, place):
        assert_exit_2(PREDICTIONS, repository / "tools/rescore.py", [place], capsys)

    def test_a_file_of_a_terabyte_is_not_read(self, tmp_path):
        with (tmp_path / "predictions.jsonl").open("wb") as handle:
            handle.truncate(10**12)
        refused(PREDICTIONS, read_jsonl, tmp_path / "predictions.jsonl")

    @tries(250)
    @given(st.one_of(TEXTS, st.text(r"\boxed{}$0123456789,.eE+-/% frac text", max_size=60)), TEXTS)
    def test_any_text_gets_a_score(self, text, reference):
        def use() -> None:
            answer = extract_boxed(text)
            if answer is not None and strict_match(answer, reference):
                assert numeric_match(answer, reference)
            numeric_match(text, reference)

        assert attempt(ANSWERS, use) is None

    @pytest.mark.parametrize(
        "text",
        [
            "9" * 1_000_000,
            "1e" + "9" * 100_000,
            "\\boxed{" * 200_000,
            "{" * 10**6,
            "\\text{" * 10**5,
            "1," * 10**5,
            " " * 10**6,
        ],
        ids=lambda text: text[:8],
    )
    def test_long_text_takes_little_time(self, text):
        def use() -> None:
            extract_boxed(text)
            strict_match(text, text)
            numeric_match(text, "4")

        assert attempt(ANSWERS, use) is None


class TestGateReports:
    @pytest.fixture(scope="class")
    def dataset(self, tmp_path_factory) -> tuple[Path, Path, dict]:
        folder = tmp_path_factory.mktemp("data")
        for name, question in (("train", "One?"), ("val", "Two?")):
            row = ROW | {
                "row_id": name,
                "messages": [{"role": "user", "content": question}, ROW["messages"][-1]],
            }
            (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        train, validation = folder / "train.jsonl", folder / "val.jsonl"
        report = check([FilePair(str(train), str(validation))], Benchmark("b", [("1", "Three?")]))
        return train, validation, report

    def test_the_report_that_is_changed_below_passes(self, dataset, tmp_path):
        train, validation, report = dataset
        (tmp_path / "gates.json").write_text(json.dumps(report))
        assert require_gates(str(train), str(validation), str(tmp_path / "gates.json"), False).passed

    @tries(200)
    @given(data=st.data())
    def test_a_report_passes_only_if_it_still_says_so(self, dataset, tmp_path, data):
        train, validation, report = dataset
        content = data.draw(bad_json(report))
        (tmp_path / "gates.json").write_bytes(content)
        line = attempt(GATES, require_gates, str(train), str(validation), str(tmp_path / "gates.json"), False)
        if line is None:
            gates = json.loads(content)["gates"]
            passed = {
                gate["name"] for gate in gates if gate.get("passed") is True and gate.get("overlaps") == 0
            }
            assert {"benchmark_overlap", "shared_row_id", "shared_problem"} <= passed

    @pytest.mark.parametrize(
        "content",
        [b"[" * 100_000, b'{"gates": 7, "files": {}}', b"", b"null", b'{"gates": [null], "files": []}'],
    )
    def test_what_is_no_report_is_no_pass(self, dataset, tmp_path, content):
        train, validation, _ = dataset
        (tmp_path / "gates.json").write_bytes(content)
        refused(GATES, require_gates, str(train), str(validation), str(tmp_path / "gates.json"), False)
