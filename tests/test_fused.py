"""Members trained together compute what each computes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training_parity import random_rows

from jaxlora.config import LoraConfig, OptimConfig, TrainConfig
from jaxlora.data.packing import Batch, pack, pad
from jaxlora.lora import init_lora
from jaxlora.models.config import ModelConfig
from jaxlora.models.qwen3 import ModelSpec, Tree
from jaxlora.train.fused import group_spec, member_state, stack_batches, stack_members
from jaxlora.train.schedule import RunPlan, learning_rate, plan_run
from jaxlora.train.step import (
    Compute,
    TrainState,
    init_state,
    make_train_step,
)

CONFIG = ModelConfig(
    vocab_size=160,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
ROWS = random_rows(96)
COMPUTE = Compute(max_segments=8)


@dataclass(frozen=True)
class Member:
    """One member of a sweep."""

    lora: LoraConfig
    seed: int = 0
    peak_lr: float = 3e-4
    batch_rows: int = 8

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(peak_lr=self.peak_lr)

    @property
    def plan(self) -> RunPlan:
        return plan_run(self.optim, TrainConfig(batch_rows=self.batch_rows, epochs=1), len(ROWS))

    def spec(self, scan: bool) -> ModelSpec:
        return ModelSpec(CONFIG, self.lora, "float32", scan)

    def rate(self, step: int) -> float:
        return learning_rate(step, self.optim, self.plan)

    def batch(self, step: int, layout: str) -> Batch:
        rows = [ROWS[i] for i in self.plan.rows_of_step(step)]
        return pack(rows, (384, 512), 512) if layout == "packed" else pad(rows, (64,), self.batch_rows)


STUDY = [
    Member(LoraConfig(condition), seed) for condition in ("attention_only", "all_layer") for seed in (0, 1, 2)
]
# Everything that members may differ in; of 96 rows the second makes 16 steps, the others 12.
MIXED = [
    Member(LoraConfig("mlp_only", rank=3, alpha=7.0), seed=4, peak_lr=1e-3),
    Member(LoraConfig("attention_only", rank=8, alpha=32.0), peak_lr=1e-4, batch_rows=6),
    Member(LoraConfig("all_layer", rank=2, alpha=2.0, output_head=True), seed=5, peak_lr=2e-3),
]


@cache
def base(scan: bool) -> Tree:
    """Random weights; the same numbers in both forms of the layers."""
    rng = np.random.default_rng(0)
    spec = ModelSpec(CONFIG, None, "float32", scan=True)

    def draw(path, x) -> np.ndarray:
        return (("norm" in jax.tree_util.keystr(path)) + 0.15 * rng.normal(size=x.shape)).astype(x.dtype)

    frozen = jax.tree.map_with_path(draw, spec.abstract_frozen)
    if not scan:
        frozen["layers"] = {i: jax.tree.map(lambda x, i=i: x[i], frozen["layers"]) for i in range(2)}
    return frozen


@dataclass
class Trained:
    """What a member's training left."""

    curve: np.ndarray  # [steps, metrics]
    state: TrainState


METRICS = ("nll", "weight", "grad_norm", "update_norm")


@cache
def alone(member: Member, layout: str, scan: bool, steps: int = 12) -> Trained:
    spec = member.spec(scan)
    step_fn = make_train_step(spec, member.optim, COMPUTE)
    state, curve = init_state(init_lora(spec, member.seed), member.optim), []
    for step in range(1, steps + 1):
        rate = jnp.float32(member.rate(step))
        state, metrics = step_fn(state, base(scan), member.batch(step, layout), rate)
        curve.append([float(metrics[name]) for name in METRICS])
    return Trained(np.array(curve), state)


def start(members: Sequence[Member], scan: bool) -> TrainState:
    specs = [member.spec(scan) for member in members]
    states = [init_state(init_lora(s, m.seed), m.optim) for s, m in zip(specs, members, strict=True)]
    return stack_members(states, specs)


def steps_of(state: TrainState, members: Sequence[Member], layout: str, scan: bool, steps: Sequence[int]):
    """Take these steps together; the state after them and the metrics `[steps, metrics, members]`."""
    specs = [member.spec(scan) for member in members]
    step_fn = make_train_step(group_spec(specs), members[0].optim, COMPUTE)
    curve = []
    for step in steps:
        rates = jnp.asarray([member.rate(step) for member in members], jnp.float32)
        batch = stack_batches([member.batch(step, layout) for member in members])
        state, metrics = step_fn(state, base(scan), batch, rates)
        curve.append([np.asarray(metrics[name]) for name in METRICS])
    return state, np.array(curve)


def together(members: Sequence[Member], layout: str, scan: bool, steps: int = 12) -> list[Trained]:
    state = start(members, scan)
    state, curve = steps_of(state, members, layout, scan, range(1, steps + 1))
    return [
        Trained(curve[:, :, i], member_state(state, i, member.spec(scan))) for i, member in enumerate(members)
    ]


def difference(ours: Tree, theirs: Tree) -> float:
    """Relative difference of two trees in norm; infinite where their forms differ."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
    norms = [(np.linalg.norm(x - y) ** 2, np.linalg.norm(y) ** 2) for x, y in pairs]
    return float(np.sqrt(sum(n[0] for n in norms) / sum(n[1] for n in norms)))


def assert_equal_runs(fused: Trained, lone: Trained) -> None:
    np.testing.assert_allclose(fused.curve, lone.curve, rtol=1e-5)
    assert difference(fused.state.lora, lone.state.lora) < 1e-5
    assert difference(fused.state.adam.mu, lone.state.adam.mu) < 1e-4
    assert difference(fused.state.adam.nu, lone.state.adam.nu) < 1e-4
    assert int(fused.state.adam.count) == int(lone.state.adam.count)


class TestFusedEqualsAlone:
    @pytest.mark.parametrize(("layout", "scan"), [("packed", False), ("packed", True), ("padded", True)])
    def test_six_members_of_the_study_train_as_their_lone_runs_do(self, layout, scan):
        for member, fused in zip(STUDY, together(STUDY, layout, scan), strict=True):
            assert_equal_runs(fused, alone(member, layout, scan))

    @pytest.mark.parametrize(("layout", "scan"), [("packed", True), ("padded", False)])
    def test_members_of_other_rank_alpha_rate_batch_and_placement_do_so_too(self, layout, scan):
        for member, fused in zip(MIXED, together(MIXED, layout, scan), strict=True):
            assert_equal_runs(fused, alone(member, layout, scan))
