r"""Rewards: what each sampled answer earns. Grading never raises because of an answer.

    with grader_named("math", format_weight=0.1) as grader:
        grader.grade([(problem, r"\boxed{4}", False)])[0].reward          # 1.0: correct, and well formed

    reward = value + format_weight * (well formed - 1)

The value is 1 or 0, or whatever a Python function returns. A grader that hangs, raises, dies, or returns
anything but a finite number yields the value 0, with the reason in `failed`; see `count_failures`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from jaxlora.data.boxes import extract_boxed
from jaxlora.evals.gsm8k import score_text
from jaxlora.evals.rules import rule_named
from jaxlora.rl.grading import HOW, quick_match, well_formed
from jaxlora.rl.pool import Outcome, Pool
from jaxlora.rl.problems import Problem
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import sha256_of

NAMED = ("gsm8k_strict", "gsm8k_numeric", "last_number", "math", "deepmath", "reasoning_gym")
Answer = tuple[
    Problem, str, bool
]  # the text without its end token, and whether it was truncated at the token limit
MAX_TIME_LIMIT_S = 600.0
_QUICK = ("gsm8k_strict", "gsm8k_numeric", "last_number")  # linear in time and cannot fail
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_PACKAGES = {"math": "math_verify", "deepmath": "math_verify", "reasoning_gym": "reasoning_gym"}


@dataclass(frozen=True)
class Graded:
    """One answer's reward. `correct`: the value is at least 1. `failed`: why the grader gave no value."""

    reward: float
    correct: bool
    well_formed: bool
    failed: str | None = None


class Grader:
    """A reward by name. Entering it as a context starts its worker processes; leaving it ends them."""

    def __init__(self, name: str, format_weight: float, time_limit_s: float):
        self.name, self.format_weight = name, format_weight
        self._pool: Pool | None = None
        if name not in _QUICK:
            self._pool = Pool("math" if name == "deepmath" else name, time_limit_s)

    def __enter__(self) -> Grader:
        if self._pool is not None:
            self._pool.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def grade(self, texts: Sequence[Answer]) -> list[Graded]:
        """The reward of each answer, in order; answers are graded in parallel.

        Raises:
          UserError: a function cannot be imported, or `reasoning_gym` is given problems other than its own.
        """
        check_problems(self.name, [problem for problem, _, _ in texts])
        values = self._values(texts)
        return [self._graded(answer, value) for answer, value in zip(texts, values, strict=True)]

    def _values(self, texts: Sequence[Answer]) -> list[Outcome]:
        if self.name == "last_number":
            return [(_last_number_right(text, problem.answer), None) for problem, text, _ in texts]
        if self._pool is None:
            field = "correct" if self.name == "gsm8k_strict" else "correct_numeric"
            return [(float(score_text(text, problem.answer)[field]), None) for problem, text, _ in texts]
        if self.name == "reasoning_gym" or self.name not in NAMED:
            return self._pool.run(
                [_job(problem.raw | {"id": problem.id}, "", text) for problem, text, _ in texts]
            )
        pairs = [(problem.answer, extract_boxed(text)) for problem, text, _ in texts]
        found = {pair: _quick(*pair) for pair in pairs}
        rest = [
            pair for pair, outcome in found.items() if outcome is None
        ]  # each once: answers repeat within groups
        outcomes = self._pool.run([_job({}, gold, f"\\boxed{{{box}}}") for gold, box in rest])
        found |= dict(zip(rest, outcomes, strict=True))
        return [outcome for pair in pairs if (outcome := found[pair]) is not None]

    def _graded(self, answer: Answer, outcome: Outcome) -> Graded:
        _, text, truncated = answer
        value, failed = outcome
        value = 0.0 if value is None else value
        formed = well_formed(text, truncated, tagged=self.name == "reasoning_gym")
        return Graded(value + self.format_weight * (formed - 1), value >= 1, formed, failed)


