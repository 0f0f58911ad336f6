"""In which order rows are read, and which are kept for validation: pure functions of a seed.

    order = shuffled(n_rows=25348, seed=0, epoch=1)                # every row once, another order each epoch
    rows_of_step(order_seed=0, n_rows=25348, batch_rows=8, step=3170)
    train, validation = split_validation(prompt_ids, fraction=0.05, seed=0)

Nothing is remembered between steps, so a resumed run reads what the undisturbed run would have read. The
random numbers are written out here, in integer arithmetic, so that no version of a library changes an order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from jaxlora.runtime.errors import UserError


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
        raise UserError("data.validation_fraction: all rows have one prompt; give data.validation_path")
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
