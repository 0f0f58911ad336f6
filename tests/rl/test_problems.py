"""Problems of every schema are read with the right reference, and no row is left out in silence."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.bad_input import attempt, tries
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.render import SYSTEM_PROMPT
from jaxlora.evals import gsm8k
from jaxlora.rl import grading
from jaxlora.rl.problems import Problem, load_problems, read_problems
from jaxlora.rl.rewards import grader_named
from jaxlora.runtime.errors import UserError

MATH = {
    "problem": "What is $\\frac{1}{2}+\\frac{1}{4}$?",
    "level": "Level ?",
    "type": "Prealgebra",
    "solution": "First \\boxed{1}, no: \\boxed{\\frac{3}{4}}.",
}
DEEPMATH = {
    "question": "Find the limit.",
    "final_answer": "\\infty",
    "difficulty": 5.0,
    "topic": "Mathematics -> Calculus",
    "r1_solution_1": "It is \\boxed{0}.",
}
GSM8K = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5 apples.\n#### 1,005"}


def write(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (MATH, MATH["problem"], "\\frac{3}{4}"),
        (MATH | {"answer": "other"}, MATH["problem"], "\\frac{3}{4}"),
        (MATH | {"solution": "no box", "answer": "3/4"}, MATH["problem"], "3/4"),
        (DEEPMATH, DEEPMATH["question"], "\\infty"),
        (GSM8K, GSM8K["question"], "1,005"),
        ({"question": "q", "answer": "42"}, "q", "42"),
        ({"question": "q", "answer": 42}, "q", "42"),
        ({"question": "q", "answer": 4.5}, "q", "4.5"),
        ({"question": "q", "answer": "Thus \\boxed{7}."}, "q", "7"),
        ({"problem": "q", "expected_answer": "8", "generated_solution": "\\boxed{9}"}, "q", "8"),
        ({"prompt": "q", "solution": "$\\boxed{x^{2}}$"}, "q", "x^{2}"),
        ({"prompt": [{"role": "user", "content": "q"}], "answer": "3"}, "q", "3"),
        ({"messages": [{"role": "user", "content": "q"}], "answer": "3"}, "q", "3"),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "\\boxed{1} \\boxed{2}"},
                ]
            },
            "q",
            "2",
        ),
    ],
)
def test_a_row_of_each_schema(tmp_path, row, question, answer):
    (problem,) = load_problems(write(tmp_path, [row]))
    assert problem == Problem("rows-1", [{"role": "user", "content": question}], answer, row)


def test_the_embedded_rows_are_the_training_rows_without_their_answers():
    problems = load_problems("embedded:data/train.jsonl")
    assert len(problems) == 1200
    assert len({one.id for one in problems}) == 1200
    assert all([turn["role"] for turn in one.messages] == ["system", "user"] for one in problems)
    assert {one.messages[0]["content"] for one in problems} == {SYSTEM_PROMPT}
    with grader_named("gsm8k_strict") as grader:
        own = [(one, one.raw["messages"][-1]["content"], False) for one in problems]
        assert all(one.correct for one in grader.grade(own))


def test_the_embedded_benchmark_is_what_evaluation_reads():
    problems = load_problems("embedded:data/test.jsonl", system=SYSTEM_PROMPT)
    expected = gsm8k.load_problems("embedded:data/test.jsonl")
    assert [one.answer for one in problems] == [one.reference_answer for one in expected]
    assert [one.messages[1]["content"] for one in problems] == [one.question for one in expected]


def test_real_gsm8k_rows_are_what_evaluation_reads(shared):
    file = str(shared / "data" / "gsm8k" / "test.jsonl")
    problems, report = read_problems(file)
    assert report.skipped == {}
    assert [one.answer for one in problems] == [one.reference_answer for one in gsm8k.load_problems(file)]


def test_system_suffix_and_limit(tmp_path):
    row = {
        "messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "q"}],
        "answer": "3",
    }
    file = write(tmp_path, [row, row, row])
    asked = {"role": "user", "content": "q!"}
    for system, expected in ((None, "Own."), ("Other.", "Other."), ("", None)):
        (problem,) = load_problems(file, 1, system=system, suffix="!")
        first = [{"role": "system", "content": expected}] if expected else []
        assert problem.messages == [*first, asked]


def test_every_container_gives_the_same_problems(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(3)]
    plain = write(tmp_path, rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with (tmp_path / "rows.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = [(one.messages, one.answer) for one in load_problems(plain)]
    for name in ("rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"):
        assert [(one.messages, one.answer) for one in load_problems(str(tmp_path / name))] == expected, name


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path, capsys):
    bad = [
        {"problem": "q", "solution": "no box"},
        {"problem": "q", "solution": "no closed \\boxed{box"},
        {"question": "q", "answer": "work ####  "},
        {"question": "q"},
        {"question": "q", "answer": ""},
        {"question": "q", "answer": None},
        {"question": "q", "answer": True},
        {"question": "q", "answer": {"value": 3}},
        {"question": " ", "answer": "3"},
        {"answer": "3"},
        {"question": 5, "answer": "3"},
        {"messages": [{"role": "assistant", "content": "\\boxed{3}"}]},
        {"messages": [{"role": "tool", "content": "3"}], "answer": "3"},
        {"messages": ["q"], "answer": "3"},
        {"messages": [{"role": "user", "content": ["q"]}], "answer": "3"},
    ]
    file = tmp_path / "rows.jsonl"
    lines = [*map(json.dumps, [*bad, {"question": "q", "answer": "3"}]), "[1]", "{broken"]
    lines.append('{"question": "q", "answer": "\\ud800"}')
    file.write_text("\n".join(lines) + "\n")
    problems, report = read_problems(str(file))
    assert [one.id for one in problems] == ["rows-16"]
    assert report.rows == len(lines)
    assert report.used + sum(report.skipped.values()) == report.rows
    assert report.skipped == {
        "no answer": 3,
        "no box in the solution": 2,
        "the answer is bool, neither text nor a number": 1,
        "the answer is dict, neither text nor a number": 1,
        "no value after ####": 1,
        "no messages, problem, question or prompt": 2,
        "the question, or a message of the prompt, is not text": 2,
        "the prompt does not end with a question of the user": 1,
        "a message of the prompt has none of the roles system, user, assistant": 2,
        "not a JSON object": 2,
        "the answer holds half a surrogate pair": 1,
    }
    load_problems(str(file))
    shown = " ".join(capsys.readouterr().err.split())
    assert "1 problems; skipped 18 rows: no answer (3)" in shown


def test_ids_are_the_rows_own_and_never_twice(tmp_path):
    rows = [{"question": "q", "answer": "1", "id": name} for name in ("a", "b", "a", 7)]
    problems = load_problems(write(tmp_path, [*rows, {"question": "q", "answer": "1"}]))
    assert [one.id for one in problems] == ["a", "b", "rows-3", "7", "rows-5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no problems; it is empty"),
        ("\n\n", "holds no problems; it is empty"),
        ("[]", "holds no problems; it is empty"),
        ('{"question": "q"}\n', r"0 problems; skipped 1 row: no answer \(1\); give rows with a question"),
        ('{"text": "q"}\n', "0 problems; skipped 1 row: no messages"),
        ("\x1f\x8b not gzip", "cannot be read"),
    ],
)
def test_a_file_without_problems_is_one_line(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message) as caught:
        load_problems(str(tmp_path / "rows.jsonl"))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_impossible_limit_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="limit of problems is 0"):
        load_problems("embedded:data/train.jsonl", 0)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("chain_sum?size=0", "size must be a whole number from 1"),
        ("chain_sum?seed=x", "seed must be a whole number from 0"),
        ("chain_sum?size", "write its options as"),
    ],
)
def test_an_impossible_option_of_a_generator_is_one_line(query, message):
    with pytest.raises(UserError, match=message):
        load_problems(f"reasoning_gym:{query}")


def test_without_reasoning_gym_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    grading.dataset.cache_clear()
    with pytest.raises(UserError, match=r"reasoning_gym:chain_sum: needs .*; pip install 'jaxlora\[rl\]'"):
        load_problems("reasoning_gym:chain_sum")


def test_generated_problems_are_a_function_of_the_options():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    first = load_problems("reasoning_gym:chain_sum?size=4&seed=1&max_terms=2", system="S", suffix=" Box it.")
    assert (
        load_problems("reasoning_gym:chain_sum?max_terms=2&seed=1&size=4", system="S", suffix=" Box it.")
        == first
    )
    assert load_problems("reasoning_gym:chain_sum?size=4&seed=2&max_terms=2") != first
    assert len(first) == 4
    assert first[0].messages[0] == {"role": "system", "content": "S"}
    assert first[0].messages[1]["content"].endswith(" Box it.")
    assert [one.id for one in first] == [f"chain_sum-{i}" for i in range(4)]
    assert first == [Problem(p.id, p.messages, p.answer, json.loads(json.dumps(p.raw))) for p in first]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("chain_sums", "has no task 'chain_sums'; do you mean"),
        ("chain_sum?nothing=3", "task chain_sum cannot be created: got an unexpected keyword"),
        ("chain_sum?min_terms=9&max_terms=2", "task chain_sum cannot be created"),
        ("chain_sum?min_terms=x", "task chain_sum cannot be created"),
    ],
)
def test_a_task_that_is_not_there_is_one_line(task, message):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    with pytest.raises(UserError, match=message) as caught:
        load_problems(f"reasoning_gym:{task}")
    assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\\boxed{1}", "####", "user", "assistant", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "value"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    "id",
    "messages",
    "problem",
    "question",
    "prompt",
    "answer",
    "solution",
    "final_answer",
    "task",
    "entry",
    "index",
    "options",
)


@tries(60)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6) | VALUES, max_size=4))
def test_whatever_rows_hold_they_are_problems_or_counted(tmp_path_factory, rows):
    file = tmp_path_factory.getbasetemp() / "odd-problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = attempt("problems", read_problems, str(file))
    if refused is None:
        problems, report = read_problems(str(file))
        assert report.used + sum(report.skipped.values()) == report.rows == len(rows)
        for problem in problems:
            assert problem.answer or "task" in problem.raw
            assert problem.messages[-1]["role"] == "user"
            json.dumps([problem.messages, problem.answer], ensure_ascii=False).encode()


@tries(60)
@given(st.text(max_size=40))
def test_whatever_a_generator_is_called_it_is_a_problem_source_or_one_line(name):
    assert attempt("problem source", read_problems, f"reasoning_gym:{name}?size=1") is not None
