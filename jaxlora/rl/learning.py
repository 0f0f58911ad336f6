"""From graded groups of answers to optimizer steps, and the numbers that say how they went.

    learner = Learner(job, frozen)
    state, found = learner.learn(state, groups, rate)          # found: the batch's metrics

An answer's row is its prompt without weight and its sampled tokens, the end token among them, with their
advantage and the log-probabilities that the sampler recorded. Groups whose rewards are constant have no rows:
exactly no gradient. A batch of nothing else takes no step, and Adam's moments stay as they are. How rows lie
in buffers never changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.config import RLConfig, TrainConfig
from jaxlora.data.packing import Batch, in_lines, pad, power_of_two, round_up
from jaxlora.data.render import RenderedRow
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.rl.advantages import advantages, bits, is_constant
from jaxlora.rl.mesh import is_dense, shares_prompts
from jaxlora.rl.sampling import Group
from jaxlora.rl.shared_buffers import shared_buffers
from jaxlora.runtime import hosts
from jaxlora.sharding import place_batch, token_multiple
from jaxlora.train.objective import Loss, extras_of
from jaxlora.train.step import (
    Compute,
    Machine,
    TrainState,
    make_gradient_step,
    make_logprob_step,
    make_update_step,
)

MAX_ROWS = 256  # of one packed buffer
# Log-probabilities that can be recorded. Noise in float32 draws no token that is 21 nats less likely than the
# likeliest one, which no vocabulary makes rarer than 15; above 0 is what rounding leaves.
LEAST, ROUNDED = -50.0, 0.01
SIZES = 1, 1 / 2, 1 / 4  # of a packed buffer, as parts of a whole one: few programs
QUARTERS = 1, 3 / 4, 1 / 2, 1 / 4  # the same where it has copies of prompts as long as a whole one


# --- Rows and buffers ---------------------------------------------------------------------------------------


def rows_of(groups: Sequence[Group], rl: RLConfig) -> list[list[RenderedRow]]:
    """The rows of each group that can teach anything, group by group."""
    found = []
    for group in groups:
        valid = counted(group, rl)
        if not is_constant(group.rewards, valid):
            own = advantages_of(group, rl)
            found.append([_row(group, i, own[i]) for i in range(len(own)) if valid[i]])
    return found


def advantages_of(group: Group, rl: RLConfig) -> np.ndarray:
    """float64 `[answers]`: what each answer's tokens are learned with."""
    return advantages(
        group.rewards,
        counted(group, rl),
        np.array([len(one.tokens) for one in group.episodes]),
        baseline=rl.baseline,
        divide_by_std=rl.divide_by_std,
        divide_by_length=rl.divide_by_length,
    )


def counted(group: Group, rl: RLConfig) -> np.ndarray:
    """bool `[answers]`: those that are compared and learned from."""
    return np.array([not (rl.mask_truncated and one.truncated) for one in group.episodes])


def _row(group: Group, i: int, advantage: float) -> RenderedRow:
    episode, before = group.episodes[i], len(group.prompt)
    tokens = np.array([*group.prompt, *episode.tokens], np.int32)
    weights = (np.arange(len(tokens)) >= before).astype(np.float32)
    logprobs = np.zeros(len(tokens), np.float32)
    logprobs[before:] = episode.logprobs
    extras = {"advantages": weights * np.float32(advantage), "sampler_logprobs": logprobs}
    return RenderedRow(f"{group.problem.id}/{i}", tokens, weights, str(group.position), extras)


