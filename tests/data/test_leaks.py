"""Benchmark questions are found in training rows whatever stands around them, and nothing else is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest

from jaxlora.data.gates import Benchmark, FilePair, check, require_gates
from jaxlora.data.leaks import QuestionIndex
from jaxlora.evals.gsm8k import load_problems
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import write_json_atomic

QUESTION = (
    "Anna\u2019s well-known farm has 1,200 hens. Each hen lays 2.5 eggs a week, and Anna sells an egg"
    " for $0.30. How many dollars does Anna earn in a week?"
)
SHORT = "What is 2 + 3?"
FORMULA = "What is the sum of all the roots of $x^2 - 5x + 6 = 0$?"
CHINESE = "小明有十二个苹果，他每天吃三个苹果，又从市场买回五个苹果，请问四天以后他一共还剩下多少个苹果？"
BENCHMARK = Benchmark("b", [("q", QUESTION), ("short", SHORT), ("formula", FORMULA), ("zh", CHINESE)])


def chat(*turns: tuple[str, object], **fields: object) -> dict:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"row_id": "r", "messages": messages} | fields


def asked(text: str) -> dict:
    return chat(("user", text), ("assistant", "\\boxed{900}"))


def leaks(folder, *rows: dict) -> list[tuple[str, str]]:
    """`(example id, rule)` of every leak that the gate reports for these training rows."""
    return [
        hit
        for leak in gate(folder, *rows)["overlapping"]
        for hit in zip(leak["example_ids"], leak["rules"], strict=True)
    ]


def gate(folder, *rows: dict) -> dict:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "val.jsonl").write_text(json.dumps(asked("What is 1+1?") | {"row_id": "held out"}) + "\n")
    report = check([FilePair(str(folder / "train.jsonl"), str(folder / "val.jsonl"))], BENCHMARK)
    assert report["gates"][0]["passed"] is (not report["gates"][0]["overlapping"])
    return report["gates"][0]


class TestWhereAQuestionHides:
    @pytest.mark.parametrize(
        ("row", "rule"),
        [
            (asked(QUESTION), "equal"),
            (
                chat(("user", "Hi"), ("assistant", "Hi."), ("user", QUESTION), ("assistant", "9")),
                "same_words",
            ),
            (asked(f"Solve this problem.\n\n{QUESTION}"), "contained"),
            (asked(f"{QUESTION} Think step by step."), "contained"),
            (chat(("system", QUESTION), ("user", "Go."), ("assistant", "9")), "same_words"),
            (chat(("system", f"Example: {QUESTION}"), ("user", "Go."), ("assistant", "9")), "contained"),
            (chat(("user", "Write a problem."), ("assistant", f"Here: {QUESTION}")), "contained"),
            (
                chat(
                    ("user", QUESTION[:74]),
                    ("assistant", "Go on."),
                    ("user", QUESTION[74:]),
                    ("assistant", "9"),
                ),
                "equal",
            ),
            (
                chat(("user", "Go."), ("assistant", "Calling."), tools=[{"description": QUESTION}]),
                "same_words",
            ),
        ],
        ids=[
            "alone",
            "second turn",
            "after",
            "before",
            "system",
            "in system",
            "answer",
            "over two turns",
            "tools",
        ],
    )
    def test_every_turn_is_searched(self, tmp_path, row, rule):
        assert leaks(tmp_path, row) == [("q", rule)]

    def test_parts_and_calls_of_tools_are_searched(self, tmp_path):
        parts = chat(("user", "Go."), ("assistant", [{"type": "text", "text": f"So: {QUESTION}"}]))
        call = chat(("user", "Go."), ("assistant", "Calling."))
        call["messages"][1]["tool_calls"] = [{"function": {"name": "ask", "arguments": {"text": QUESTION}}}]
        assert leaks(tmp_path, parts, call) == [("q", "contained"), ("q", "same_words")]

    def test_the_solution_of_a_raw_row_is_searched(self, tmp_path):
        row = {
            "row_id": "r",
            "source": "s",
            "problem": "Make one.",
            "generated_solution": f"Here: {QUESTION}",
        }
        assert leaks(tmp_path, row) == [("q", "contained")]


class TestOtherPunctuation:
    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text.replace("\u2019", "'"),
            lambda text: text.replace(".", "!").replace(",", ""),
            lambda text: re.sub(r"[^\w\s]", "", text),
            lambda text: re.sub(r"[^\w\s]", " ", text),
            lambda text: text.replace(" ", " \n\t ").replace(".", ";"),
            lambda text: text.replace("well-known", "well known").replace("$", "\\$"),
            lambda text: text.replace("-", "\u2011").replace("1,200", "1{,}200"),
            lambda text: f"**{text.upper()}**",
            lambda text: text.replace("hens", "he\u200bns\u00ad"),
        ],
        ids=["quote", "marks", "deleted", "spaced", "white", "hyphen", "dash", "emphasis", "invisible"],
    )
    def test_does_not_hide_a_question(self, tmp_path, change):
        assert change(QUESTION) != QUESTION
        found = leaks(tmp_path, asked(change(QUESTION)), asked(f"Solve:\n{change(QUESTION)}\nThanks"))
        assert [example for example, _ in found] == ["q", "q"]
        assert found[1][1] == "contained"

    def test_does_not_hide_a_short_question(self, tmp_path):
        assert leaks(tmp_path, asked("what is 2+3")) == [("short", "same_words")]

    def test_nor_one_of_a_script_without_spaces(self, tmp_path):
        assert leaks(tmp_path, asked(f"请解答：{CHINESE.replace('，', ' ')}谢谢")) == [("zh", "contained")]


class TestNoFalseHits:
    @pytest.mark.parametrize(
        "text",
        [
            f"{SHORT} And why?",
            "What is 2 - 3?",
            "What is 2.3?",
            "What is 23?",
            FORMULA.replace("- 5x", "+ 5x"),
            FORMULA.replace("=", "<"),
            QUESTION.replace("1,200", "1,300"),
            QUESTION.replace("dollars", "euros"),
            QUESTION[: len(QUESTION) // 2],
            "...",
            "",
        ],
    )
    def test_near_misses_pass(self, tmp_path, text):
        assert leaks(tmp_path, asked(text or " ")) == []

    def test_a_formula_is_found_in_other_words_and_spacing(self, tmp_path):
        text = FORMULA.replace("x^2 - 5x + 6 = 0", "x^2-5x+6=0")
        assert leaks(tmp_path, asked(text), asked(f"Please: {text}")) == [
            ("formula", "same_words"),
            ("formula", "contained"),
        ]

    def test_a_question_without_words_is_found_only_as_it_is(self):
        index = QuestionIndex([("marks", "?!"), ("number", "12 + 30")])
        assert index.find(["?!"], "?!") == [("marks", "equal")]
        assert index.find(["...", "12+30."], "...") == [("number", "same_words")]
        assert index.find(["", "112 + 30"], "") == []

    def test_questions_too_short_to_be_searched_for_are_counted(self):
        assert QuestionIndex(BENCHMARK.questions).short_questions == 1


class TestReport:
    def test_says_which_rule_hit_and_keeps_the_count_of_the_study(self, tmp_path):
        rows = [
            asked(QUESTION),
            asked(f"Solve: {QUESTION}"),
            asked(QUESTION.replace(".", "!")),
            asked("Fine?"),
        ]
        found = gate(tmp_path, *(row | {"source": "gsm8k", "row_id": str(i)} for i, row in enumerate(rows)))
        assert found["overlaps"] == 3
        assert found["overlaps_by_rule"] == {"equal": 1, "same_words": 1, "contained": 1}
        assert found["overlaps_with_source_gsm8k"] == 1
        assert all(rule in found["rule"] for rule in found["overlaps_by_rule"])

    def test_a_report_made_by_weaker_rules_is_no_pass(self, tmp_path):
        gate(tmp_path, asked("Fine?"))
        pair = FilePair(str(tmp_path / "train.jsonl"), str(tmp_path / "val.jsonl"))
        report = check([pair], BENCHMARK)
        write_json_atomic(tmp_path / "contamination.json", report)
        assert require_gates(pair.train, pair.validation, None, False).passed
        report["gates"][0]["rule"] = "no benchmark question equals the problem of a training row"
        write_json_atomic(tmp_path / "contamination.json", report)
        with pytest.raises(
            UserError, match=r"benchmark_overlap: .* a version with another rule; .*check_dataset.py again"
        ):
            require_gates(pair.train, pair.validation, None, False)

    @pytest.mark.parametrize("field", ["row_id", "source", "answer"])
    def test_half_a_surrogate_pair_anywhere_is_named(self, tmp_path, field):
        row = asked("Fine?") | {"source": "s"}
        if field == "answer":
            row["messages"][1]["content"] = "\ud800"
        else:
            row[field] = "\ud800"
        with pytest.raises(UserError, match=r"train.jsonl:1: .*surrogate"):
            gate(tmp_path, row)

    def test_deep_nesting_is_searched_or_refused(self, tmp_path):
        row = asked("Fine?")
        row["tools"] = "DEEP"
        deep = json.dumps(row).replace('"DEEP"', "[" * 900 + json.dumps(QUESTION) + "]" * 900)
        (tmp_path / "train.jsonl").write_text(deep + "\n")
        (tmp_path / "val.jsonl").write_text(json.dumps(asked("Fine?")) + "\n")
        report = check([FilePair(str(tmp_path / "train.jsonl"), str(tmp_path / "val.jsonl"))], BENCHMARK)
        assert report["gates"][0]["overlaps"] == 1


class TestRealBenchmark:
    @pytest.fixture(scope="class")
    def questions(self, shared):
        problems = load_problems(str(shared / "data/gsm8k/test.jsonl"))
        return [(problem.example_id, problem.question) for problem in problems]

    @pytest.mark.parametrize(
        ("name", "rule"),
        [
            ("leak_exact", "is gsm8k-0000"),
            ("leak_second_turn", "has the words of gsm8k-0000"),
            ("leak_with_instruction", "contains gsm8k-0000"),
        ],
    )
    def test_the_cases_fail_the_gate_and_say_how(self, shared, repository, tmp_path, name, rule):
        rows = shared / "cases/rows"
        command = [sys.executable, repository / "tools/check_dataset.py", "--train", rows / f"{name}.jsonl"]
        command += ["--validation", rows / "val1.jsonl", "--benchmark", shared / "data/gsm8k/test.jsonl"]
        command += ["--report", tmp_path / "report.json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
        assert done.returncode == 1
        assert "FAILED  benchmark_overlap" in done.stderr
        assert rule in done.stderr

    def test_every_question_is_found_in_other_punctuation_and_with_words_around_it(self, questions):
        index = QuestionIndex(questions)
        assert index.short_questions == 0
        for example_id, question in questions:
            for form in (question.upper(), question.replace(".", ";"), question.replace("'", "\u2019")):
                text = f"Solve this problem.\n\n{form}\n\nThink step by step."
                assert (example_id, "contained") in index.find([text], text), form

    def test_a_lookup_takes_microseconds(self, shared, questions):
        lines = (shared / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        index = QuestionIndex(questions)
        start = time.process_time()
        assert not any(index.find([row["question"], row["answer"]], row["question"]) for row in rows)
        # 20 to 35 microseconds a row on one core; comparing with each question would take milliseconds.
        assert (time.process_time() - start) / len(rows) < 300e-6

    def test_a_long_row_with_the_words_of_every_question_takes_little_time(self, questions):
        index = QuestionIndex(questions)
        words = sorted({word for _, question in questions for word in question.split()})
        text = " ".join(words * 20)
        start = time.process_time()
        assert index.find([text], text) == []
        assert time.process_time() - start < 20


class TestEveryFormat:
    @pytest.mark.parametrize(
        "row",
        [
            {"instruction": "Solve.", "input": QUESTION, "output": "9"},
            {"prompt": QUESTION, "completion": "9"},
            {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "9"}]},
            {"text": f"Q: {QUESTION} A: 9"},
        ],
        ids=["alpaca", "prompt", "sharegpt", "text"],
    )
    def test_that_can_be_trained_on_is_searched(self, tmp_path, row):
        assert [example for example, _ in leaks(tmp_path, row)] == ["q"]

    @pytest.mark.parametrize(
        "name", ["bom.jsonl", "blank_last.jsonl", "plain.parquet", "list.json", "plain.jsonl.gz"]
    )
    def test_and_so_is_every_container(self, shared, tmp_path, name):
        rows = shared / "cases/rows"
        first = json.loads((rows / "plain.jsonl").read_text().splitlines()[0])
        question = next(turn["content"] for turn in first["messages"] if turn["role"] == "user")
        pair = FilePair(str(rows / name), str(rows / "val1.jsonl"))
        found = check([pair], Benchmark("b", [("it", question)]))["gates"][0]
        assert found["overlaps"] >= 1
        assert found["overlapping"][0]["line"] == 1
