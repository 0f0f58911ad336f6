"""Pack rows that share a prompt into buffers that hold the prompt once; see `jaxlora.models.shared`.

    buffers = shared_buffers(rows, sizes=(2048, 4096), ...)     # rows of one `prompt_id` share their prompt

A prompt's last token is not shared, because the token after it differs between rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlora.data.packing import Batch, empty, place, power_of_two, round_up
from jaxlora.data.render import RenderedRow

WIDER = (1.25, 1.5, 2.0)  # lengths of the wider buffer, relative to the buffer


@dataclass(frozen=True)
class _Size:
    """The space that rows take up in a buffer."""

    used: int = 0  # positions
    wide: int = 0  # positions of the wider buffer
    rows: int = 0
    shared: int = 0  # positions with copies: those of all prompts
    copies: int = 0  # rows of the prompt with the most rows

    @property
    def summed(self) -> int:
        """Positions of the wider buffer whose gradients are summed, including unused ones."""
        return self.shared * self.copies

    def within(self, other: _Size) -> bool:
        return self.used <= other.used and self.wide <= other.wide and self.rows <= other.rows


class _Bin:
    """The rows in one buffer, by prompt, and the space they take up."""

    def __init__(self) -> None:
        self.rows: dict[str, list[RenderedRow]] = {}
        self.size = _Size()

    def with_row(self, row: RenderedRow, shared: int) -> _Size:
        """The total size with one more row, whose prompt has `shared` positions."""
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
    """The number of positions that a row shares with the other rows of its prompt."""
    return max(0, int(np.argmax(row.weights != 0)) - 1)


def shared_buffers(
    rows: Sequence[RenderedRow], sizes: Sequence[int], most_rows: int, multiple: int, dense: bool = False
) -> list[Batch]:
    """Pack the rows into buffers `[1, 1, length]`, with length from `sizes`, and index their copies.

    Args:
      sizes: ascending; the largest holds any row.
      most_rows: maximum rows per buffer.
      multiple: the lengths of the wider buffers are multiples of this.
      dense: attention compares all positions with all, whatever the rows. No wider buffer is then longer than
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
    """Room for each buffer's shared positions and for copies of each.

    To keep programs few, it is the same for all buffers, or at least its product is if there would otherwise
    be more than `most` copies.
    """
    own = [(power_of_two(size.shared, 128), power_of_two(size.copies, 2)) for size in sizes]
    common = max(shared for shared, _ in own), max(copies for _, copies in own)
    if math.prod(common) <= most:
        return [common] * len(own)
    total = max(map(math.prod, own))
    return [(shared, total // shared) for shared, _ in own]


def _fitted(rows: Sequence[RenderedRow], most: _Size) -> list[_Bin]:
    """Assign rows by prompt, largest first: to the bin with that prompt, or else the first with room.

    A long prompt with few rows and a short one with many are kept apart: every shared position has room for
    the same number of copies, and their total must not exceed the positions of the wider buffer.
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
    """Build one buffer. Unused indices point past the end."""
    batch = empty(next(iter(one.rows.values())), 1, 1, length)
    wide = np.full(wide_length, length, np.int32)
    segments = np.zeros(wide_length, np.int32)
    back = np.full(length, wide_length, np.int32)
    shared = length + np.arange(shape[0], dtype=np.int32)  # each a different one past the end
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