def parts_of(groups: Sequence[Any], n: int) -> list[list[Any]]:
    """The groups in `n` parts of nearly equal size, in order; empty ones are left out."""
    cuts = [len(groups) * i // n for i in range(n + 1)]
    return [list(groups[a:b]) for a, b in pairwise(cuts) if b > a]


def buffers_of(
    rows: Sequence[RenderedRow],
    train: TrainConfig,
    multiple: int,
    shares: bool = False,
    lines: int = 1,
    dense: bool = False,
) -> list[Batch]:
    """The rows in buffers `[1, lines, length]` of few shapes, and little padding: longest rows first, each in
    the first line with room (packed), or rows of like length together (padded).

    Args:
      shares: packed rows of one prompt share it.
      lines: of a packed buffer.
      dense: as of `shared_buffers`.
    """
    multiple = round_up(train.buffer_multiple, multiple)
    ordered = sorted(rows, key=lambda row: -row.n_tokens)
    whole = round_up(max(train.max_buffer_tokens, ordered[0].n_tokens), multiple)
    if train.layout == "packed":
        parts_of_whole = QUARTERS if shares and dense else SIZES
        sizes = sorted({round_up(math.ceil(whole * part), multiple) for part in parts_of_whole})
        if shares:
            return shared_buffers(rows, sizes, MAX_ROWS, multiple, dense)
        parts = _fitted(ordered, whole)
        return [in_lines([parts[i : i + lines]], sizes, lines) for i in range(0, len(parts), lines)]
    found, rest = [], ordered
    while rest:
        length = round_up(rest[0].n_tokens, multiple)
        lines = max(1, train.max_buffer_tokens // length)
        found.append(pad(rest[:lines], (length,), lines))
        rest = rest[lines:]
    return found


def _fitted(ordered: Sequence[RenderedRow], size: int) -> list[list[RenderedRow]]:
    """First fit, of rows in falling length."""
    parts: list[list[RenderedRow]] = []
    room: list[int] = []
    for row in ordered:
        fits = (i for i, left in enumerate(room) if left >= row.n_tokens and len(parts[i]) < MAX_ROWS)
        i = next(fits, len(parts))
        if i == len(parts):
            parts.append([])
            room.append(size)
        parts[i].append(row)
        room[i] -= row.n_tokens
    return parts


def most_segments(buffers: Sequence[Batch]) -> int:
    """At least the rows of the fullest line: a power of two, so that few programs are compiled. Attention
    kernels look at so many places for rows, whether they are there or not."""
    most = max(int(batch["segment_ids"].max()) for batch in buffers)
    return 1 if most == 1 else power_of_two(most, 16)


# --- Steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What the updates of one batch found."""

    updates: int  # optimizer steps
    rows: int
    tokens: int  # prompts and answers
    computed: int  # the same where answers share their prompt: with what they share once
    loss: float | None  # the objective per action token
    grad_norm: float | None  # the largest of the updates
    update_norm: float | None
    ratios: dict[str, float | None]  # of learner and sampler, see `ratio_statistics`


class Learner:
    """Gradients and updates over groups of answers: the programs of supervised training."""

    def __init__(
        self,
        spec: ModelSpec,
        machine: Machine,
        config: Any,
        loss: Loss,
        frozen: Tree,
        segments: int | None = None,
    ):
        """`segments`: places for rows in a line; None: as a batch needs them, a program for each number."""
        self.spec, self.machine, self.config, self.loss, self.frozen = spec, machine, config, loss, frozen
        self._segments = segments

    def learn(self, state: TrainState, groups: Sequence[Group], rate: float) -> tuple[TrainState, Learned]:
        """The optimizer steps of one batch; `state` is donated."""
        rl = self.config.rl
        update_step = make_update_step(self.spec, self.config.optim)
        learning = rows_of(groups, rl)
        parts = parts_of(learning, rl.updates_per_batch)
        found: list[Any] = []
        norms: list[dict[str, jax.Array]] = []
        for part in parts:
            grads, values = self.gradient(state, [row for group in part for row in group])
            state, of_part = update_step(state, grads, jnp.float32(rate))
            norms.append(of_part)
            found += values
        loss = sum(float(hosts.whole(value)) for value, *_ in found)
        ratios = ratio_statistics(
            [(hosts.whole(lp), batch) for _, lp, batch in found], rl.clip_low, rl.clip_high
        )
        rows = [row for group in learning for row in group]
        actions = sum(float(row.weights.sum()) for row in rows)
        return state, Learned(
            updates=len(parts),
            rows=len(rows),
            tokens=sum(row.n_tokens for row in rows),
            computed=sum(int(np.count_nonzero(batch["segment_ids"])) for *_, batch in found),
            loss=loss / actions if rows else None,
            grad_norm=_largest([found["grad_norm"] for found in norms]),
            update_norm=_largest([found["update_norm"] for found in norms]),
            ratios=ratios,
        )

    def gradient(self, state: TrainState, rows: Sequence[RenderedRow]) -> tuple[Tree, list[Any]]:
        """The gradient summed over rows; of each buffer its loss, log-probabilities, and what was in it."""
        buffers = self.buffers(rows)
        segments = self._segments or most_segments(buffers)
        longest_row = power_of_two(max(row.n_tokens for row in rows), 256)
        compute = self.machine.compute(segments, longest_row)
        step = make_gradient_step(self.spec, compute, self.loss, "weighted")
        grads = jax.tree.map(jnp.zeros_like, state.trained)
        found = []
        for batch in buffers:
            placed = place_batch(self.machine.mesh, batch)
            if "reference_logprobs" in extras_of(self.loss):
                placed["reference_logprobs"] = self._reference(placed, compute)
            grads, value, logprobs = step(state.trained, grads, self.frozen, placed)
            found.append((value, logprobs, batch))
        return grads, found

    def buffers(self, rows: Sequence[RenderedRow]) -> list[Batch]:
        """The rows in buffers; where it is asked for, and there is one device, those of a prompt share it."""
        mesh = self.machine.mesh
        shares, dense = shares_prompts(self.config, mesh), is_dense(self.machine.backend)
        return buffers_of(rows, self.config.train, token_multiple(mesh), shares, self.machine.lines, dense)

    def _reference(self, placed: Tree, compute: Compute) -> jax.Array:
        """log p under the base alone."""
        base = replace(self.spec, lora=None, shapes=())
        step = make_logprob_step(base, compute, self.loss, "weighted")
        plain = {name: x for name, x in placed.items() if name not in ("advantages", "sampler_logprobs")}
        return step({}, self.frozen, plain)


def _largest(norms: Sequence[jax.Array]) -> float | None:
    return float(np.max([hosts.whole(norm) for norm in norms])) if norms else None


# --- Numbers ------------------------------------------------------------------------------------------------


def impossible(groups: Sequence[Group]) -> float | None:
    """A recorded log-probability that no token can have been drawn with; None: all can."""
    found = np.concatenate([np.asarray(one.logprobs, float) for group in groups for one in group.episodes])
    odd = found[~((found >= LEAST) & (found <= ROUNDED))]
    return float(odd[0]) if odd.size else None


def not_finite(learned: Learned) -> str | None:
    """The numbers of a batch in words, where one of them is more than float32 holds; None: all are sound."""
    told = {
        "loss": learned.loss,
        "gradient norm": learned.grad_norm,
        "update norm": learned.update_norm,
        "largest ratio": learned.ratios["ratio/max"],
        "KL": learned.ratios["optim/kl_sample_train_v2"],
    }
    most = float(np.finfo(np.float32).max)
    if all(value is None or abs(value) <= most for value in told.values()):
        return None
    return ", ".join(f"{name} {value:g}" for name, value in told.items() if value is not None)


def ratio_statistics(
    found: Sequence[tuple[np.ndarray, Batch]], low: float, high: float
) -> dict[str, float | None]:
    """How far learner and sampler are apart over all action tokens, before any clipping.

    Args:
      found: the learner's log-probabilities of each buffer, and the buffer.
      low, high: bounds of the ratio, for the share of tokens outside them.
    """
    names = ("optim/kl_sample_train_v1", "optim/kl_sample_train_v2", "ratio/mean", "ratio/max")
    if not found:
        return dict.fromkeys((*names, "ratio/min", "ratio/outside"))
    used = [(np.asarray(lp), batch) for lp, batch in found]
    gaps = [lp[b["weights"] != 0] - b["sampler_logprobs"][b["weights"] != 0] for lp, b in used]
    gap = np.concatenate(gaps).astype(np.float64)
    with np.errstate(over="ignore"):
        ratio = np.exp(gap)  # infinite where recorded numbers are absurd: see `not_finite`
    values = (-gap.mean(), 0.5 * np.mean(gap**2), ratio.mean(), ratio.max())
    outside = np.mean((ratio < low) | (ratio > high))
    told: dict[str, float | None] = dict(zip(names, map(float, values), strict=True))
    return told | {"ratio/min": float(ratio.min()), "ratio/outside": float(outside)}


def batch_statistics(groups: Sequence[Group], sampled: Sequence[Group], rl: RLConfig) -> dict[str, Any]:
    """What a batch looked like.

    Args:
      groups: those that are learned from.
      sampled: all that were sampled, with those that others took the place of.
    """
    graded = [one.graded for group in sampled for one in group.episodes if one.graded]
    episodes = [one for group in sampled for one in group.episodes]
    lengths = np.array([len(one.tokens) for one in episodes])
    logprobs = np.concatenate([np.asarray(one.logprobs) for one in episodes])
    constant = [is_constant(group.rewards, counted(group, rl)) for group in sampled]
    best = [float(group.rewards.min()) >= 1 for group in sampled]
    return {
        "reward/mean": float(np.mean([one.reward for one in graded])),
        "reward/correct": float(np.mean([one.correct for one in graded])),
        "reward/well_formed": float(np.mean([one.well_formed for one in graded])),
        "reward/failed": sum(one.failed is not None for one in graded),
        "group/constant": float(np.mean(constant)),
        "group/all_correct": float(np.mean(best)),
        "group/learned": sum(not is_constant(group.rewards, counted(group, rl)) for group in groups),
        "episode/count": len(episodes),
        "episode/truncated": float(np.mean([one.truncated for one in episodes])),
        "episode/tokens_mean": float(lengths.mean()),
        "episode/tokens_max": int(lengths.max()),
        "optim/entropy": float(-logprobs.mean()),
        "bits/available": sum(bits(group.rewards) for group in sampled),
        "sampled_tokens": sum(group.tokens for group in sampled),
        "prompt_tokens": sum(len(group.prompt) for group in sampled),
    }
