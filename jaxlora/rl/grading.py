r"""Score an answer: pure functions of a problem and a text; those that may hang are run in a worker.

    math_correct(r"\frac{3}{4}", r"So it is \boxed{0.75}.")     # True
    well_formed(r"So it is \boxed{0.75}.", truncated=False)     # True

Nothing here imports JAX, so a worker starts in a fraction of a second and never touches an accelerator.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from typing import Any

from jaxlora.data.boxes import extract_boxed
from jaxlora.evals.answers import normalize, numeric_match, read_number, strict_match
from jaxlora.runtime.errors import UserError

Job = Mapping[str, Any]  # what a worker receives: the problem's `raw` and `answer`, and the `text`
MAX_SYMBOLS = 1000  # letters; longer answers are compared as text and not parsed as expressions
CLOSE = Fraction(1, 1000)  # two numbers closer than this may be one number, rounded
MOST = 1e9  # largest magnitude of a value: far larger advantages overflow float32 gradients
HOW = "pip install 'jaxlora[rl]'"

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SPACES = re.compile(r"\\[ ,;:!]|~|\\q?quad\b|\s+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|([^{}\\]))(?:\{([^{}]*)\}|([^{}\\]))")
_NAMED = re.compile(r"^[A-Za-z]=")  # `x=5` states the answer 5
_WORDS = re.compile(r"[a-z]{4,}|yes|no|[a-z]+(?: [a-z]+)+")


def well_formed(text: str, truncated: bool, tagged: bool = False) -> bool:
    r"""The one format rule, for training and evaluation: the answer is marked, and the model ended it itself.

    Marked means that the last `\boxed{...}` is closed or, with `tagged`, that there is
    `<answer>...</answer>`.
    """
    marked = extract_boxed(text) is not None or (tagged and _TAG.search(text) is not None)
    return marked and not truncated


def marked_answer(text: str, tagged: bool = False) -> str | None:
    """The answer marked in a text: with `tagged`, the last `<answer>`; otherwise the last box; or None."""
    tags = _TAG.findall(text) if tagged else []
    return tags[-1] if tags else extract_boxed(text)


# --- Mathematics --------------------------------------------------------------------------------------------


def quick_match(gold: str, box: str | None) -> bool | None:
    """The verdict without algebra: False without a box, True for equal text or numbers, None if undecided."""
    if box is None or not box.strip():
        return False
    if same_text(gold, box) or numeric_match(box, gold):
        return True
    if _is_words(gold) or max(len(gold), len(box)) > MAX_SYMBOLS or _other_numbers(gold, box):
        return False
    return None


def math_correct(gold: str, text: str) -> bool:
    """Whether the last box of a text matches the reference: as text, as a number, or by algebra.

    Algebra may take forever (`9^{9^{9^9}}`), so call this where it can be stopped.
    """
    box = extract_boxed(text)
    quick = quick_match(gold, box)
    if quick is not None:
        return quick
    import math_verify

    wanted = math_verify.parse(f"${gold}$", parsing_timeout=None)
    found = math_verify.parse(f"\\boxed{{{box}}}", parsing_timeout=None)
    return bool(math_verify.verify(wanted, found, timeout_seconds=None))


def same_text(gold: str, answer: str) -> bool:
    """Whether the two are equal by the strict score, or after normalising different ways to typeset them."""
    if strict_match(answer, gold):
        return True
    plain = _plain(gold)
    return bool(plain) and plain == _plain(answer)


def _plain(answer: str) -> str:
    r"""Normalise: no spaces, `\text{even}` as even, `\frac12` with braces, `.5` as 0.5, no `x=`."""
    text = _TEXT.sub(r"\1", normalize(answer).replace(r"\$", "").replace(r"\%", "").rstrip(". "))
    text = _SPACES.sub("", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree", "", text)
    text = _SHORT_FRACTION.sub(lambda part: rf"\frac{{{part[1] or part[2]}}}{{{part[3] or part[4]}}}", text)
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    text = _NAMED.sub("", text)
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text


def _other_numbers(gold: str, box: str) -> bool:
    """Whether both are numbers that clearly differ: this settles most wrong answers without algebra."""
    if "%" in gold + box:
        return False  # 50% means 50 to some and 1/2 to others
    left, right = read_number(gold), read_number(box)
    return left is not None and right is not None and abs(left - right) > CLOSE


def _is_words(gold: str) -> bool:
    """Whether the reference is words; as an expression, `even` would be a product, equal to `neve`."""
    words = _TEXT.sub(r"\1", gold).strip().lower()
    return bool(_WORDS.fullmatch(words))


# --- reasoning-gym ------------------------------------------------------------------------------------------


def reasoning_score(raw: Mapping[str, Any], text: str) -> float:
    """The task's own score, 0 to 1, of the last `<answer>`, else the last box, else the whole text."""
    answer = marked_answer(text, tagged=True)
    data = dataset(raw["task"], json.dumps(raw["options"], sort_keys=True))
    entry = data[raw["index"]]
    if entry["question"] != raw["question"]:  # a few tasks draw a new entry each time
        entry = dict(raw["entry"])
    return data.score_answer((text if answer is None else answer).strip(), entry)


@cache
def dataset(task: str, options: str) -> Any:
    """The procedural dataset of a task, with its options as JSON.

    Raises:
      UserError: the package is missing, or the task or an option is unknown; the message gives no position.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(f"needs the package reasoning-gym; {HOW}") from None
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        import difflib

        near = difflib.get_close_matches(task, DATASETS, 3)
        hint = f"; do you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"reasoning-gym has no task {task!r:.80}{hint}")
    try:
        return reasoning_gym.create_dataset(task, **json.loads(options))
    except Exception as error:  # each task checks its options in its own way
        reason = str(error).partition("__init__() ")[2] or str(error)
        raise UserError(f"reasoning-gym's task {task} cannot be created: {reason}") from None


# --- What workers run ---------------------------------------------------------------------------------------


def function_named(name: str) -> Callable[[Any, str], Any]:
    """The Python function named by `module:function`.

    Raises:
      UserError: it cannot be imported, or is not a function.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the user's own code
        raise UserError(f"{name} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UserError(f"{name} is {type(found).__name__}, not a function")
    return found


# The first parses and comparisons spend a second building tables; do that before an answer's time is limited.
_WARM = (("(x-1)(x+1)", "x^2-2"), ("[0,1)", "(0,2]"), (r"\frac{1}{2}", "0.3"), (r"\sqrt{8}", "3,4"))


def scorer(name: str) -> Callable[[Job], Any]:
    """A worker's scoring function for this reward; loading it may fail here, but not later in a job."""
    if name == "math":
        for gold, box in _WARM:
            math_correct(gold, f"\\boxed{{{box}}}")
        return lambda job: math_correct(job["answer"], job["text"])
    if name == "reasoning_gym":
        import reasoning_gym  # noqa: F401  takes a second

        return lambda job: reasoning_score(job["raw"], job["text"])
    function = function_named(name)
    return lambda job: function(job["raw"], job["text"])


def as_number(value: Any) -> float:
    """A grader's result as a finite number.

    Raises:
      ValueError: it is not one; the message says briefly what it is.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a NumPy scalar
    if not isinstance(value, bool | int | float):
        raise ValueError(f"returned {'None' if value is None else type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("returned NaN" if math.isnan(number) else "returned an infinite number")
    if abs(number) > MOST:
        raise ValueError(f"returned a number beyond {MOST:g}")
    return number