def grader_named(name: str, *, format_weight: float = 0.0, time_limit_s: float = 1.0) -> Grader:
    """The grader with this name: one of `NAMED`, or `module:function`.

    A function is called in a worker process with the problem's row, whose `id` is the problem's, and the text
    of the answer; it returns a number or a bool.

    Args:
      format_weight: the penalty for an answer that is not well formed.
      time_limit_s: per answer; then the grader is stopped.

    Raises:
      UserError: the name is unknown, a number is out of range, or a required package is missing.
    """
    if not isinstance(format_weight, int | float) or not 0 <= format_weight < math.inf:
        raise UserError(f"rl.format_weight: {format_weight!r:.80} is not allowed; give a number >= 0")
    if not isinstance(time_limit_s, int | float) or not 0 < time_limit_s <= MAX_TIME_LIMIT_S:
        raise UserError(
            f"rl.time_limit_s: {time_limit_s!r:.80} is not allowed; give a number of seconds above 0, at most"
            f" {MAX_TIME_LIMIT_S:g}"
        )
    if name not in NAMED and not (isinstance(name, str) and _FUNCTION.fullmatch(name)):
        raise UserError(
            f"rl.reward: {name!r:.80} is not known; give one of {', '.join(NAMED)}, or module:function"
        )
    if (package := _PACKAGES.get(name)) is not None and not _is_installed(package):
        raise UserError(f"rl.reward: {name} needs the package {package.replace('_', '-')}; {HOW}")
    if name not in NAMED and not _is_installed(module := name.partition(":")[0]):
        raise UserError(f"rl.reward: there is no module {module} here or on PYTHONPATH")
    return Grader(name, float(format_weight), float(time_limit_s))


def try_import(grader: Grader) -> None:
    """Import a grader's function once, in a worker process that ends afterwards.

    Raises:
      UserError: it cannot be imported, or is not a function.
    """
    try:
        with grader:
            pass
    except UserError as error:
        raise UserError(f"rl.reward: {error}") from None


def source_sha256(name: str) -> str | None:
    """SHA-256 of the file that the function of a reward `module:function` is imported from, without running
    it; None if there is no such file, and for the named rewards."""
    if name in NAMED:
        return None
    path: Sequence[str] | None = [os.getcwd(), *sys.path]  # the same path as in workers
    module, spec = name.partition(":")[0], None
    for end in [match.start() for match in re.finditer(r"\.|$", module)]:
        spec = None if path is None else PathFinder.find_spec(module[:end], path)
        path = None if spec is None else spec.submodule_search_locations
    file = Path(spec.origin) if spec is not None and spec.origin else None
    return sha256_of(file) if file is not None and file.is_file() else None


def check_problems(name: str, problems: Sequence[Problem]) -> None:
    """Check that a reward can judge answers to these problems.

    Raises:
      UserError: it cannot; names the problem.
    """
    for problem in problems:
        if name == "reasoning_gym" and "task" not in problem.raw:
            raise UserError(
                f"rl.reward: reasoning_gym grades its own problems only, not {problem.id}; give"
                " reasoning_gym:TASK as the source of the problems, or another reward"
            )
        if name != "reasoning_gym" and name in NAMED and not problem.answer:
            raise UserError(f"rl.reward: {name} needs a reference, and {problem.id} has none")


def count_failures(graded: Sequence[Graded]) -> dict[str, int]:
    """How many answers got no value from the grader, by reason, the most frequent first."""
    return dict(Counter(one.failed for one in graded if one.failed is not None).most_common())


def _last_number_right(text: str, reference: str) -> float:
    rule = rule_named("last_number")
    found = rule.found(text)
    return float(found is not None and rule.right(found, rule.reference(reference)))


def _job(raw: dict, answer: str, text: str) -> dict:
    return {"raw": raw, "answer": answer, "text": text}


def _quick(gold: str, box: str | None) -> Outcome | None:
    """The outcome for a box if it can be decided without algebra."""
    quick = quick_match(gold, box)
    return None if quick is None else (float(quick), None)


def _is_installed(module: str) -> bool:
    """Whether a module's top-level package, here or on the path, can be found, without running it."""
    top = module.partition(".")[0]
    with suppress(ImportError, ValueError):
        if top in sys.modules or importlib.util.find_spec(top) is not None:
            return True
    return any(os.path.exists(os.path.join(os.getcwd(), name)) for name in (top, f"{top}.py"))
