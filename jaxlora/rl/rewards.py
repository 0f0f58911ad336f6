"""Rewards: what each sampled answer earns.

with grader_named("gsm8k_strict") as grader:
    grader.grade([(problem, text, truncated)])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxlora.evals.gsm8k import score_text
from jaxlora.rl.problems import Problem
from jaxlora.runtime.errors import UserError


@dataclass(frozen=True)
class Graded:
    """One answer's reward."""

    reward: float
    correct: bool
    well_formed: bool
    failed: str | None = None


class Grader:
    """The strict score."""

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def grade(self, texts: Sequence[tuple[Problem, str, bool]]) -> list[Graded]:
        """The reward of each answer, in order."""
        found = []
        for problem, text, truncated in texts:
            score = score_text(text, problem.answer)
            correct = bool(score["correct"])
            found.append(Graded(float(correct), correct, not truncated and "boxed" in text))
        return found


def grader_named(name: str, *, format_weight: float = 0.0, time_limit_s: float = 1.0) -> Grader:
    """The grader of this name."""
    if name != "gsm8k_strict":
        raise UserError(f"rl.reward: {name!r:.80} is not known")
    return Grader()


def check_problems(name: str, problems: Sequence[Problem]) -> None:
    """Whether a reward can judge answers to these problems."""
