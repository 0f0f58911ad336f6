"""Rewards are total: whatever an answer or a grader does, it is a number in time; failures are counted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.evals.gsm8k import score_text
from jaxlora.rl import rewards
from jaxlora.rl.grading import math_correct, well_formed
from jaxlora.rl.problems import Problem, load_problems
from jaxlora.rl.rewards import Graded, check_problems, count_failures, grader_named, source_sha256
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import sha256_of

FUNCTIONS = "helpers.reward_functions"


def problem(answer: str = "5") -> Problem:
    return Problem("p-1", [{"role": "user", "content": "?"}], answer, {})


@pytest.fixture(scope="module")
def maths():
    pytest.importorskip("math_verify")
    with grader_named("math", format_weight=0.1) as grader:
        yield grader


@pytest.fixture(scope="module")
def misbehaving():
    with grader_named(f"{FUNCTIONS}:misbehaves", time_limit_s=0.5) as grader:
        yield grader


def grade_one(grader, text: str, answer: str = "5", truncated: bool = False) -> Graded:
    return grader.grade([(problem(answer), text, truncated)])[0]


# --- The cookbook's totals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "truncated", "reward"),
    [
        (r"\boxed{5}", False, 1.0),
        (r"\boxed{5}", True, 0.9),
        (r"\boxed{6}", False, 0.0),
        (r"\boxed{6}", True, -0.1),
        ("five", False, -0.1),
        (r"\boxed{5", False, -0.1),
    ],
)
@pytest.mark.parametrize("name", ["gsm8k_strict", "gsm8k_numeric"])
def test_a_reward_is_correctness_and_a_tenth_for_format(name, text, truncated, reward):
    with grader_named(name, format_weight=0.1) as grader:
        found = grade_one(grader, text, truncated=truncated)
    assert found.reward == pytest.approx(reward)
    assert found.correct == (reward > 0.5)
    assert found.well_formed == well_formed(text, truncated)
    assert found.failed is None


def test_without_a_format_weight_the_reward_is_correctness(maths):
    with grader_named("gsm8k_strict") as grader:
        assert [grade_one(grader, text).reward for text in (r"\boxed{5}", "five")] == [1.0, 0.0]
    assert grade_one(maths, "five").reward == pytest.approx(-0.1)


def test_the_scorers_are_those_of_evaluation():
    texts = [
        r"\boxed{70,000}",
        r"\boxed{\$70000}",
        r"\boxed{70000.0}",
        r"\boxed {70000}",
        "70000",
        r"\boxed{7",
    ]
    expected = [score_text(text, "70000") for text in texts]
    for name, field in (("gsm8k_strict", "correct"), ("gsm8k_numeric", "correct_numeric")):
        with grader_named(name) as grader:
            found = grader.grade([(problem("70000"), text, False) for text in texts])
        assert [one.correct for one in found] == [one[field] for one in expected]


# --- Mathematics --------------------------------------------------------------------------------------------

RIGHT = [
    ("5", "5"),
    (r"\frac{3}{4}", "0.75"),
    (r"\frac34", r"\dfrac{3}{4}"),
    (r"x+1", "1+x"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("(1,2)", "(1, 2)"),
    (r"\text{even}", "even"),
    (r"\text{even}", r"\text{Even}"),
    ("Yes", "yes"),
    (r"[0,1)", r"\left[0,1\right)"),
    ("10,000", "10000"),
    (r"90^\circ", "90"),
    ("x=5", "5"),
    (".5", r"\frac{1}{2}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\text{(A)}", "A"),
    (r"(x-1)(x+1)", "x^2-1"),
    (r"\frac{1}{3}", "0.333333333"),
    (r"50\%", "0.5"),
]
WRONG = [
    ("5", "6"),
    ("5", ""),
    ("5", "-5"),
    ("[0,1)", "(0,1)"),
    (r"\text{even}", "neve"),  # the same product of letters
    (r"\text{even}", "odd"),
    ("Yes", "No"),
    ("Yes", "esY"),
    ("even", "neve"),
    (r"\frac{3}{4}", r"\frac{4}{3}"),
    ("x+1", "x-1"),
    ("(1,2)", "(2,1)"),
    ("3", "3.0000001"),
    ("5", r"\text{NaN}"),
    ("5", r"\frac{5}{"),
    ("5", r"\input{/etc/passwd}"),
    ("5", "5 or 6"),
    ("5", "__import__('os').getpid()"),
]


@pytest.mark.parametrize("name", ["math", "deepmath"])
def test_mathematics_is_compared_by_what_it_means(name):
    pytest.importorskip("math_verify")
    cases = [(pair, True) for pair in RIGHT] + [(pair, False) for pair in WRONG]
    with grader_named(name, time_limit_s=20) as grader:  # also where other programs hold the cores
        found = grader.grade([(problem(gold), f"So \\boxed{{{box}}}.", False) for (gold, box), _ in cases])
    assert [(pair, one.correct) for (pair, _), one in zip(cases, found, strict=True)] == cases
    assert count_failures(found) == {}


def test_only_the_last_box_counts_and_it_must_be_closed(maths):
    assert grade_one(maths, r"\boxed{6} no, \boxed{5}").correct
    assert not grade_one(maths, r"\boxed{5} no, \boxed{6}").correct
    assert not grade_one(maths, r"\boxed{5} no, \boxed{5").correct
    assert grade_one(maths, r"\boxed{\frac{10}{2}}").correct


def test_equal_answers_of_a_group_are_graded_once_and_all_alike(maths, monkeypatch):
    seen = []
    run = maths._pool.run
    monkeypatch.setattr(maths._pool, "run", lambda jobs: seen.append(len(jobs)) or run(jobs))
    texts = [r"\boxed{4+1}", r"so \boxed{4+1}", r"\boxed{4+2}"] * 5
    assert [one.correct for one in maths.grade([(problem(), text, False) for text in texts])] == [
        True,
        True,
        False,
    ] * 5
    assert seen == [2]


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet=r"0123456789+-*/^{}()\fracsqtxy,.= ", max_size=24))
def test_what_a_worker_says_is_what_the_function_says_and_no_text_makes_it_fail_to_answer(maths, text):
    found = grade_one(maths, f"\\boxed{{{text}}}")
    assert math.isfinite(found.reward)
    if found.failed is None and "^" not in text:  # a tower of powers may take longer here than there
        assert found.correct == math_correct("5", f"\\boxed{{{text}}}")


@pytest.mark.parametrize("tower", ["9^9^9^9", "9^{9^{9^9}}", "9^{9^{9^{9}}}+1", r"(9!)!!!^{9!}"])
def test_a_tower_of_powers_is_wrong_within_two_seconds(maths, tower):
    grade_one(maths, r"\boxed{2+3}")  # the workers are there
    seconds = []
    for _ in range(2):  # the better one: other programs may hold the cores
        start = time.monotonic()
        found = grade_one(maths, f"\\boxed{{{tower}}}")
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2
    assert (found.correct, found.reward) == (False, 0.0)
    assert grade_one(maths, r"\boxed{2+3}").correct  # and the next answer finds a worker


def test_a_tower_is_ended_by_the_time_limit_and_counted(maths):
    found = maths.grade([(problem(), text, False) for text in (r"\boxed{9^{9^{9^9}}}", r"\boxed{2+3}")])
    assert [one.failed for one in found] == ["time limit", None]
    assert [one.correct for one in found] == [False, True]
    assert count_failures(found) == {"time limit": 1}


# --- Functions ----------------------------------------------------------------------------------------------


def test_a_function_is_given_the_row_with_its_id_and_the_text():
    with grader_named(f"{FUNCTIONS}:is_named") as grader:
        row = Problem("p-1", [], "x", {"answer": "7", "id": "other"})
        texts = ["p-1", "7", "8"]
        found = grader.grade([(row, text, False) for text in texts])
    assert [one.reward for one in found] == [1.0, 1.0, 0.0]
    assert [one.correct for one in found] == [True, True, False]


def test_a_functions_value_is_the_reward_and_the_format_term_is_added():
    with grader_named(f"{FUNCTIONS}:length", format_weight=0.1) as grader:
        found = grader.grade([(problem(), "x" * 5, False), (problem(), r"\boxed{" + "x" * 12 + "}", False)])
    assert [one.reward for one in found] == pytest.approx([0.4, 2.0])
    assert [one.correct for one in found] == [False, True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hangs in Python", "time limit"),
        ("hangs in C", "time limit"),
        ("raises", "raised RuntimeError"),
        ("exits", "raised SystemExit"),
        ("dies", "worker died"),
        ("crashes", "worker died"),
        ("recurses", "raised RecursionError"),
        ("unknown", "raised KeyError"),
        ("NaN", "returned NaN"),
        ("infinity", "returned an infinite number"),
        ("huge", "returned an infinite number"),
        ("absurd", "returned a number beyond 1e+09"),
        ("text", "returned str"),
        ("None", "returned None"),
        ("list", "returned list"),
        ("complex", "returned complex"),
    ],
)
def test_a_grader_that_fails_gives_nothing_and_the_reason(misbehaving, text, reason):
    found = misbehaving.grade([(problem(), one, False) for one in ("half", text, "bool")])
    assert [one.reward for one in found] == [0.5, 0.0, 1.0]
    assert [one.failed for one in found] == [None, reason, None]
    assert count_failures(found) == {reason: 1}


def test_what_a_function_prints_or_reads_is_not_taken_for_an_answer(misbehaving):
    found = misbehaving.grade([(problem(), text, False) for text in ("prints", "half", "reads", "prints")])
    assert [one.reward for one in found] == [1.0, 0.5, 1.0, 1.0]


def test_workers_are_reused_work_at_the_same_time_and_have_no_jax():
    with grader_named(f"{FUNCTIONS}:process") as grader:
        first, second = (
            {one.reward for one in grader.grade([(problem(), "", False)] * 200)} for _ in range(2)
        )
    assert second <= first
    assert 1 < len(first) <= 16
    with grader_named(f"{FUNCTIONS}:imports_jax") as grader:
        assert grade_one(grader, "").reward == 0.0


def test_a_function_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text("def seven(row, text):\n    return 7 * (text == 'x')\n")
    monkeypatch.chdir(tmp_path)
    with grader_named("own_reward:seven") as grader:
        assert grade_one(grader, "x").reward == 7.0


# --- The ends of processes ----------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_the_file_of_a_function_is_known_without_running_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").write_text("raise SystemExit")
    (tmp_path / "outer" / "inner.py").write_text("raise SystemExit")
    for module, file in (("outer", "outer/__init__.py"), ("outer.inner", "outer/inner.py")):
        assert source_sha256(f"{module}:function") == sha256_of(tmp_path / file)
    named = [source_sha256(name) for name in ("math", "outer.missing:function", "sys:exit")]
    assert named == [None, None, None]


def test_workers_end_with_the_grader():
    with grader_named(f"{FUNCTIONS}:process") as grader:
        pids = {int(one.reward) for one in grader.grade([(problem(), "", False)] * 50)}
        server = grader._pool._process.pid
        assert all(map(alive, [*pids, server]))
    assert gone([*pids, server], 0.1)


PARENT = f"""
import sys, time
from jaxlora.rl.problems import Problem
from jaxlora.rl.rewards import grader_named
p = Problem("p", [], "5", {{}})
grader = grader_named("{FUNCTIONS}:misbehaves", time_limit_s=300)
with grader:
    import threading
    pool = grader._pool
    print(pool._process.pid, flush=True)
    grader.grade([(p, "hangs in C", False), (p, "hangs in Python", False)])
