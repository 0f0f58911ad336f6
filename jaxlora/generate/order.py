"""The order in which prompts are prefilled, and how many at once: plain host functions of lengths.

    queue = order_of([104, 65, 96], expected=[133, 400, 163])     # [0, 2, 1], taken from the end
    take = take_packed(queue, lengths, free=20, rows=64, tokens=2048)

Prompts with the longest answers go first: answers started last finish last, and while the last few run, most
slots idle. Lengths are known from an earlier evaluation of the same prompts, with any model, or guessed:
longer prompts have longer answers. The generated text does not depend on the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

PACKED_TOKENS = 2048  # per packed prefill: enough to fill a GPU, few enough that no slot waits for long
PACKED_ROWS = 64  # most prompts in a packed prefill
WORTH = 0.75  # share of its tokens below which waiting for more free slots is cheaper than padding
PAGE = 8  # prefill batches within which prompts are sorted by length, if rows are padded to the longest


def order_of(
    lengths: Sequence[int], expected: Sequence[float] | None = None, batch: int | None = None, first: int = 0
) -> list[int]:
    """The numbers of prompts of these lengths, in order of prefill; the last goes first.

    Args:
      expected: expected length of each answer; None: longer prompts first, as any increasing fit would guess.
      batch: this many prompts are padded to the longest of them: within pages of a few batches they are
        sorted by their own length. None: they are not padded.
      first: this many are prefilled at the start, before any answer begins: the first page.
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
    """Tokens of a packed prefill for prompts like these, before rounding up."""
    return max(max(lengths), min(PACKED_TOKENS, sum(lengths)))


def take_packed(
    queue: Sequence[int], lengths: Sequence[int], free: Sequence[int], rows: int, tokens: int, idle: bool
) -> list[list[int]]:
    """The prompts, from the end of the queue, that each device prefills now; all empty if waiting is better.

    Args:
      free: free slots of each device.
      rows, tokens: upper limits of one device's packed prefill.
      idle: no answer is being decoded, so there is nothing to wait for.
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
    """Pack prompts end to end for their slots; padding goes to the slot `nowhere`.

    Returns:
      int32 `tokens`, `positions`, `segment_ids` and `slots` `[1, tokens]`, and `ends` `[rows]`, the index of
      each prompt's last token.
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
