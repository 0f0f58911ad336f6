"""Which runs are trained together, how many at once, and what a group's step takes.

    for group in groups(jobs, size=None):        # as many at once as should be fastest
        results = train_group(group)

Runs share a group if they differ in nothing but seed, peak learning rate and name: then each is as large as
the others, has the same rows, and ends at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from jaxlora.config import LoraConfig, OptimConfig, RunConfig, TrainConfig
from jaxlora.data.batches import step_batch, validation_batches
from jaxlora.data.packing import Batch
from jaxlora.runtime.errors import UserError
from jaxlora.train.fused import group_spec, member_state, stack_batches, stack_members
from jaxlora.train.job import Job
from jaxlora.train.member import Member
from jaxlora.train.schedule import learning_rate
from jaxlora.train.step import TrainState, make_eval_step, make_train_step


def groups(jobs: Sequence[Job], size: int | None) -> list[list[Job]]:
    """The runs in groups of at most `size`, as equal as can be; None: of one."""
    found: list[list[Job]] = []
    for alike in _alike(jobs):
        parts = math.ceil(len(alike) / (size or 1))
        found += [list(part) for part in _split(alike, parts)]
    return found


def _alike(jobs: Sequence[Job]) -> list[list[Job]]:
    """The runs by what must not differ, in the order of their first."""
    by_kind: list[tuple[RunConfig, list[Job]]] = []
    for job in jobs:
        kind = _without_free(job.config)
        same = [alike for other, alike in by_kind if other == kind and not kind.lora.output_head]
        same[0].append(job) if same else by_kind.append((kind, [job]))
    return [alike for _, alike in by_kind]


def _split(jobs: Sequence[Job], parts: int) -> Iterator[Sequence[Job]]:
    ends = [round(len(jobs) * i / parts) for i in range(parts + 1)]
    return (jobs[start:end] for start, end in pairwise(ends))


def check_group(configs: Sequence[RunConfig]) -> None:
    """Refuse runs that cannot share a step: of other bases, other validation rows, another Adam.

    Raises:
      UserError: names the first two.
    """
    first = configs[0]
    for other in configs[1:]:
        if _shared(first) != _shared(other) or first.run_dir == other.run_dir:
            names = f"{first.run_id} and {other.run_id}"
            raise UserError(f"{names} cannot be trained in one program; give --config.sweep.fused=1")
        if first.lora.output_head or other.lora.output_head:
            raise UserError("config.lora.output_head: a run with it is trained alone; give sweep.fused=1")


def _without_free(config: RunConfig) -> RunConfig:
    """What must not differ for runs to be put into one group."""
    seed = config.seed if config.model.random_weights else 0  # then it draws the base, too
    optim = replace(config.optim, peak_lr=1.0)
    return replace(config, name=None, seed=seed, overwrite=False, optim=optim)


def _shared(config: RunConfig) -> RunConfig:
    """What must not differ for runs to be trained together at all."""
    optim = OptimConfig(b1=config.optim.b1, b2=config.optim.b2, eps=config.optim.eps)
    train = TrainConfig(validation_batch_rows=config.train.validation_batch_rows, layout=config.train.layout)
    return replace(
        _without_free(config), prefix="", results_dir="", lora=LoraConfig(), optim=optim, train=train
    )


class Group:
    """Members at the same step that take their steps together, on one state.

    The members' own states are gone meanwhile: a step is given its state's buffers.
    """

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        self.jobs = [member.job for member in members]
        self._specs = [job.spec for job in self.jobs]
        self._alone = len(members) == 1
        states = [member.state for member in members]
        for member in members:
            del member.state
        self.spec = self._specs[0] if self._alone else group_spec(self._specs)
        self.state = states[0] if self._alone else stack_members(states, self._specs)

    @property
    def on_their_way(self) -> list[Member]:
        """The members that have not diverged."""
        return [member for member in self.members if member.outcome is None]

    def state_of(self, member: Member) -> TrainState:
        """The member's own state, as its lone run would hold it."""
        i = self.members.index(member)
        return self.state if self._alone else member_state(self.state, i, self._specs[i])

    def programs(self):
        """The jitted training step and validation step."""
        first, optim = self.jobs[0], self.jobs[0].config.optim
        train = [job.compute(job.train_layout) for job in self.jobs]
        most = max(compute.max_segments for compute in train)
        evaluation = make_eval_step(self.spec, first.compute(first.validation_layout))
        return make_train_step(self.spec, optim, replace(train[0], max_segments=most)), evaluation

    def batch(self, step: int) -> Batch:
        """Every member's rows of a step."""
        return stack_batches([step_batch(j.train_rows, j.plan, j.train_layout, step) for j in self.jobs])

    def rates(self, step: int) -> np.ndarray:
        """Learning rates of a step: float32, a scalar or `[members]`."""
        rates = [learning_rate(step, job.config.optim, job.plan) for job in self.jobs]
        return np.asarray(rates[0] if self._alone else rates, np.float32)

    def validation_batches(self) -> Iterator[Batch]:
        """The validation rows, the same for every member."""
        first = self.jobs[0]
        for batch in validation_batches(first.validation_rows, first.validation_layout):
            yield stack_batches([batch] * len(self.members))
