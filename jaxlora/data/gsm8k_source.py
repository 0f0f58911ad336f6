r"""Convert GSM8K's own rows to the schema of the curation source.

    convert({"question": "... 48/2 ...", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"})
    # {"problem": "... 48/2 ...", "expected_answer": "24", "problem_source": "gsm8k",
    #  "generated_solution": "48/2 = 24 clips.\n\nThe final answer is $\boxed{24}$."}

The calculator marks `<<...>>` are dropped, the line `#### ANSWER` becomes a sentence with a box, and the
answer is kept as written: `1,000` keeps its comma in the box and in `expected_answer`.
"""

from __future__ import annotations

import re
from typing import Any

FIELDS = ("question", "answer")
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def convert(row: dict[str, Any]) -> dict[str, str]:
    """Convert one GSM8K row (`question`, `answer`) to the source's schema.

    Raises:
      ValueError: a field is missing or not text, or the answer has no value after its last `####`.
    """
    for name in FIELDS:
        if not isinstance(row.get(name), str):
            raise ValueError(f"field {name!r} is missing or not text")
    steps, mark, answer = row["answer"].rpartition("####")
    answer = answer.strip()
    if not mark or not answer:
        raise ValueError("the answer has no value after '####'")
    solution = _CALCULATOR_MARK.sub("", steps).rstrip()
    return {
        "problem": row["question"],
        "generated_solution": f"{solution}\n\nThe final answer is $\\boxed{{{answer}}}$.",
        "expected_answer": answer,
        "problem_source": "gsm8k",
    }
