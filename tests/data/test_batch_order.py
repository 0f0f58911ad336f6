"""Promises of order: a pure function of seed, epoch and step; no prompt is in both train and validation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxlora.data.batches import rows_of_step, shuffled, split_validation
from jaxlora.data.render import load_tokenizer, render_batch
from jaxlora.runtime.errors import UserError

PINNED = [0, 6, 5, 8, 1, 9, 3, 2, 7, 4]  # must never change: runs are resumed in it


def epoch_of(seed, n_rows, batch_rows, epoch):
    steps = -(-n_rows // batch_rows)
    return [list(rows_of_step(seed, n_rows, batch_rows, epoch * steps + i + 1)) for i in range(steps)]


@pytest.mark.parametrize(("n_rows", "batch_rows"), [(10, 3), (12, 3), (1, 1), (100, 7), (5, 5)])
def test_each_row_once_an_epoch_in_batches_of_one_size(n_rows, batch_rows):
    for seed, epoch in itertools.product((None, 0, 1), range(3)):
        batches = epoch_of(seed, n_rows, batch_rows, epoch)
        assert sorted(itertools.chain(*batches)) == list(range(n_rows))
        assert all(len(batch) == batch_rows for batch in batches[:-1])


def test_without_a_seed_it_is_the_order_of_the_file():
    for epoch in range(3):
        assert list(itertools.chain(*epoch_of(None, 10, 3, epoch))) == list(range(10))


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {tuple(shuffled(200, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_step_needs_no_step_before_it():
    later = rows_of_step(3, 1000, 8, 777)
    shuffled.cache_clear()
    assert rows_of_step(3, 1000, 8, 777) == later


def test_an_order_is_the_same_for_ever():
    assert shuffled(10, 0, 0).tolist() == PINNED


def test_it_is_shuffled_well():
    """Each row is at each place about as often, and neighbours do not stay together."""
    orders = np.stack([shuffled(10, seed, 0) for seed in range(4000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=10) for place in range(10)])
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 140  # 81 degrees of freedom: above it once in 20,000
    together = np.mean(np.abs(np.diff(orders, axis=1)) == 1)
    assert together == pytest.approx(0.2, abs=0.01)


def test_nobody_can_change_the_order_that_is_kept():
    with pytest.raises(ValueError, match="read-only"):
        shuffled(10, 0, 0)[0] = 5


class TestValidation:
    PROMPTS = tuple(f"p{i % 300}" for i in range(1000))

    def test_no_prompt_straddles_and_no_row_is_lost(self):
        train, validation = split_validation(self.PROMPTS, 0.1, seed=0)
        assert sorted(train + validation) == list(range(1000))
        assert not {self.PROMPTS[i] for i in train} & {self.PROMPTS[i] for i in validation}
        assert len(validation) == pytest.approx(100, abs=3)
        assert (train, validation) == (sorted(train), sorted(validation))

    def test_the_seed_decides_and_nothing_else(self):
        assert split_validation(self.PROMPTS, 0.1, 0) == split_validation(self.PROMPTS, 0.1, 0)
        assert split_validation(self.PROMPTS, 0.1, 0) != split_validation(self.PROMPTS, 0.1, 1)
        turned = self.PROMPTS[::-1]
        one = {self.PROMPTS[i] for i in split_validation(self.PROMPTS, 0.1, 0)[1]}
        assert one == {turned[i] for i in split_validation(turned, 0.1, 0)[1]}

    def test_a_prompt_of_many_rows_does_not_take_more_than_its_share(self):
        prompts = ["often"] * 900 + [f"p{i}" for i in range(100)]
        for seed in range(10):
            assert len(split_validation(prompts, 0.05, seed)[1]) == 50

    def test_at_least_one_prompt_is_drawn(self):
        assert len(split_validation(["a", "a", "b", "b"], 0.01, 0)[1]) == 2

    @pytest.mark.parametrize(
        ("prompts", "fraction", "reason"),
        [
            (["a", "b"], 0.0, "above 0 and below 1"),
            (["a", "b"], 1.0, "above 0 and below 1"),
            (["a", "b"], float("nan"), "above 0 and below 1"),
            (["a", "a"], 0.5, "all rows have the same prompt"),
            ([], 0.5, "all rows have the same prompt"),
        ],
    )
    def test_what_cannot_be_split_is_one_line(self, prompts, fraction, reason):
        with pytest.raises(UserError, match=reason):
            split_validation(prompts, fraction, 0)

    def test_rows_of_one_question_have_one_prompt(self):
        def row(question, answer="4", *before):
            return "x", [
                *before,
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]

        more = [{"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "5"}]
        system = {"role": "system", "content": "Be kind."}
        first, second = row("What is 2 + 2?"), row("What is 2 + 3?")
        same = [
            first,
            row("what  is 2 + 2?\n"),
            row("What is 2 + 2?", "four"),
            row("What is 2 + 2?", "4", system),
        ]
        same.append(("x", [*first[1], *more]))
        rendered = render_batch(load_tokenizer("embedded:base"), [*same, second])
        assert len({row.prompt_id for row in rendered[:-1]}) == 1
        assert rendered[-1].prompt_id != rendered[0].prompt_id
