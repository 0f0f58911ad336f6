"""Rows of one prompt in buffers that hold the prompt once; see `jaxlora.models.shared`.

    buffers = shared_buffers(rows, sizes=(2048, 4096), ...)     # rows of one `prompt_id` share their prompt

A prompt's last token is not shared: its next token is another one in each row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jaxlora.data.packing import Batch, empty, place, round_up
from jaxlora.data.render import RenderedRow

WIDER = (1.25, 1.5, 2.0)  # lengths of the wider buffer, in lengths of the buffer


class _Bin:
    """Rows that lie in one buffer, by their prompts, and what they take of it."""

    def __init__(self) -> None:
        self.rows: dict[str, list[RenderedRow]] = defaultdict(list)
        self.used = self.wide = self.count = 0

    def cost(self, row: RenderedRow) -> tuple[int, int]:
        """Positions that one more row takes, in the buffer and in the wider one."""
        own = row.n_tokens - shared_length(row)
        return own + (0 if row.prompt_id in self.rows else shared_length(row)), row.n_tokens

    def add(self, row: RenderedRow) -> None:
        used, wide = self.cost(row)
        self.used, self.wide, self.count = self.used + used, self.wide + wide, self.count + 1
        self.rows[row.prompt_id].append(row)


def shared_length(row: RenderedRow) -> int:
    """Positions of a row that it shares with the others of its prompt."""
    return max(0, int(np.argmax(row.weights != 0)) - 1)


def shared_buffers(
    rows: Sequence[RenderedRow], sizes: Sequence[int], most_rows: int, multiple: int
) -> list[Batch]:
    """The rows in buffers `[1, 1, length]`, each length one of these sizes, with the places of their copies.

    Args:
      sizes: rising; the largest holds any row.
      most_rows: of one buffer.
      multiple: of the lengths of the wider buffers.
    """
    whole = sizes[-1]
    bins = _fitted(rows, whole, int(WIDER[-1] * whole), most_rows)
    ratio = next(r for r in WIDER if max(one.wide for one in bins) <= r * whole)
    n_shared = max(sum(shared_length(own[0]) for own in one.rows.values()) for one in bins)
    n_copies = max(len(own) for one in bins for own in one.rows.values())
    shape = power_of_two(n_shared, 128), power_of_two(n_copies, 2)
    found = []
    for one in bins:
        length = next(size for size in sizes if one.used <= size and one.wide <= int(ratio * size))
        found.append(_buffer(one, length, round_up(int(ratio * length), multiple), shape))
    return found


def _fitted(rows: Sequence[RenderedRow], whole: int, wide: int, most_rows: int) -> list[_Bin]:
    """Prompt by prompt, the fullest first: each row where its prompt is, or else in the first with room."""
    groups: dict[str, list[RenderedRow]] = defaultdict(list)
    for row in rows:
        groups[row.prompt_id].append(row)
    bins: list[_Bin] = []
    for group in sorted(groups.values(), key=lambda own: -sum(row.n_tokens for row in own)):
        for row in sorted(group, key=lambda row: -row.n_tokens):
            here = sorted(bins, key=lambda one: row.prompt_id not in one.rows)
            for one in here:
                used, more = one.cost(row)
                if one.used + used <= whole and one.wide + more <= wide and one.count < most_rows:
                    break
            else:
                one = _Bin()
                bins.append(one)
            one.add(row)
    return bins


def _buffer(one: _Bin, length: int, wide_length: int, shape: tuple[int, int]) -> Batch:
    """One buffer. Indices of nothing lie beyond the end."""
    batch = empty(next(iter(one.rows.values())), 1, 1, length)
    wide = np.full(wide_length, length, np.int32)
    segments = np.zeros(wide_length, np.int32)
    back = np.full(length, wide_length, np.int32)
    shared = length + np.arange(shape[0], dtype=np.int32)  # each another one beyond the end
    copies = np.full(shape, wide_length, np.int32)
    at = wide_at = segment = n_shared = 0
    for group in one.rows.values():
        prompt = shared_length(group[0])
        place(batch, (0, 0), at, group[0], segment + 1, slice(prompt))
        shared[n_shared : n_shared + prompt] = np.arange(at, at + prompt)
        first, at = at, at + prompt
        for number, row in enumerate(group):
            segment += 1
            own = row.n_tokens - prompt
            place(batch, (0, 0), at, row, segment, slice(prompt, row.n_tokens))
            begin = wide_at + prompt
            wide[wide_at:begin] = np.arange(first, first + prompt)
            wide[begin : begin + own] = np.arange(at, at + own)
            back[at : at + own] = np.arange(begin, begin + own)
            copies[n_shared : n_shared + prompt, number] = np.arange(wide_at, begin)
            if number == 0:
                back[first : first + prompt] = np.arange(wide_at, begin)
            segments[wide_at : begin + own] = segment
            at, wide_at = at + own, begin + own
        n_shared += prompt
    places = {"wide": wide, "back": back, "shared": shared, "copies": copies.reshape(-1)}
    places["wide_segment_ids"] = segments
    return batch | {name: values[None, None] for name, values in places.items()}


def power_of_two(n: int, least: int) -> int:
    """The first power of two times `least` that is no less: few programs."""
    while least < n:
        least *= 2
    return least
