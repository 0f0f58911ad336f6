"""Rows of one prompt in buffers that hold the prompt once; see `jaxlora.models.shared`.

    buffers = shared_buffers(rows, sizes=(2048, 4096), ...)     # rows of one `prompt_id` share their prompt

A prompt's last token is not shared: its next token is another one in each row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlora.data.packing import Batch, empty, place, round_up
from jaxlora.data.render import RenderedRow

WIDER = (1.25, 1.5, 2.0)  # lengths of the wider buffer, in lengths of the buffer


@dataclass(frozen=True)
class _Size:
    """What rows take of a buffer."""

    used: int = 0  # positions
    wide: int = 0  # positions of the wider buffer
    rows: int = 0
    shared: int = 0  # positions that have copies: those of all prompts
    copies: int = 0  # rows of the prompt that has most of them

    @property
    def summed(self) -> int:
        """Positions of the wider buffer whose gradients are added up, with those that stand for nothing."""
        return self.shared * self.copies

    def within(self, other: _Size) -> bool:
        return self.used <= other.used and self.wide <= other.wide and self.rows <= other.rows


class _Bin:
    """Rows that lie in one buffer, by their prompts, and what they take of it."""

    def __init__(self) -> None:
        self.rows: dict[str, list[RenderedRow]] = {}
        self.size = _Size()

    def with_row(self, row: RenderedRow, shared: int) -> _Size:
        """What it all takes with one more row, whose prompt has so many positions."""
        size, others = self.size, self.rows.get(row.prompt_id, ())
        new = 0 if others else shared
        return _Size(
            used=size.used + row.n_tokens - shared + new,
            wide=size.wide + row.n_tokens,
            rows=size.rows + 1,
            shared=size.shared + new,
            copies=max(size.copies, len(others) + 1),
        )


def shared_length(row: RenderedRow) -> int:
    """Positions of a row that it shares with the others of its prompt."""
    return max(0, int(np.argmax(row.weights != 0)) - 1)


def shared_buffers(
    rows: Sequence[RenderedRow], sizes: Sequence[int], most_rows: int, multiple: int, dense: bool = False
) -> list[Batch]:
    """The rows in buffers `[1, 1, length]`, each length one of these sizes, with the places of their copies.

    Args:
      sizes: rising; the largest holds any row.
      most_rows: of one buffer.
      multiple: of the lengths of the wider buffers.
      dense: attention compares all positions with all, whatever the rows: no wider buffer is then longer than
        the largest size, so that it takes no more memory than without copies.
    """
    whole = sizes[-1]
    most = _Size(whole, whole if dense else int(WIDER[-1] * whole), most_rows)
    bins = _fitted(rows, most)
    fullest = max(one.size.wide for one in bins)
    ratio = WIDER[-1] if dense else next(ratio for ratio in WIDER if fullest <= ratio * whole)
    found = []
    for one, shape in zip(bins, _shapes([one.size for one in bins], 2 * most.wide), strict=True):
        lengths = ((size, min(round_up(int(ratio * size), multiple), most.wide)) for size in sizes)
        length, wide = next(pair for pair in lengths if one.size.within(_Size(*pair, most_rows)))
        found.append(_buffer(one, length, wide, shape))
    return found


def _shapes(sizes: Sequence[_Size], most: int) -> list[tuple[int, int]]:
    """Room for each buffer's shared positions and copies of each: the same for all unless that were more
    than `most` copies, else as many copies for all. Few programs."""
    own = [(power_of_two(size.shared, 128), power_of_two(size.copies, 2)) for size in sizes]
    common = max(shared for shared, _ in own), max(copies for _, copies in own)
    if math.prod(common) <= most:
        return [common] * len(own)
    total = max(map(math.prod, own))
    return [(shared, total // shared) for shared, _ in own]


def _fitted(rows: Sequence[RenderedRow], most: _Size) -> list[_Bin]:
    """Prompt by prompt, the fullest first: each row where its prompt is, or else in the first with room.

    A long prompt of few rows and a short one of many do not lie together: each shared position has room for
    as many copies as any other, and those are no more than the positions of the wider buffer.
    """
    groups: dict[str, list[RenderedRow]] = defaultdict(list)
    for row in rows:
        groups[row.prompt_id].append(row)
    bins: list[_Bin] = []
    for group in sorted(groups.values(), key=lambda own: -sum(row.n_tokens for row in own)):
        shared = shared_length(group[0])
        for row in sorted(group, key=lambda row: -row.n_tokens):
            for one in sorted(bins, key=lambda one: row.prompt_id not in one.rows):
                size = one.with_row(row, shared)
                if size.within(most) and size.summed <= most.wide:
                    break
            else:
                bins.append(one := _Bin())
                size = one.with_row(row, shared)
            one.size = size
            one.rows.setdefault(row.prompt_id, []).append(row)
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