"""


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("victim", ["parent", "server"])
def test_workers_that_hang_end_when_the_parent_or_the_server_is_killed(repository, victim):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(repository), str(repository / "tests")])}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        server = int(parent.stdout.readline())
        end = time.monotonic() + 20
        while len(workers := children_of(server)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(workers) == 2
        os.kill(parent.pid if victim == "parent" else server, signal.SIGKILL)
        assert gone(workers)
        assert gone([server])
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def running(word: str) -> bool:
    """Whether any process has this word on its command line."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if word.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_what_a_stopped_function_started_ends_with_it(misbehaving):
    seconds = f"98765{os.getpid()}"  # nobody else's
    row = Problem("p-1", [], "5", {"seconds": seconds})
    (found,) = misbehaving.grade([(row, "starts a process", False)])
    assert found.failed == "time limit"
    end = time.monotonic() + 5
    while running(f"sleep\0{seconds}") and time.monotonic() < end:
        time.sleep(0.02)
    assert not running(f"sleep\0{seconds}")


def test_a_killed_server_is_started_again():
    with grader_named(f"{FUNCTIONS}:length") as grader:
        assert grade_one(grader, "x" * 5).reward == 0.5
        os.kill(grader._pool._process.pid, signal.SIGKILL)
        time.sleep(0.1)
        assert grade_one(grader, "x" * 5).reward == 0.5


