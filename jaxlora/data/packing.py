"""Lay rows out in fixed-size buffers: end to end (packed) or one per line (padded).

The rows of a step differ in length, but compiled programs want few shapes. `choose_sizes` picks the few
buffer lengths that waste the least padding over the whole run, and `pack` lays rows end to end. Each row has
its own segment id and positions, so padding, packing and splitting over buffers are merely layouts.

    sizes = choose_sizes([2461, 2433, 3295], n_sizes=2, multiple=512)        # (2560, 3584)
    buffers = pack(rows, sizes, max_tokens=16384)                            # arrays [buffers, 1, length]

On several devices a buffer has one line per device, each of whole rows and about the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlora.data.render import RenderedRow, shifted

Batch = dict[str, np.ndarray]
WHOLE = slice(None)


def round_up(number: int, multiple: int) -> int:
    """Round up to the next multiple."""
    return -(-number // multiple) * multiple


def power_of_two(n: int, least: int) -> int:
    """The smallest `least` times a power of two that is at least `n`; this keeps programs few."""
    while least < n:
        least *= 2
    return least


def choose_sizes(totals: Sequence[int], n_sizes: int, multiple: int) -> tuple[int, ...]:
    """At most `n_sizes` buffer lengths, multiples of `multiple`, that minimise the padding of these totals.

    Each total goes into the smallest length that holds it. Solved exactly, by dynamic programming over the
    distinct rounded-up totals.
    """
    rounded = [round_up(total, multiple) for total in totals]
    levels, counts = np.unique(rounded, return_counts=True)
    n = len(levels)
    before = np.concatenate([[0], np.cumsum(counts)])
    # cost[k, j]: tokens needed for the first j levels with k lengths, the last of which is levels[j - 1]
    cost = np.full((min(n_sizes, n) + 1, n + 1), np.inf)
    cost[0, 0] = 0
    cut = np.zeros(cost.shape, int)
    for k in range(1, len(cost)):
        for j in range(1, n + 1):
            options = cost[k - 1, :j] + levels[j - 1] * (before[j] - before[:j])
            cut[k, j] = int(np.argmin(options))
            cost[k, j] = options[cut[k, j]]
    sizes, j = [], n
    for k in range(int(np.argmin(cost[:, n])), 0, -1):
        sizes.append(int(levels[j - 1]))
        j = cut[k, j]
    return tuple(reversed(sizes))


def cut_into_buffers(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row indices, in order, cut into as few buffers of at most `max_tokens` as this order allows.

    Of such cuts it is the one whose fullest buffer has the fewest tokens, because the buffers of a step are
    all as long as that one. A row longer than `max_tokens` gets its own buffer.
    """
    fewest = len(_filled(lengths, max_tokens))
    low, high = -(-sum(lengths) // fewest), max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_filled(lengths, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return _filled(lengths, high)


def _filled(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Each buffer filled with the next rows for as long as they fit."""
    buffers: list[list[int]] = [[]]
    used = 0
    for i, length in enumerate(lengths):
        if buffers[-1] and used + length > max_tokens:
            buffers.append([])
            used = 0
        buffers[-1].append(i)
        used += length
    return buffers


def cut_into_lines(lengths: Sequence[int], max_tokens: int, lines: int = 1) -> list[list[list[int]]]:
    """Row indices for each line of each buffer; lines hold `max_tokens`, longer rows get their own line.

    With one line per buffer, rows stay in order. With more, as few buffers as possible are used and all lines
    are filled evenly: the longest rows are dealt first, each to the emptiest line, and then the fullest and
    the emptiest line swap rows for as long as that helps.
    """
    if lines == 1:
        return [[part] for part in cut_into_buffers(lengths, max_tokens)]
    buffers = max(1, -(-sum(lengths) // (max_tokens * lines)))
    while True:
        dealt = _deal(lengths, buffers * lines)
        if buffers * lines >= len(lengths) or fullest([dealt], lengths) <= max_tokens:
            return [dealt[i : i + lines] for i in range(0, len(dealt), lines)]
        buffers += 1


def _deal(lengths: Sequence[int], lines: int) -> list[list[int]]:
    """Row indices, in order, for each of `lines` lines of nearly equal token counts."""
    dealt: list[list[int]] = [[] for _ in range(lines)]
    totals = [0] * lines
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        line = totals.index(min(totals))
        dealt[line].append(i)
        totals[line] += lengths[i]
    while True:
        full, empty = totals.index(max(totals)), totals.index(min(totals))
        gap = totals[full] - totals[empty]
        moves = [
            (abs(gap - 2 * (lengths[i] - (0 if j is None else lengths[j]))), i, j)
            for i in dealt[full]
            for j in (None, *dealt[empty])
        ]
        left, i, j = min(moves, key=lambda move: move[0], default=(gap, 0, None))
        if left >= gap:
            return [sorted(line) for line in dealt]
        dealt[full].remove(i)
        dealt[empty].append(i)
        if j is not None:
            dealt[empty].remove(j)
            dealt[full].append(j)
        moved = lengths[i] - (0 if j is None else lengths[j])
        totals[full] -= moved
        totals[empty] += moved


def fullest(buffers: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int]) -> int:
    """Tokens in the fullest line of the buffers made by `cut_into_lines`."""
    return max(sum(lengths[i] for i in line) for buffer in buffers for line in buffer)


def largest_buffer(lengths: Sequence[int], max_tokens: int, lines: int = 1) -> int:
    """Tokens in the fullest line once these rows are cut into buffers: the capacity every line needs."""
    return fullest(cut_into_lines(lengths, max_tokens, lines), lengths)


def pack(rows: Sequence[RenderedRow], sizes: Sequence[int], max_tokens: int, lines: int = 1) -> Batch:
    """Pack rows end to end: int32 `tokens`, `targets`, `positions`, `segment_ids` and float32 `weights`.

    Each is `[buffers, lines, length]`, where length is the smallest size that holds the fullest line. The
    rows' extras, which must have the same names in all rows, are packed the same way, in float32.
    """
    parts = cut_into_lines([row.n_tokens for row in rows], max_tokens, lines)
    return in_lines([[[rows[j] for j in line] for line in buffer] for buffer in parts], sizes, lines)


def in_lines(buffers: Sequence[Sequence[Sequence[RenderedRow]]], sizes: Sequence[int], lines: int) -> Batch:
    """Lay out the rows of each line of each buffer end to end, like `pack`; a buffer may have fewer lines."""
    filled = [line for buffer in buffers for line in buffer if line]
    length = _smallest(sizes, max(sum(row.n_tokens for row in line) for line in filled))
    batch = empty(filled[0], len(buffers), lines, length)
    for i, buffer in enumerate(buffers):
        for number, line in enumerate(buffer):
            start = 0
            for segment, row in enumerate(line, start=1):
                place(batch, (i, number), start, row, segment)
                start += row.n_tokens
    return batch


def rows_of(values: np.ndarray, lengths: Sequence[int], max_tokens: int, lines: int = 1) -> list[np.ndarray]:
    """Split values `[buffers, lines, length]` of a batch made by `pack` by row, in the original row order."""
    found: dict[int, np.ndarray] = {}
    for buffer, parts in zip(values, cut_into_lines(lengths, max_tokens, lines), strict=True):
        for line, part in zip(buffer, parts, strict=True):
            ends = np.cumsum([lengths[i] for i in part])
            found |= {i: line[end - lengths[i] : end] for i, end in zip(part, ends, strict=True)}
    return [found[i] for i in range(len(lengths))]


def pad(rows: Sequence[RenderedRow], sizes: Sequence[int], n_rows: int) -> Batch:
    """One row per line, `n_rows` lines: the same arrays as `pack`, each `[1, n_rows, length]`."""
    batch = empty(rows, 1, n_rows, _smallest(sizes, max(row.n_tokens for row in rows)))
    for i, row in enumerate(rows):
        place(batch, (0, i), 0, row, 1)
    return batch


def spread(batch: Batch, words: np.ndarray) -> np.ndarray:
    """Repeat each row's word at each of its tokens: int32, in the shape of the batch's arrays; 0 at padding.

    Args:
      words: int32 [rows], in the order in which the batch was built.
    """
    segments = batch["segment_ids"]
    counts = segments.max(axis=-1)
    before = np.cumsum(counts).reshape(counts.shape) - counts
    row = np.minimum(before[..., None] + np.maximum(segments, 1), len(words)) - 1  # past the end: empty lines
    return np.where(segments > 0, words[row], 0).astype(np.int32)


def empty(rows: Sequence[RenderedRow], *shape: int) -> Batch:
    """All-zero arrays for a batch of such rows."""
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    return batch | {name: np.zeros(shape, np.float32) for name in ("weights", *rows[0].extras)}


def place(
    batch: Batch,
    line: tuple[int, int],
    start: int,
    row: RenderedRow,
    segment: int,
    part: slice = WHOLE,
) -> None:
    """Write a row, or a slice of its positions, into a line of a batch."""
    positions = np.arange(row.n_tokens)[part]
    there = (*line, slice(start, start + len(positions)))
    for name, values in zip(("tokens", "targets", "weights"), shifted(row), strict=True):
        batch[name][there] = values[part]
    for name, values in row.extras.items():  # extras, like weights, belong to the predicted token
        batch[name][there] = values[1:][part]
    batch["positions"][there] = positions
    batch["segment_ids"][there] = segment


def _smallest(sizes: Sequence[int], needed: int) -> int:
    return min(size for size in sizes if size >= needed)
