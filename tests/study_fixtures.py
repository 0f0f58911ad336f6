"""Build evaluations and study directories for tests: real record formats, made-up but consistent figures."""

from __future__ import annotations

from jaxlora.evals.gsm8k import Problem, score
from jaxlora.study.comparison import Evaluation

RIGHT, FORMAT, WRONG, NO_BOX, TRUNCATED = "right", "format", "wrong", "no_box", "truncated"


def prediction(index: int, kind: str) -> dict:
    """One record of problem `index`, whose answer is 1000 + index, with an outcome of the given kind."""
    answer = 1000 + index
    text = {
        RIGHT: rf"Add them up. \boxed{{{answer}}}",
        FORMAT: rf"Add them up. \boxed{{\${answer:,}}}",
        WRONG: rf"Subtract them. \boxed{{{index}}}",
        NO_BOX: f"The answer is {answer}.",
        TRUNCATED: "Let me think. " * 20,
    }[kind]
    problem = Problem(
        index, f"gsm8k-{index:04d}", f"Problem <b>{index}</b>: what is 1000 + {index}?", str(answer)
    )
    return score(
        problem, text, 100, 512 if kind == TRUNCATED else 60, "length" if kind == TRUNCATED else "stop"
    )


def evaluation(condition: str | None, seed: int | None, kinds: list[str], prefix: str = "test") -> Evaluation:
    """The evaluation of one model whose answers are of the given kinds, problem by problem."""
    run_id = f"{prefix}-base" if condition is None else f"{prefix}-{condition}-seed-{seed}"
    return Evaluation(run_id, condition, seed, tuple(prediction(i, kind) for i, kind in enumerate(kinds)))