def test_a_signal_to_every_process_of_a_run_is_the_parents_alone():
    """Who stops a run may signal its whole group: what is being graded is graded to its end."""
    with grader_named(f"{FUNCTIONS}:process") as grader:
        first = {int(one.reward) for one in grader.grade([(problem(), "", False)] * 50)}
        for pid in [grader._pool._process.pid, *first]:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        again = grader.grade([(problem(), "", False)] * 50)
        assert {int(one.reward) for one in again} <= first
        assert count_failures(again) == {}


def test_ctrl_c_during_grading_leaves_a_grader_that_works(misbehaving):
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            grade_one(misbehaving, "hangs in Python")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert grade_one(misbehaving, "half").reward == 0.5


# --- One line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gsm8k", {}, "'gsm8k' is not known; give one of gsm8k_strict"),
        ("", {}, "is not known"),
        ("a:b:c", {}, "is not known"),
        ("os;system:x", {}, "is not known"),
        ("no_such_module:f", {}, "no module no_such_module"),
        ("math", {"format_weight": -1}, "rl.format_weight"),
        ("math", {"format_weight": float("nan")}, "rl.format_weight"),
        ("math", {"time_limit_s": 0}, "rl.time_limit_s"),
        ("math", {"time_limit_s": float("inf")}, "rl.time_limit_s"),
    ],
)
def test_a_bad_setting_is_one_line(name, given, message):
    with pytest.raises(UserError, match=message):
        grader_named(name, **given)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{FUNCTIONS}:nothing", "cannot be imported: AttributeError"),
        (f"{FUNCTIONS}:__name__", "is str, not a function"),
        ("helpers.no_such:f", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_is_not_there_is_one_line_at_the_start(name, message):
    with pytest.raises(UserError, match=message), grader_named(name):
        pass


@pytest.mark.parametrize("name", ["math", "deepmath", "reasoning_gym"])
def test_a_missing_package_is_named_with_how_to_install_it(name, monkeypatch):
    monkeypatch.setattr(rewards, "_is_installed", lambda module: False)
    with pytest.raises(UserError, match=rf"{name} needs the package [a-z-]+; pip install 'jaxlora\[rl\]'"):
        grader_named(name)


def test_a_problem_without_a_reference_is_one_line():
    with pytest.raises(UserError, match="math needs a reference, and p-1 has none"):
        check_problems("math", [problem("")])
    with pytest.raises(UserError, match="reasoning_gym grades its own problems only, not p-1"):
        check_problems("reasoning_gym", [problem()])
    check_problems("module:function", [problem("")])


# --- reasoning-gym ------------------------------------------------------------------------------------------


def test_a_task_of_reasoning_gym_is_scored_by_its_own_verifier():
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    problems = load_problems("reasoning_gym:chain_sum?size=5&seed=3&max_terms=3")
    made = reasoning_gym.create_dataset("chain_sum", size=5, seed=3, max_terms=3)
    assert [one.messages[-1]["content"] for one in problems] == [entry["question"] for entry in made]
    texts = [
        f"<answer>{problems[0].answer}</answer>",
        f"I think \\boxed{{{problems[1].answer}}}.",
        problems[2].answer,
        f"<answer>0</answer> or <answer>{problems[3].answer}</answer>",
        "no idea",
    ]
    with grader_named("reasoning_gym", format_weight=0.1) as grader:
        found = grader.grade([(one, text, False) for one, text in zip(problems, texts, strict=True)])
    assert [one.correct for one in found] == [True] * 4 + [False]
    assert [one.well_formed for one in found] == [True, True, False, True, False]
    assert found[4].reward == pytest.approx(made.score_answer("no idea", made[4]) - 0.1)


@pytest.mark.slow
def test_every_task_scores_its_own_answers():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    from reasoning_gym.factory import DATASETS

    tasks = [name for name in DATASETS if name != "composite"]  # that one needs others
    problems = [load_problems(f"reasoning_gym:{name}?size=1&seed=1")[0] for name in tasks]
    with grader_named("reasoning_gym", time_limit_s=30) as grader:
        found = grader.grade([(one, f"<answer>{one.answer}</answer>", False) for one in problems])
    wrong = {
        name for name, one, p in zip(tasks, found, problems, strict=True) if p.answer and not one.correct
    }
    assert wrong == set()
    assert json.dumps([one.raw for one in problems])
