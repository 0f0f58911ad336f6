"""In which order prompts are read, and how many at once: plain functions of lengths, nothing on a device.

    queue = order_of([104, 65, 96], expected=[133, 400, 163])     # [0, 2, 1]: taken from the end
    take = take_packed(queue, lengths, free=20, rows=64, tokens=2048)

Longest answers first: answers that begin last end last, and while the last ones run alone most slots idle.
How long they will be is known from an earlier evaluation of the same prompts, of whatever model, or guessed:
longer prompts have longer answers. What is generated depends on none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

PACKED_TOKENS = 2048  # of a packed prefill: enough to fill a GPU, few enough that no slot waits for long
PACKED_ROWS = 64  # prompts in one, at most
WORTH = 0.75  # of its tokens: with less, waiting for more free slots costs less than padding
PAGE = 8  # prefill batches whose prompts are sorted by length, where rows are padded to the longest


def order_of(
    lengths: Sequence[int], expected: Sequence[float] | None = None, batch: int | None = None, first: int = 0
) -> list[int]:
    """Numbers of prompts of these lengths; the last is read first.

    Args:
      expected: how long each answer may become; None: longer prompts first, the guess of any fit that grows.
      batch: prompts are padded to the longest of so many: within pages of a few batches, they are sorted by
        their own length. None: they are not padded.
      first: so many are read at the start, before any answer begins: the first page.
    """
    if expected is None:
        return sorted(range(len(lengths)), key=lambda i: lengths[i])
    order = sorted(range(len(lengths)), key=lambda i: (-expected[i], i))
    if batch is not None:
        starts = [0, *range(min(max(first, batch), len(order)), len(order), PAGE * batch), len(order)]
        pages = (order[start:end] for start, end in pairwise(starts))
        order = [i for page in pages for i in sorted(page, key=lambda i: -lengths[i])]
    return order[::-1]


def packed_tokens(lengths: Sequence[int]) -> int:
    """Tokens of a packed prefill of prompts like these, before it is rounded up."""
    return max(max(lengths), min(PACKED_TOKENS, sum(lengths)))


def take_packed(
    queue: Sequence[int], lengths: Sequence[int], free: Sequence[int], rows: int, tokens: int, idle: bool
) -> list[list[int]]:
    """The prompts, from the end of the queue, that devices read now; all empty if it is better to wait.

    Args:
      free: free slots of each device.
      rows, tokens: of one device's packed prefill, at most.
      idle: nothing runs, so that there is nothing to wait for.
    """
    taken: list[list[int]] = [[] for _ in free]
    held = np.zeros(len(free), int)
    left = len(queue)
    while left:
        length = lengths[queue[left - 1]]
        fits = [
            i for i in range(len(free)) if len(taken[i]) < min(free[i], rows) and held[i] + length <= tokens
        ]
        if not fits:
            break
        device = min(fits, key=lambda i: held[i])
        left -= 1
        taken[device].append(queue[left])
        held[device] += length
    full = held.sum() >= WORTH * tokens * len(free) or all(len(own) == rows for own in taken)
    return taken if full or left == 0 or idle else [[] for _ in free]


def packed_line(
    prompts: Sequence[Sequence[int]], slots: np.ndarray, tokens: int, rows: int, nowhere: int
) -> dict[str, Any]:
    """Prompts end to end, for their slots; what is no prompt goes to the slot `nowhere`.

    Returns:
      int32 `tokens`, `positions`, `segment_ids` and `slots` `[1, tokens]`, and the number of each prompt's
      last token in it, `ends` `[rows]`.
    """
    line: dict[str, Any] = {
        "slots": np.full((1, tokens), nowhere, np.int32),
        "ends": np.zeros(rows, np.int32),
    }
    line |= {name: np.zeros((1, tokens), np.int32) for name in ("tokens", "positions", "segment_ids")}
    start = 0
    for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        place = 0, slice(start, start := start + len(prompt))
        line["tokens"][place], line["positions"][place] = prompt, np.arange(len(prompt))
        line["segment_ids"][place], line["slots"][place] = i + 1, slot
        line["ends"][i] = start - 1
    return line
