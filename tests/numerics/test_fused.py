"""Members trained together compute what each computes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rows import random_rows

from jaxlora.config import LoraConfig, MeshConfig, OptimConfig, TrainConfig
from jaxlora.data.packing import Batch, pack, pad
from jaxlora.lora import get_path, init_lora, lora_shapes
from jaxlora.models.attention import segment_offsets
from jaxlora.models.decoder import ModelSpec, Tree, _products
from jaxlora.models.spec import ModelConfig
from jaxlora.sharding import base_shardings, make_mesh, place_batch, place_lora, token_shards
from jaxlora.train.fused import group_spec, member_state, stack_batches, stack_members
from jaxlora.train.schedule import RunPlan, learning_rate, plan_run
from jaxlora.train.step import Compute, TrainState, init_state, make_eval_step, make_train_step

CONFIG = ModelConfig(
    vocab_size=160,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
ROWS = random_rows(24)
COMPUTE = Compute(max_segments=4)
STEPS = 6


@dataclass(frozen=True)
class Member:
    """One member of a sweep."""

    lora: LoraConfig
    seed: int = 0
    peak_lr: float = 3e-4
    batch_rows: int = 4

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
        return pack(rows, (192, 256), 256) if layout == "packed" else pad(rows, (64,), self.batch_rows)


STUDY = [
    Member(LoraConfig(condition), seed) for condition in ("attention_only", "all_layer") for seed in (0, 1, 2)
]
# Everything that members may differ in; of 24 rows the second makes 8 steps, the first 6.
MIXED = [
    Member(LoraConfig("mlp_only", rank=3, alpha=7.0, output_head=True), seed=4, peak_lr=1e-3),
    Member(LoraConfig("attention_only", rank=8, alpha=32.0), peak_lr=1e-4, batch_rows=3),
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
def alone(member: Member, layout: str, scan: bool, steps: int = STEPS) -> Trained:
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


def steps_of(
    state: TrainState,
    members: Sequence[Member],
    layout: str,
    scan: bool,
    steps: Sequence[int],
    batches: Sequence[Batch] | None = None,
):
    """Take these steps together; the state after them and the metrics `[steps, metrics, members]`."""
    step_fn = make_train_step(group_of(members, scan), members[0].optim, COMPUTE)
    curve = []
    for i, step in enumerate(steps):
        rates = jnp.asarray([member.rate(step) for member in members], jnp.float32)
        own = [member.batch(step, layout) for member in members]
        batch = stack_batches(own) if batches is None else batches[i]
        state, metrics = step_fn(state, base(scan), batch, rates)
        curve.append([np.asarray(metrics[name]) for name in METRICS])
    return state, np.array(curve)


def group_of(members: Sequence[Member], scan: bool) -> ModelSpec:
    return group_spec([member.spec(scan) for member in members])


def together(members: Sequence[Member], layout: str, scan: bool, steps: int = STEPS) -> list[Trained]:
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
    def test_six_members_of_the_study_train_as_their_lone_runs_do(self):
        for member, fused in zip(STUDY, together(STUDY, "packed", True), strict=True):
            assert_equal_runs(fused, alone(member, "packed", True))

    @pytest.mark.parametrize("scan", [True, False])
    def test_members_of_other_rank_alpha_rate_batch_and_placement_do_so_too(self, scan):
        for member, fused in zip(MIXED, together(MIXED, "padded", scan), strict=True):
            assert_equal_runs(fused, alone(member, "padded", True))

    def test_a_member_that_leaves_its_group_goes_on_as_if_it_had_been_alone(self):
        state, first = steps_of(start(STUDY, True), STUDY, "packed", True, range(1, 4))
        for i, member in ((1, STUDY[1]), (5, STUDY[5])):
            spec = member.spec(True)
            own, curve = member_state(state, i, spec), list(first[:, :, i])
            step_fn = make_train_step(spec, member.optim, COMPUTE)
            for step in range(4, STEPS + 1):
                rate = jnp.float32(member.rate(step))
                own, metrics = step_fn(own, base(True), member.batch(step, "packed"), rate)
                curve.append(np.array([float(metrics[name]) for name in METRICS]))
            assert_equal_runs(Trained(np.array(curve), own), alone(member, "packed", True))

    def test_validation_sums_each_members_own_loss(self):
        batch = STUDY[0].batch(1, "packed")
        step = make_eval_step(group_of(STUDY, True), COMPUTE)
        nll, weight = step(start_trained().lora, base(True), stack_batches([batch] * len(STUDY)))
        for i, member in list(enumerate(STUDY))[3:]:
            lone = make_eval_step(member.spec(True), COMPUTE)
            expected = lone(alone(member, "packed", True).state.lora, base(True), batch)
            np.testing.assert_allclose((nll[i], weight[i]), expected, rtol=1e-5)
        assert len({float(x) for x in nll}) == len(STUDY)


@cache
def start_trained() -> TrainState:
    """The study's members after their lone runs, stacked."""
    states = [alone(member, "packed", True).state for member in STUDY]
    return stack_members(states, [member.spec(True) for member in STUDY])


