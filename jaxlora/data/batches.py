"""Batches of a run, in an order that is a pure function of (seed, epoch, step), built ahead of use by grain.

    train, validation = split_validation(prompt_ids, fraction=0.05, seed=0)
    rows_of_step(order_seed=0, n_rows=25348, batch_rows=8, step=3170)     # every row once an epoch
    build = partial(step_batch, rows, plan.rows_of_step, layout)
    for step, batch in ahead(build, range(1, 101)): ...     # batch: numpy arrays [buffers, lines, length]

Nothing is remembered between steps, so a resumed run reads what the undisturbed run would have read. The
random numbers are written out here, in integer arithmetic, so that no version of a library changes an order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import grain.python as grain
import numpy as np

from jaxlora.config import TrainConfig
from jaxlora.data.packing import (
    Batch,
    choose_sizes,
    cut_into_lines,
    fullest,
    pack,
    pad,
    round_up,
    spread,
)
from jaxlora.data.render import RenderedRow
from jaxlora.runtime.errors import UserError

ROWS_MULTIPLE = 32  # of the rows that a line of a buffer has places for
WIDTH_MULTIPLE = 128  # of the tokens that a row has places for
FEW_SIZES = 6  # buffer lengths, where the configuration leaves their number open
Stages = tuple[tuple[int, int], ...]  # a step, and how many of the lengths the steps up to it use


def row_words(seed: int, step: int, rows: Sequence[int]) -> np.ndarray:
    """A word of its own for each row of a step: int32 [rows], a hash of (seed, step, row)."""
    keys = _mix(np.asarray(rows, np.uint64) + _start(seed, -step))  # no epoch's number
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.int32)


@lru_cache(maxsize=4)  # an epoch's order is asked for at each of its steps
def shuffled(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers of all rows in the order of an epoch: int64 [n_rows], read-only.

    Rows are sorted by a hash of (seed, epoch, row); equal hashes keep the order of the file.
    """
    keys = _mix(np.arange(n_rows, dtype=np.uint64) + _start(seed, epoch))
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def rows_of_step(order_seed: int | None, n_rows: int, batch_rows: int, step: int) -> Sequence[int]:
    """Row numbers of a step, counted from 1: each row once an epoch; an epoch's last batch may be short.

    Args:
      order_seed: of the shuffle; None: the file's order, the same in every epoch.
    """
    steps_per_epoch = -(-n_rows // batch_rows)
    epoch, place = divmod(step - 1, steps_per_epoch)
    part = range(place * batch_rows, min((place + 1) * batch_rows, n_rows))
    if order_seed is None:
        return part
    return [int(row) for row in shuffled(n_rows, order_seed, epoch)[part.start : part.stop]]


def split_validation(prompt_ids: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers for training and for validation, both in file order; no prompt is in both.

    Prompts are drawn in the order of a hash of (seed, prompt), so that a row's part does not depend on where
    it stands in the file, until `fraction` of the rows is reached; at least one prompt is drawn. A prompt
    that would take more than its share is passed over while others fit.

    Args:
      prompt_ids: one a row, `RenderedRow.prompt_id`: equal for rows of one prompt.

    Raises:
      UserError: the fraction is not between 0 and 1, or all rows have the same prompt.
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.validation_fraction is {fraction:g}; it must be above 0 and below 1")
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompt_ids):
        groups.setdefault(prompt, []).append(row)
    if len(groups) < 2:
        raise UserError("data.validation_fraction: all rows have the same prompt; give data.validation_path")
    wanted = max(1, round(fraction * len(prompt_ids)))
    drawn: list[int] = []
    order = sorted(groups, key=lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest())
    for prompt in order:
        if len(drawn) + len(groups[prompt]) <= wanted:
            drawn += groups[prompt]
    if not drawn:  # every prompt has more rows than are wanted: the smallest group is nearest
        drawn = min((groups[prompt] for prompt in order), key=len)
    kept = set(drawn)
    return [row for row in range(len(prompt_ids)) if row not in kept], sorted(drawn)


def _start(seed: int, epoch: int) -> np.uint64:
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64-bit integers whose output looks random."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Layout:
    """How rows become buffers: `sizes` are the few buffer lengths that a program is compiled for."""

    packed: bool
    sizes: tuple[int, ...]
    batch_rows: int
    max_buffer_tokens: int
    lines: int = 1  # of a packed buffer
    rows_a_line: int = 1  # at most
    longest_row: int = 0  # tokens that no row exceeds
    early: tuple[tuple[int, tuple[int, ...]], ...] = ()  # a step, and the few lengths of those up to it

    def at(self, step: int) -> Layout:
        """The layout of a training step."""
        sizes = next((few for last, few in self.early if step <= last), self.sizes)
        return replace(self, sizes=sizes, early=())

    def build(self, rows: Sequence[RenderedRow]) -> Batch:
        if self.packed:
            return pack(rows, self.sizes, self.max_buffer_tokens, self.lines)
        return pad(rows, self.sizes, self.batch_rows)

    def shape(self, rows: Sequence[RenderedRow]) -> tuple[int, int, int]:
        """The shape of the batch that `build` makes of these rows."""
        lengths = [row.n_tokens for row in rows]
        if not self.packed:
            return 1, self.batch_rows, min(size for size in self.sizes if size >= max(lengths))
        parts = cut_into_lines(lengths, self.max_buffer_tokens, self.lines)
        largest = fullest(parts, lengths)
        return len(parts), self.lines, min(size for size in self.sizes if size >= largest)

    def shapes(
        self, rows: Sequence[RenderedRow], rows_of_step: Callable[[int], Sequence[int]], steps: range
    ) -> list[tuple[int, int, int]]:
        """The shapes of the batches of these steps, each once, in the order in which they come."""
        found = (self.at(step).shape([rows[i] for i in rows_of_step(step)]) for step in steps)
        return list(dict.fromkeys(found))

    def order(self, rows: Sequence[RenderedRow]) -> list[int]:
        """The numbers of these rows in the order in which they lie in the batch, line after line."""
        if not self.packed:
            return list(range(len(rows)))
        parts = cut_into_lines([row.n_tokens for row in rows], self.max_buffer_tokens, self.lines)
        return [i for buffer in parts for line in buffer for i in line]


def choose_layout(
    rows: Sequence[RenderedRow],
    batches: Sequence[Sequence[int]],
    batch_rows: int,
    train: TrainConfig,
    multiple: int,
    lines: int = 1,
    stages: Stages = (),
) -> Layout:
    """The layout for these batches of rows; buffer lengths are multiples of `multiple`.

    Args:
      batches: row numbers of each batch.
      multiple: what the device mesh asks of a buffer's length; `buffer_multiple` is rounded up to it.
      lines: of a packed buffer, as the device mesh asks for.
      stages: in these the first batches use few of the lengths, while programs for the others are compiled.
        Which step has which length never depends on how far that is.
    """
    multiple, most_sizes = round_up(train.buffer_multiple, multiple), train.buffer_sizes or FEW_SIZES
    lengths = [[rows[i].n_tokens for i in batch] for batch in batches]
    if train.layout == "padded":
        sizes = choose_sizes([max(part) for part in lengths], most_sizes, multiple)
        return Layout(False, sizes, batch_rows, train.max_buffer_tokens)
    most = train.max_buffer_tokens
    totals, rows_a_line = [], 0
    for part in lengths:
        buffers = cut_into_lines(part, most, lines)
        totals.append(fullest(buffers, part))
        rows_a_line = max(rows_a_line, *(len(line) for buffer in buffers for line in buffer))
    if lines == 1:  # rounded, so that programs of other data serve these; kernels' memory grows with it
        rows_a_line = min(batch_rows, round_up(rows_a_line, ROWS_MULTIPLE))
    sizes = choose_sizes(totals, most_sizes, multiple)
    own = [min(size for size in sizes if size >= total) for total in totals]
    early = tuple((last, choose_sizes(own[:last], n, 1)) for last, n in stages if n < len(sizes))
    longest = min(round_up(max(map(max, lengths)), WIDTH_MULTIPLE), max(sizes))
    return Layout(True, sizes, batch_rows, most, lines, rows_a_line, longest, early)


def step_batch(
    rows: Sequence[RenderedRow],
    rows_of_step: Callable[[int], Sequence[int]],
    layout: Layout,
    step: int,
    dropout_seed: int | None = None,
) -> Batch:
    """The rows of one training step.

    Args:
      dropout_seed: with adapters that drop inputs, the seed of that; the batch has one more array `dropout`,
        int32 like its tokens, from which each token's mask follows (`jaxlora.models.dropout`).
    """
    chosen = rows_of_step(step)
    batch = layout.at(step).build([rows[i] for i in chosen])
    if dropout_seed is None:
        return batch
    words = row_words(dropout_seed, step, chosen)
    return batch | {"dropout": spread(batch, words[layout.order([rows[i] for i in chosen])])}


def ahead(build: Callable[[int], Batch], steps: range) -> Iterator[tuple[int, Batch]]:
    """`(step, build(step))` for these steps, prepared by background threads."""
    data = grain.MapDataset.range(steps.start, steps.stop).map(lambda step: (int(step), build(int(step))))
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def validation_batches(rows: Sequence[RenderedRow], layout: Layout) -> Iterator[Batch]:
    """All rows once, in file order, `layout.batch_rows` at a time; the last batch may be short."""
    starts = grain.MapDataset.range(0, len(rows), layout.batch_rows)
    data = starts.map(lambda start: layout.build(rows[int(start) : int(start) + layout.batch_rows]))
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def ranges(n_rows: int, batch_rows: int) -> list[range]:
    """Row numbers of consecutive batches."""
    return [range(start, min(start + batch_rows, n_rows)) for start in range(0, n_rows, batch_rows)]
