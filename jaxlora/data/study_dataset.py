"""The study's dataset, `openmath_original_clean`: its source, and what a correct build produces.

These are the study's retained figures. The results of a build are compared with them, never copied from
them.
"""

from __future__ import annotations

from typing import Any

SOURCE = "nvidia/OpenMathInstruct-2"
SPLIT = "train_1M"

STUDY: dict[str, Any] = {
    "candidates": {"gsm8k": 14764, "math": 14704},
    "accepted": {"gsm8k": 14618, "math": 13548},
    "rejected": {
        "gsm8k": {
            "missing_box": 0,
            "boxed_mismatch": 141,
            "suspicious_pattern": 5,
            "problem_pattern": 0,
        },
        "math": {
            "missing_box": 0,
            "boxed_mismatch": 1064,
            "suspicious_pattern": 92,
            "problem_pattern": 0,
        },
    },
    "split_rows": {
        "train": {"gsm8k": 13145, "math": 12203, "total": 25348},
        "val": {"gsm8k": 1473, "math": 1345, "total": 2818},
    },
    "split_groups": {"train": 13005, "val": 1441},
    "files": {
        "raw/train.jsonl": {
            "bytes": 25528287,
            "sha256": "4d0eac8d8f9ee6d88eb6ed125a31722dd9aa42a553fe5ac77a29636092a38daa",
        },
        "raw/val.jsonl": {
            "bytes": 2787397,
            "sha256": "666370035da9a4b87d9aa3738b3a66d05e4245646f7143c73d510aa38e0a4488",
        },
        "rendered/train.jsonl": {
            "bytes": 29989535,
            "sha256": "86908c031d57981d33f1198fe1bc08f5ab666e3ddc6280a1b8bec6e0797a878a",
        },
        "rendered/val.jsonl": {
            "bytes": 3283365,
            "sha256": "475e37e896d5560db47fe5db54b1cc8cf74923d685dbae857f98701324a98acd",
        },
    },
}


def differences(found: dict[str, Any], wanted: dict[str, Any] | None = None, place: str = "") -> list[str]:
    """One line for each figure in `wanted` (default: the study's) that differs in `found`."""
    lines: list[str] = []
    for key, value in (STUDY if wanted is None else wanted).items():
        name = f"{place}.{key}" if place else key
        other = found.get(key)
        if isinstance(value, dict):
            lines += differences(other if isinstance(other, dict) else {}, value, name)
        elif other != value:
            lines.append(f"{name}: study {value}, here {other}")
    return lines
