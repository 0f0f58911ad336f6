"""Compute advantages from the rewards of a group of answers, and the information the group could provide.

    advantages(np.array([1.0, 0, 0, 0]))                  # [0.75, -0.25, -0.25, -0.25]
    bits(np.array([1.0, 0, 0, 0]))                        # 3.25: four times the entropy of the rewards

By default only the group's mean is subtracted: dividing by the standard deviation or by lengths biases the
objective.
"""

from __future__ import annotations

import numpy as np

STD_FLOOR = 1e-4  # added to the standard deviation


def advantages(
    rewards: np.ndarray,
    valid: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    *,
    baseline: str = "group",
    divide_by_std: bool = False,
    divide_by_length: bool = False,
) -> np.ndarray:
    """The advantage of each answer of a group, float64 `[answers]`; all 0 if the rewards are constant.

    Args:
      rewards: float `[answers]`.
      valid: bool `[answers]`; the others are left out of the baseline and get advantage 0. None: all are
        valid.
      lengths: tokens of each answer, for `divide_by_length`.
      baseline: `group` is the mean of all answers, `leave_one_out` the mean of the others.
    """
    rewards = np.asarray(rewards, np.float64)
    valid = np.ones(len(rewards), bool) if valid is None else valid
    if is_constant(rewards, valid):
        return np.zeros(len(rewards))
    own = rewards[valid]
    found = np.where(valid, rewards - own.mean(), 0.0)
    if baseline == "leave_one_out":
        found *= len(own) / (len(own) - 1)  # r - (sum - r) / (n - 1)
    if divide_by_std:
        found /= own.std(ddof=1) + STD_FLOOR
    if divide_by_length:
        assert lengths is not None
        found /= np.maximum(lengths, 1)
    return found


def is_constant(rewards: np.ndarray, valid: np.ndarray) -> bool:
    """Whether a group has nothing to compare: equal rewards, or fewer than two valid answers."""
    return len(np.unique(np.asarray(rewards)[valid])) < 2


def bits(rewards: np.ndarray) -> float:
    """Answers times the entropy of their rewards, in bits: the most that a group could teach."""
    _, counts = np.unique(rewards, return_counts=True)
    shares = counts / counts.sum()
    return float(-len(rewards) * np.sum(shares * np.log2(shares)))
