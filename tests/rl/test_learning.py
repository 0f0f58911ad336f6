"""From groups of answers to rows, buffers and numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxlora.config import RLConfig, TrainConfig
from jaxlora.rl.learning import (
    batch_statistics,
    buffers_of,
    most_segments,
    parts_of,
    ratio_statistics,
    rows_of,
)
from jaxlora.rl.problems import Problem
from jaxlora.rl.rewards import Graded
from jaxlora.rl.sampling import Episode, Group, episode_keys

END = 3


def group(rewards, position=0, lengths=None, truncated=()) -> Group:
    lengths = lengths or [4 + i for i in range(len(rewards))]
    episodes = tuple(
        Episode(
            [10 + i] * (n - 1) + [END],
            (-0.1 * np.arange(1, n + 1)).tolist(),
            i in truncated,
            "",
            Graded(reward, reward >= 1, True),
        )
        for i, (reward, n) in enumerate(zip(rewards, lengths, strict=True))
    )
    return Group(position, Problem(f"p{position}", [], "1", {}), [5, 6, 7], episodes)


def test_a_row_is_the_prompt_without_weight_and_the_answer_with_its_end_token():
    ((first, second),) = rows_of([group([1.0, 0.0])], RLConfig(group=2))
    np.testing.assert_array_equal(first.tokens, [5, 6, 7, 10, 10, 10, END])
    np.testing.assert_array_equal(first.weights, [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(first.extras["advantages"], [0, 0, 0, 0.5, 0.5, 0.5, 0.5])
    recorded = np.array([0, 0, 0, -0.1, -0.2, -0.3, -0.4], np.float32)
    np.testing.assert_allclose(first.extras["sampler_logprobs"], recorded)
    assert second.extras["advantages"][-1] == -0.5


def test_constant_groups_have_no_rows():
    groups = [group([1.0, 1.0], 0), group([0.0, 1.0], 1), group([0.1, 0.1], 2)]
    assert [own[0].row_id for own in rows_of(groups, RLConfig())] == ["p1/0"]


def test_truncated_answers_are_kept_unless_they_are_masked():
    groups = [group([1.0, 0.0, 0.0], truncated=(2,))]
    assert len(rows_of(groups, RLConfig())[0]) == 3
    masked = rows_of(groups, RLConfig(mask_truncated=True))[0]
    assert [row.row_id for row in masked] == ["p0/0", "p0/1"]
    assert masked[0].extras["advantages"][-1] == 0.5  # the baseline is of those that count


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_row_is_in_one_buffer_with_its_numbers(layout):
    rng = np.random.default_rng(0)
    groups = [group([0.0, 1.0], i, rng.integers(2, 120, 2).tolist()) for i in range(40)]
    rows = [row for own in rows_of(groups, RLConfig()) for row in own]
    buffers = buffers_of(rows, TrainConfig(layout=layout, buffer_multiple=32, max_buffer_tokens=512), 1)
    assert sum(float(b["weights"].sum()) for b in buffers) == sum(float(row.weights.sum()) for row in rows)
    for name in ("advantages", "sampler_logprobs"):
        total = sum(float(b[name].astype(np.float64).sum()) for b in buffers)
        assert total == pytest.approx(sum(row.extras[name].sum(dtype=np.float64) for row in rows), abs=1e-3)
    assert all(b["tokens"].shape[0] == 1 and b["tokens"].size <= 512 for b in buffers)
    if layout == "packed":
        real = sum(row.n_tokens for row in rows)
        assert real / sum(b["tokens"].size for b in buffers) > 0.95
        assert len({b["tokens"].shape for b in buffers}) <= 3
        most = most_segments(buffers)
        assert most >= max(int(b["segment_ids"].max()) for b in buffers)
        assert most & (most - 1) == 0


def test_a_batch_is_cut_in_parts_of_whole_groups():
    assert parts_of(list(range(5)), 2) == [[0, 1], [2, 3, 4]]
    assert parts_of([1], 3) == [[1]]
    assert parts_of([], 2) == []


def test_ratio_statistics_are_the_published_ones():
    batch = {
        "weights": np.array([[[0, 1, 1, 1]]], np.float32),
        "sampler_logprobs": np.array([[[9, -0.7, -1.0, -2.0]]], np.float32),
    }
    found = ratio_statistics([(np.array([[[4, -0.5, -1.2, -2.0]]], np.float32), batch)], 0.8, 1.2)
    assert found["optim/kl_sample_train_v1"] == pytest.approx(0, abs=1e-7)
    assert found["optim/kl_sample_train_v2"] == pytest.approx(0.0133333333, abs=1e-7)
    assert found["ratio/max"] == pytest.approx(1.2214027582, abs=1e-6)
    assert found["ratio/min"] == pytest.approx(0.8187307531, abs=1e-6)
    assert found["ratio/outside"] == pytest.approx(1 / 3)
    assert set(ratio_statistics([], 0.8, 1.2).values()) == {None}


def test_batch_statistics_count_what_was_sampled():
    groups = [group([1.0, 0.0], 0, truncated=(1,)), group([1.0, 1.0], 1)]
    found = batch_statistics(groups[:1], groups, RLConfig())
    assert found["reward/mean"] == 0.75
    assert found["group/constant"] == 0.5
    assert found["group/all_correct"] == 0.5
    assert found["group/learned"] == 1
    assert found["episode/truncated"] == 0.25
    assert found["bits/available"] == 2
    assert found["sampled_tokens"] == 18
    assert found["prompt_tokens"] == 6
    logprobs = np.concatenate([np.asarray(one.logprobs) for own in groups for one in own.episodes])
    assert found["optim/entropy"] == pytest.approx(-logprobs.mean())


def test_random_numbers_follow_from_seed_step_place_and_sample_alone():
    whole = episode_keys(3, 7, range(4), 5).reshape(4, 5, 2)
    np.testing.assert_array_equal(whole[2:4], episode_keys(3, 7, [2, 3], 5).reshape(2, 5, 2))
    np.testing.assert_array_equal(whole[:, :2], episode_keys(3, 7, range(4), 2).reshape(4, 2, 2))
    others = [episode_keys(*pair, range(4), 5) for pair in ((3, 8), (4, 7), (7, 3))]
    every = np.concatenate([whole.reshape(-1, 2), *others])
    assert len(np.unique(every, axis=0)) == len(every)


def test_a_graded_group_knows_its_rewards():
    one = group([1.0, 0.25])
    np.testing.assert_array_equal(one.rewards, [1, 0.25])
    assert replace(one, position=4).tokens == 9
