"""A reward that half of all texts earn: `rl.reward=tests.helpers.rl_rule:reward` from the root."""

from __future__ import annotations


def reward(row: dict, text: str) -> float:
    return float(sum(map(ord, text)) % 2)
