"""Batches of a run, in an order that is a pure function of the step, built ahead of use by grain.

    build = partial(step_batch, rows, plan.rows_of_step, layout)
    for step, batch in ahead(build, range(1, 101)): ...     # batch: numpy arrays [buffers, lines, length]

Nothing is shuffled: a step's rows follow from its number alone, so a resumed run reads what the undisturbed
run would have read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grain.python as grain

from jaxlora.config import TrainConfig
from jaxlora.data.order import row_words
from jaxlora.data.packing import Batch, choose_sizes, largest_buffer, pack, pad, round_up, spread
from jaxlora.data.render import RenderedRow


@dataclass(frozen=True)
class Layout:
    """How rows become buffers: `sizes` are the few buffer lengths that a program is compiled for."""

    packed: bool
    sizes: tuple[int, ...]
    batch_rows: int
    max_buffer_tokens: int

    def build(self, rows: Sequence[RenderedRow]) -> Batch:
        if self.packed:
            return pack(rows, self.sizes, self.max_buffer_tokens)
        return pad(rows, self.sizes, self.batch_rows)


def choose_layout(
    rows: Sequence[RenderedRow],
    batches: Sequence[Sequence[int]],
    batch_rows: int,
    train: TrainConfig,
    multiple: int,
) -> Layout:
    """The layout for these batches of rows; buffer lengths are multiples of `multiple`.

    Args:
      batches: row numbers of each batch.
      multiple: what the device mesh asks of a buffer's length; `buffer_multiple` is rounded up to it.
    """
    multiple = round_up(train.buffer_multiple, multiple)
    if train.layout == "padded":
        totals = [max(rows[i].n_tokens for i in batch) for batch in batches]
    else:
        lengths = [[rows[i].n_tokens for i in batch] for batch in batches]
        totals = [largest_buffer(part, train.max_buffer_tokens) for part in lengths]
    sizes = choose_sizes(totals, train.buffer_sizes, multiple)
    return Layout(train.layout == "packed", sizes, batch_rows, train.max_buffer_tokens)


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
    batch = layout.build([rows[i] for i in chosen])
    if dropout_seed is None:
        return batch
    return batch | {"dropout": spread(batch, row_words(dropout_seed, step, chosen))}


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
