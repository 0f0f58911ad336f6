"""Prompts are read longest answers first, and as many at once as a prefill holds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.generate.order import PAGE, order_of, packed_line, packed_tokens, take_packed

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


def test_the_longest_answers_are_read_first():
    assert order_of([5, 9, 2], expected=[100, 50, 200])[::-1] == [2, 0, 1]
    assert order_of([5, 9, 2])[::-1] == [1, 0, 2]  # unknown: longer prompts first


def test_padded_prompts_are_sorted_within_pages_of_equal_promise():
    rng = np.random.default_rng(0)
    lengths, expected = rng.integers(1, 100, 300).tolist(), rng.integers(1, 500, 300).tolist()
    order, batch, first = order_of(lengths, expected, batch=4, first=64)[::-1], 4, 64
    assert sorted(order) == list(range(300))
    pages = [order[:first], *(order[i : i + PAGE * batch] for i in range(first, 300, PAGE * batch))]
    for page, following in pairwise(pages):
        assert min(expected[i] for i in page) >= max(expected[i] for i in following)
    for page in pages:
        assert [lengths[i] for i in page] == sorted((lengths[i] for i in page), reverse=True)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 10), st.booleans())
def test_a_packed_prefill_holds_what_it_takes_from_the_queues_end(lengths, free, rows, idle):
    tokens, queue = packed_tokens(lengths), list(range(len(lengths)))
    taken = take_packed(queue, lengths, free, rows, tokens, idle)
    numbers = [i for own in taken for i in own]
    assert sorted(numbers) == queue[len(queue) - len(numbers) :]
    for own, slots in zip(taken, free, strict=True):
        assert len(own) <= min(slots, rows)
        assert sum(lengths[i] for i in own) <= tokens
    if idle and any(free):
        assert numbers  # something always goes on


def test_a_nearly_empty_prefill_waits_while_others_run():
    lengths = [10] * 50
    queue = list(range(50))
    assert take_packed(queue, lengths, [3], rows=64, tokens=200, idle=False) == [[]]
    assert take_packed(queue, lengths, [3], rows=64, tokens=200, idle=True) == [[49, 48, 47]]
    assert take_packed(queue, lengths, [16], rows=64, tokens=200, idle=False) == [queue[:33:-1]]
    assert take_packed([0, 1], lengths, [3], rows=64, tokens=200, idle=False) == [[1, 0]]  # the last ones


def test_a_packed_line_says_where_each_token_goes():
    line = packed_line([[7, 8, 9], [5]], np.array([4, 2]), tokens=6, rows=3, nowhere=16)
    assert line["tokens"].tolist() == [[7, 8, 9, 5, 0, 0]]
    assert line["positions"].tolist() == [[0, 1, 2, 0, 0, 0]]
    assert line["segment_ids"].tolist() == [[1, 1, 1, 2, 0, 0]]
    assert line["slots"].tolist() == [[4, 4, 4, 2, 16, 16]]
    assert line["ends"].tolist() == [2, 3, 0]
