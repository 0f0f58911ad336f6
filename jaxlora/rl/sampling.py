"""Sample answers to problems on the learner's own base, in groups, and grade them.

    sampler = Sampler(job, frozen)
    groups = sampler.groups(trained, step=1, positions=range(32))     # ungraded, `group` answers each
    groups = grade_groups(groups, grader)                             # with rewards
    texts = sampler.greedy(trained, prompts)

The base is on the device only once: the sampler reads the learner's arrays and applies the adapter
separately, so no part of an update is lost to rounding in a merged sum. (If `fsdp` splits the learner's base,
the sampler keeps a copy, split by heads; see `jaxlora.rl.mesh`.) Every random draw is determined by the seed,
the step, the problem's position in the problem stream, and the answer's number in its group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.generate.decode import GREEDY, Generation, generate
from jaxlora.generate.weights import decode_adapter, decode_weights
from jaxlora.models.attention import decode_backend
from jaxlora.models.decoder import Tree
from jaxlora.rl.job import RLJob
from jaxlora.rl.mesh import sampling_of
from jaxlora.rl.problems import Problem
from jaxlora.rl.rewards import Graded, Grader
from jaxlora.runtime import hosts


@dataclass(frozen=True)
class Episode:
    """One answer: its tokens (with the end token, if reached), their log-probabilities as drawn, its text."""

    tokens: list[int]
    logprobs: list[float]
    truncated: bool
    text: str
    graded: Graded | None = None


@dataclass(frozen=True)
class Group:
    """The answers to one problem. `position` is its position in the problem stream."""

    position: int
    problem: Problem
    prompt: list[int]
    episodes: tuple[Episode, ...]

    @property
    def rewards(self) -> np.ndarray:
        """float64 `[answers]`."""
        return np.array([one.graded.reward for one in self.episodes if one.graded], np.float64)

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return sum(len(one.tokens) for one in self.episodes)


class Sampler:
    """Samples from the current trained weights, over a base that stays in place."""

    def __init__(self, job: RLJob, frozen: Tree, tail_slots: Sequence[int] | None = None):
        """`tail_slots` as in `jaxlora.generate.decode.generate`."""
        self._job, self._frozen, self._tails = job, frozen, tail_slots
        self._base: tuple[Any, Tree, Any] | None = None  # cached with an adapter: form, weights, mesh

    def groups(
        self,
        trained: Tree,
        step: int,
        positions: Sequence[int],
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Group]:
        """Sample `rl.group` answers to each problem at these positions of the stream.

        Args:
          limits: maximum tokens of each answer; None: `rl.max_new_tokens`.
        """
        job, rl = self._job, self._job.config.rl
        chosen = [job.at(position) for position in positions]
        answers = self._generate(
            trained,
            [job.prompts[i] for i in chosen],
            sampling=sampling_of(rl),
            keys=episode_keys(job.config.seed, step, positions, rl.group),
            repeats=rl.group,
            limits=limits,
            progress=progress,
        )
        episodes = [self._episode(answer) for answer in answers]
        return [
            Group(position, job.problems[i], job.prompts[i], tuple(episodes[n * rl.group :][: rl.group]))
            for n, (position, i) in enumerate(zip(positions, chosen, strict=True))
        ]

    def greedy(
        self,
        trained: Tree,
        prompts: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Episode]:
        """The greedy answer to each prompt."""
        answers = self._generate(trained, prompts, sampling=GREEDY, progress=progress)
        return [self._episode(answer) for answer in answers]

    def _generate(self, trained: Tree, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generation]:
        job = self._job
        spec, lora, weights, mesh = self.decoding(trained)
        with jax.set_mesh(mesh):
            return generate(
                spec,
                lora,
                weights,
                prompts,
                stop_ids=job.stop_ids,
                max_new_tokens=job.config.rl.max_new_tokens,
                slots=job.config.rl.slots,
                tail_slots=self._tails,
                backend=decode_backend(spec.dtype, job.config.model.attention),
                **options,
            )

    def decoding(self, trained: Tree) -> tuple[Any, Tree, Tree, Any]:
        """Model, adapter, weights and mesh. A frozen base is converted once, trained weights each time."""
        spec = self._job.spec
        if spec.full:
            with jax.set_mesh(self._job.mesh):
                return decode_weights(spec, trained, {}, merge=False, shares=True)
        if self._base is None:
            with jax.set_mesh(self._job.mesh):
                form, _, weights, mesh = decode_weights(spec, trained, self._frozen, merge=False, shares=True)
            self._base = form, weights, mesh
        form, weights, mesh = self._base
        return form, decode_adapter(form, trained, mesh), weights, mesh

    def _episode(self, answer: Generation) -> Episode:
        stopped = answer.stop_reason == "stop"
        ids = answer.tokens[:-1] if stopped else answer.tokens
        text = str(self._job.tokenizer.decode(ids))
        return Episode(answer.tokens, answer.logprobs or [], not stopped, text)


def grade_groups(groups: Sequence[Group], grader: Grader) -> list[Group]:
    """The groups with the rewards of their answers."""
    problems = [group.problem for group in groups for _ in group.episodes]
    graded = iter(grade(problems, [one for group in groups for one in group.episodes], grader))
    return [replace(group, episodes=tuple(next(graded) for _ in group.episodes)) for group in groups]


def grade(problems: Sequence[Problem], episodes: Sequence[Episode], grader: Grader) -> list[Episode]:
    """The episodes with their rewards; `problems` has the problem of each.

    With several processes only the main one grades, because time limits may strike differently.
    """
    found = None
    if hosts.is_main():
        pairs = zip(problems, episodes, strict=True)
        found = grader.grade([(problem, one.text, one.truncated) for problem, one in pairs])
    if hosts.n_processes() > 1:
        told = [vars(one) for one in found] if found is not None else None
        found = [Graded(**one) for one in hosts.broadcast(told)]
    assert found is not None
    return [replace(one, graded=graded) for one, graded in zip(episodes, found, strict=True)]


def episode_keys(seed: int, step: int, positions: Sequence[int], group: int) -> np.ndarray:
    """Raw PRNG keys for a batch, uint32 `[positions * group, 2]`."""
    keys = _keys(np.uint32(seed), np.uint32(step), np.asarray(positions, np.uint32), group)
    return np.asarray(keys).reshape(-1, 2)


@partial(jax.jit, static_argnums=3)
def _keys(seed: jax.Array, step: jax.Array, positions: jax.Array, group: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), step)
    by_position = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
    by_sample = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(group)))
    return jax.random.key_data(by_sample(by_position))


def shared_bytes(base: Tree, others: Tree) -> tuple[int, int]:
    """Bytes of a base on this process's devices, and the bytes that another tree adds to them."""

    def buffers(tree: Tree) -> dict[tuple[int, int], int]:
        shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
        return {(one.device.id, one.data.unsafe_buffer_pointer()): one.data.nbytes for one in shards}

    own, theirs = buffers(base), buffers(others)
    return sum(own.values()), sum(size for place, size in theirs.items() if place not in own)