class TestStackingMembers:
    def test_a_member_comes_out_as_it_went_in(self):
        states = [alone(member, "padded", True).state for member in MIXED]
        specs = [member.spec(True) for member in MIXED]
        group = stack_members(states, specs)
        for i, (state, spec) in enumerate(zip(states, specs, strict=True)):
            back = member_state(group, i, spec)
            assert jax.tree.structure(back) == jax.tree.structure(state)
            jax.tree.map(np.testing.assert_array_equal, back, state)

    def test_members_at_different_steps_or_of_different_bases_are_refused(self):
        member = STUDY[0]
        spec = member.spec(True)
        states = [alone(member, "packed", True).state, init_state(init_lora(spec, 0), member.optim)]
        with pytest.raises(ValueError, match=r"the same number of steps, not \[0, 6\]"):
            stack_members(states, [spec, spec])
        with pytest.raises(ValueError, match="one base"):
            group_spec([spec, replace(spec, dtype="bfloat16")])
        with pytest.raises(ValueError, match="needs an adapter"):
            group_spec([spec, replace(spec, lora=None)])

    def test_batches_interleave_members_and_fill_up_with_padding(self):
        batches = [member.batch(1, "packed") for member in MIXED]
        stacked = stack_batches(batches)
        for i, batch in enumerate(batches):
            n = batch["tokens"].shape[-1]
            for name, array in batch.items():
                np.testing.assert_array_equal(stacked[name][0, i, :n], array[0, 0])
                assert not stacked[name][0, i, n:].any()
        lines = stack_batches([{"tokens": np.full((1, 2, 3), i)} for i in range(3)])["tokens"]
        assert lines[0, :, 0].tolist() == [0, 1, 2, 0, 1, 2]  # line i is of member i % 3

    def test_what_a_member_lacks_stays_zero_to_the_bit(self):
        """Padded ranks and absent projections, in A, B and both moments, through every step of Adam."""
        state, _ = steps_of(start(MIXED, True), MIXED, "padded", True, range(1, STEPS + 1))
        absent = checked = 0
        for tree in (state.lora, state.adam.mu, state.adam.nu):
            for weight in group_of(MIXED, True).adapted:
                pair = get_path(tree, weight.path)
                for i, member in enumerate(MIXED):
                    a, b = np.asarray(pair["lora_a"][i]), np.asarray(pair["lora_b"][i])
                    rank = member.lora.rank if weight in member.spec(True).adapted else 0
                    absent += rank == 0
                    checked += 1
                    assert not a[..., rank:, :].any()
                    assert not b[..., rank:].any()
                    assert rank == 0 or (a[..., :rank, :].any() and b[..., :rank].any())
        assert 0 < absent < checked


class TestOneMemberCannotReachAnother:
    def test_the_rows_of_one_change_nothing_in_the_others(self):
        members = STUDY
        batches = [stack_batches([m.batch(1, "packed") for m in members]) for _ in range(2)]
        batches[1]["tokens"][0, 1] = (batches[1]["tokens"][0, 1] + 1) % CONFIG.vocab_size
        curves, states = [], []
        for batch in batches:
            state, curve = steps_of(start(members, True), members, "packed", True, [1], [batch])
            states.append([member_state(state, i, m.spec(True)) for i, m in enumerate(members)])
            curves.append(curve)
        for i in (0, 2, 3, 4, 5):
            jax.tree.map(np.testing.assert_array_equal, states[0][i], states[1][i])
            np.testing.assert_array_equal(curves[0][..., i], curves[1][..., i])
        assert difference(states[0][1].lora, states[1][1].lora) > 1e-6

    def test_a_member_that_is_nan_leaves_the_others_as_they_are_alone(self):
        members = STUDY
        specs = [member.spec(True) for member in members]
        states = [init_state(init_lora(s, m.seed), m.optim) for s, m in zip(specs, members, strict=True)]
        bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), states[1].lora)
        states[1] = states[1]._replace(lora=bad)
        state = stack_members(states, specs)
        state, curve = steps_of(state, members, "packed", True, range(1, STEPS + 1))
        assert np.isnan(curve[:, 0, 1]).all()
        for i in (0, 2, 3, 4, 5):
            own = Trained(curve[:, :, i], member_state(state, i, specs[i]))
            assert_equal_runs(own, alone(members[i], "packed", True))


