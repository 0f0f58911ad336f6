"""Answers to any questions are read and compared as the rule says."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxlora.config import from_dict
from jaxlora.evals.gsm8k import Problem, load_questions, rescore, score
from jaxlora.evals.rules import rule_named
from jaxlora.runtime.errors import UserError


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("boxed", r"so \boxed{3} or \boxed{4}", "4"),
        ("boxed", "no box", None),
        ("last_number", "3 + 4 = 7.", "7"),
        ("last_number", "it costs $1,234.50 in all", "1,234.50"),
        ("last_number", "from 10-5", "5"),
        ("last_number", "it fell to -5 degrees", "-5"),
        ("last_number", "about 3/4 of it", "3/4"),
        ("last_number", "half: .5", ".5"),
        ("last_number", "none at all", None),
        ("exact", "  Paris \n", "Paris"),
        ("exact", " \n", None),
        (r"regex:Answer: (\w+)", "Answer: a\nAnswer: b", "b"),
        (r"regex:[A-D]\b", "B, no, C", "C"),
        (r"regex:^(\d+)$", "text\n12\n", "12"),
        (r"regex:Answer: (\w+)", "none", None),
        (r"regex:\d*", "It is 12.", "12"),
        (r"regex:is (\d+)|(\w+)$", "It is 12 yes", "12"),
    ],
)
def test_what_is_found(name, text, found):
    assert rule_named(name).found(text) == found


def test_a_pattern_that_never_ends_finds_nothing_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr("jaxlora.evals.rules.SECONDS", 0.2)
    assert rule_named(r"regex:^(a|a)+$").found("a" * 60 + "b") is None
    assert "regex:^(a|a)+$ took more than 0.2 s" in capsys.readouterr().err
    assert rule_named(r"regex:^(a|a)+$").found("aaa") == "a"


@pytest.mark.parametrize(
    ("name", "given", "right", "expected"),
    [
        ("boxed", "7.0", "7", True),
        ("boxed", "1,000", "1000", False),
        ("last_number", "1,000", "1000", True),
        ("last_number", "3/4", "0.75", True),
        ("last_number", "3", "4", False),
        ("exact", "New  York", "New York", True),
        ("exact", "new york", "New York", False),
        ("exact", "7.0", "7", False),
        ("regex:x", "B", "B", True),
    ],
)
def test_what_is_right(name, given, right, expected):
    assert rule_named(name).right(given, right) is expected


def test_a_record_keeps_its_rule_and_is_scored_again_by_it(tmp_path):
    rule = rule_named("last_number")
    record = score(Problem(0, "quiz-0000", "3 + 4?", "7"), "it is 7 apples", 5, 4, "stop", rule)
    assert (record["extracted_answer"], record["correct"], record["rule"]) == ("7", True, "last_number")
    (tmp_path / "predictions.jsonl").write_text(json.dumps(record | {"correct": False}) + "\n")
    assert rescore(tmp_path / "predictions.jsonl") == [record]


class TestFiles:
    ROWS = ({"task": "3 + 4?", "target": "3 + 4 = 7"}, {"task": "2 + 2?", "target": 4})

    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
    def test_any_container_with_columns_by_name(self, tmp_path, kind):
        file = tmp_path / f"quiz.{kind}"
        texts = [row | {"target": str(row["target"])} for row in self.ROWS]
        if kind == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in self.ROWS))
        elif kind == "json":
            file.write_text(json.dumps(self.ROWS))
        elif kind == "csv":
            file.write_text("task,target\n" + "".join(f"{row['task']},{row['target']}\n" for row in texts))
        else:
            pyarrow.parquet.write_table(pa.Table.from_pylist(texts), file)
        columns = {"question": "task", "answer": "target"}
        problems = load_questions(str(file), rule_named("last_number"), columns)
        assert [(p.example_id, p.question, p.reference_answer) for p in problems] == [
            ("quiz-0000", "3 + 4?", "7"),
            ("quiz-0001", "2 + 2?", "4"),
        ]
        assert load_questions(str(file), rule_named("exact"), columns, 1)[0].reference_answer == "3 + 4 = 7"

    def test_usual_names_need_no_columns_and_gsm8ks_mark_is_known(self, tmp_path):
        file = tmp_path / "quiz.jsonl"
        file.write_text(json.dumps({"prompt": "3 + 4?", "completion": "3 + 4 = 7 of 9\n#### 7"}) + "\n")
        assert load_questions(str(file), rule_named("last_number"), {})[0].reference_answer == "7"
        assert load_questions(str(file), rule_named("boxed"), {})[0].reference_answer == "7"

    @pytest.mark.parametrize(
        ("rows", "columns", "message"),
        [
            (
                [{"a": "x", "b": "y"}],
                {},
                "quiz.jsonl:1: no column for the question; it has 'a', 'b'; name it",
            ),
            (
                [{"question": "x"}],
                {},
                "no column for the answer; it has 'question'; name it: --columns answer=",
            ),
            (
                [{"question": "x", "answer": "y"}],
                {"answer": "z"},
                "no column 'z'; it has 'question', 'answer'",
            ),
            ([{"question": "x", "answer": [1]}], {}, "the column 'answer' is empty or not text"),
            ([{"question": " ", "answer": "y"}], {}, "the column 'question' is empty or not text"),
            ([], {}, "holds no questions"),
        ],
    )
    def test_what_cannot_be_used_is_one_line(self, tmp_path, rows, columns, message):
        file = tmp_path / "quiz.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError) as error:
            load_questions(str(file), rule_named("exact"), columns)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"columns": ["question=a"]}, "config.eval.columns: needs eval.rule"),
        ({"columns": ["task=a"], "rule": "exact"}, "config.eval.columns: 'task=a' is not a pair"),
        ({"columns": ["answer="], "rule": "exact"}, "config.eval.columns: 'answer=' is not a pair"),
        ({"system": "\x1b[31m"}, "config.eval.system: '\\x1b[31m' is not allowed"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(values, message):
    with pytest.raises(UserError) as error:
        from_dict({"eval": values})
    assert message in str(error.value)
    assert from_dict({"eval": {"system": "line 1\nline 2"}}).eval.system == "line 1\nline 2"


@pytest.mark.parametrize("name", ["box", "regex:(", "regex", "regex:"])
def test_a_rule_that_is_none_is_one_line(name):
    with pytest.raises(UserError, match=r"config\.eval\.rule: "):
        rule_named(name)
