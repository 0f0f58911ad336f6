"""Problems of arithmetic: right answers, each problem in one split, what is refused; the reward for them."""

from __future__ import annotations

import pytest

from jaxlora.rl.problems import load_problems
from jaxlora.rl.rewards import grader_named
from jaxlora.runtime.errors import UserError


@pytest.fixture(scope="module")
def splits():
    return {split: load_problems(f"arithmetic:{split}?digits=2,1") for split in ("train", "test")}


def test_answers_are_right_and_every_problem_is_in_one_split(splits):
    ids = [problem.id for own in splits.values() for problem in own]
    assert len(ids) == len(set(ids)) == 2 * 90 * 9 - 2  # all but the two that are shown
    assert 0.2 < len(splits["test"]) / len(ids) < 0.3
    for own in splits.values():
        assert all(eval(problem.id) == int(problem.answer) >= 0 for problem in own)


def test_the_solved_problems_are_right_and_in_no_split(splits):
    problem = splits["train"][0]
    turns = [turn["content"] for turn in problem.messages]
    assert turns[-1] == f"What is {problem.id}?"
    for asked, solved in ((0, 1), (2, 3)):
        expression, value = solved_parts = turns[solved].rstrip(".").split(" = ")
        assert turns[asked] == f"What is {expression}?"
        assert eval(expression) == int(value), solved_parts
        assert all(expression != one.id for own in splits.values() for one in own)


def test_partial_results_are_never_negative():
    for problem in load_problems("arithmetic:test?digits=1,1,1"):
        first, sign, second, *_ = problem.id.split()
        assert eval(f"{first} {sign} {second}") >= 0


@pytest.mark.parametrize(
    "path",
    ["arithmetic:", "arithmetic:val?digits=2,1", "arithmetic:train?digits=2", "arithmetic:train?digits=0,1"],
)
def test_other_families_are_refused(path):
    with pytest.raises(UserError, match="is not a family of problems; write arithmetic:train"):
        load_problems(path)


def test_a_family_that_is_too_large_is_refused():
    with pytest.raises(UserError, match="give fewer digits"):
        load_problems("arithmetic:train?digits=3,3")


def test_the_last_number_of_an_answer_decides(splits):
    problem = splits["train"][0]
    right = problem.answer
    texts = {
        f"{problem.id} = {right}.": 1,
        f"{right} and then 5000": 0,
        "no number": 0,
        f"{right}.0": 1,
        "": 0,
    }
    with grader_named("last_number") as grader:
        graded = grader.grade([(problem, text, False) for text in texts])
    assert [one.reward for one in graded] == list(texts.values())
    assert [one.correct for one in graded] == [bool(value) for value in texts.values()]