# The tokens of two lines are split over chips; of eight lines each chip has one.
@pytest.mark.parametrize(
    ("mesh", "n"), [(MeshConfig(1, 8, 1), 2), (MeshConfig(2, 4, 1), 8), (MeshConfig(2, 1, 4), 2)]
)
def test_a_mesh_changes_nothing(mesh, n):
    members = [Member(LoraConfig("all_layer"), seed, 1e-4 * (1 + seed)) for seed in range(n)]
    mesh = make_mesh(mesh)
    spec = group_of(members, True)
    with jax.set_mesh(mesh):
        frozen = jax.tree.map(jax.device_put, base(True), base_shardings(mesh, replace(spec, lora=None)))
        state = place_lora(mesh, spec, start(members, True))
        step_fn, curve = make_train_step(spec, members[0].optim, COMPUTE), []
        for step in (1, 2):
            batch = place_batch(mesh, stack_batches([member.batch(step, "packed") for member in members]))
            split = batch["tokens"].sharding.shard_shape(batch["tokens"].shape)
            assert split[1] == (n if n % token_shards(mesh) else n // token_shards(mesh))
            rates = jnp.asarray([member.rate(step) for member in members], jnp.float32)
            state, metrics = step_fn(state, frozen, batch, rates)
            # Each host must find all of them among its own devices.
            assert all(x.is_fully_replicated for x in metrics.values())
            curve.append([np.asarray(metrics[name]) for name in METRICS])
        totals = make_eval_step(spec, COMPUTE)(state.lora, frozen, batch)
        assert all(x.is_fully_replicated for x in totals)
        states = [member_state(state, i, member.spec(True)) for i, member in enumerate(members)]
    for i in (0, 1, n - 1):
        fused = Trained(np.array(curve)[:, :, i], jax.device_get(states[i]))
        assert_equal_runs(fused, alone(members[i], "packed", True, 2))


def test_cudnn_finds_the_rows_of_several_lines():
    """Lengths and starts by hand: two rows and padding; one row that fills its line; three rows."""
    segment_ids = jnp.asarray([[1, 1, 2, 0, 0, 0], [1] * 6, [1, 2, 2, 3, 3, 3]])
    lengths, starts = segment_offsets(segment_ids, max_segments=3)
    assert lengths.tolist() == [[2, 1, 3, -1], [6, -1, -1, -1], [1, 2, 3, -1]]
    assert starts.tolist() == [[0, 2, 3, -1, -1], [0, -1, -1, -1, -1], [0, 1, 3, -1, -1]]


def test_a_group_transposes_no_activations():
    """Of one line a member, as packed. Such a copy in each product made a pair slower than two lone runs."""
    spec = ModelSpec(CONFIG, LoraConfig(), "float32")
    weight = next(w for w in spec.table if w.path == "layers.mlp.up_proj")
    x, w = jnp.ones((2, 64, CONFIG.hidden_size)), jnp.ones(weight.shape)
    adapter = [jnp.ones((2, *shape[1:])) for shape in lora_shapes(spec, weight)]

    def loss(x, *adapter):
        gate, up = _products([weight.axes] * 2, (4.0, 4.0), x, [[w, *adapter]] * 2)
        return jnp.sum(gate * up)

    def moves_activations(equation) -> bool:
        if equation.primitive.name != "transpose":
            return False
        shape, order = equation.invars[0].aval.shape, equation.params["permutation"]
        return 64 in shape and bool(np.any(np.diff([i for i in order if shape[i] > 1]) < 0))

    equations = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, *adapter).jaxpr.eqns
    assert sum(equation.primitive.name == "dot_general" for equation in equations) == 13
    assert not any(map(moves_activations, equations))
