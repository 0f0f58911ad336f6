"""Several sweep members trained in one program over one frozen base.

The members' adapters, moments, rates and metrics are stacked along a leading axis, and a step's batch holds
every member's own rows on lines of its own. So each product with the base runs once over the tokens of all
members, and only the adapters' small products are done member by member:

    specs = [ModelSpec(model, lora, scan=False) for lora in (attention_only, all_layer)]
    group = group_spec(specs)
    state = stack_members([init_state(init_lora(s, seed=0), optim) for s in specs], specs)
    step = make_train_step(group, optim, compute)
    state, metrics = step(state, frozen, stack_batches([batch_0, batch_1]), jnp.asarray([3e-4, 1e-3]))
    metrics["nll"]                                  # [2]
    first = member_state(state, 0, specs[0])        # what its lone run would hold

Members may differ in placement, rank, alpha, seed, learning rate and rows. What a member lacks, a whole
projection or the last ranks of one, is zero in both A and B: then both gradients are exactly zero, Adam's
direction is 0 / (0 + eps) = 0, and it stays zero. When a member ends before the others (larger batches make
fewer steps), stack the remaining ones again: all members of a group have taken the same number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora.config import Condition, LoraConfig
from jaxlora.data.packing import Batch
from jaxlora.lora import get_path, lora_shapes, set_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.table import GROUPS
from jaxlora.sharding import constrain_lora
from jaxlora.train.step import TrainState


def group_spec(members: Sequence[ModelSpec]) -> ModelSpec:
    """The spec of a group: every projection that a member adapts, at the largest rank.

    Raises:
      ValueError: the members are not adapters of one base, computed in one way.
    """
    first = members[0]
    if any(replace(member, lora=None) != replace(first, lora=None) for member in members):
        raise ValueError("members of a group share one base, one dtype and one form of its layers")
    loras = [member.lora for member in members if member.lora is not None]
    if len(loras) < len(members):
        raise ValueError("every member of a group needs an adapter")
    union = LoraConfig(
        condition=_union([lora.condition for lora in loras]),
        rank=max(lora.rank for lora in loras),
        output_head=any(lora.output_head for lora in loras),
    )
    return replace(first, lora=union, member_scales=tuple(lora.alpha / lora.rank for lora in loras))


def stack_members(states: Sequence[TrainState], members: Sequence[ModelSpec]) -> TrainState:
    """The state of a group from those of its members: adapters and moments `[members, ...]`.

    Raises:
      ValueError: the members have not taken the same number of steps.
    """
    steps = {int(state.adam.count) for state in states}
    if len(steps) > 1:
        raise ValueError(f"members of a group have taken the same number of steps, not {sorted(steps)}")
    return _stacked(tuple(states), tuple(members))


@partial(jax.jit, static_argnums=1)
def _stacked(states: Sequence[TrainState], members: Sequence[ModelSpec]) -> TrainState:
    group = group_spec(members)

    def stack(trees: Sequence[Tree]) -> Tree:
        stacked: Tree = {}
        for weight in group.adapted:
            shapes = dict(zip(("lora_a", "lora_b"), lora_shapes(group, weight), strict=True))
            pairs = [
                _grown(get_path(tree, weight.path), shapes)
                if weight in member.adapted
                else {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
                for tree, member in zip(trees, members, strict=True)
            ]
            set_path(stacked, weight.path, jax.tree.map(lambda *x: jnp.stack(x), *pairs))
        return stacked

    moments = [state.adam for state in states]
    adam = optax.ScaleByAdamState(
        count=jnp.copy(moments[0].count),  # a step is given its state's buffers: share none
        mu=stack([own.mu for own in moments]),
        nu=stack([own.nu for own in moments]),
    )
    return constrain_lora(group, TrainState(stack([state.lora for state in states]), adam))


def member_state(state: TrainState, i: int, member: ModelSpec) -> TrainState:
    """Member i's state out of its group's: the arrays that its lone run would hold."""
    return _cut(state, i, member)


@partial(jax.jit, static_argnums=2)  # one program for all members of the same placement and rank
def _cut(state: TrainState, i: jax.Array, member: ModelSpec) -> TrainState:
    lora = member.lora
    assert lora is not None

    def cut(tree: Tree) -> Tree:
        own: Tree = {}
        for weight in member.adapted:
            pair = get_path(tree, weight.path)
            a, b, rank = pair["lora_a"][i], pair["lora_b"][i], lora.rank
            set_path(own, weight.path, {"lora_a": a[..., :rank, :], "lora_b": b[..., :rank]})
        return own

    moments = state.adam
    adam = optax.ScaleByAdamState(jnp.copy(moments.count), cut(moments.mu), cut(moments.nu))
    return constrain_lora(member, TrainState(cut(state.lora), adam))


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch from each member's own: arrays `[buffers, lines, length]`, line i of member i % members.

    Members with fewer buffers, fewer lines or a shorter length are filled up with padding (weight 0,
    segment 0), which changes nothing. Validation stacks the same batch for every member.
    """
    buffers, lines, length = np.max([batch["tokens"].shape for batch in batches], axis=0)

    def fill(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, n - size) for n, size in zip((buffers, lines, length), x.shape, strict=True)])

    def stack(*arrays: np.ndarray) -> np.ndarray:
        return np.stack([fill(x) for x in arrays], axis=2).reshape(buffers, lines * len(arrays), length)

    return jax.tree.map(stack, *batches)


def _grown(pair: Tree, shapes: dict[str, tuple[int, ...]]) -> Tree:
    """A and B filled up with zero ranks to these shapes."""
    fill = {name: [(0, n - x.shape[i]) for i, n in enumerate(shapes[name])] for name, x in pair.items()}
    return {name: jnp.pad(x, fill[name]) for name, x in pair.items()}


def _union(conditions: Sequence[Condition]) -> Condition:
    """The smallest placement that holds all of these."""
    groups = {group for condition in conditions for group in GROUPS[condition]}
    return min((c for c in GROUPS if groups <= set(GROUPS[c])), key=lambda c: len(GROUPS[c]))
