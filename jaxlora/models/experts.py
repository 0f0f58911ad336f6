"""The MLP of a mixture of experts: a router sends each token to a few experts, whose outputs are summed.

    mlp = ExpertMLP(table, spec)                       # in place of the decoder's MLP
    y = mlp(x, real)                                   # real: bool [batch, length], or None: all tokens are

The router's softmax runs over all experts in float32; the top k are taken, and their outputs are weighted
after the last product. No token is dropped, and padding is not routed. Every expert has its own adapter, of
the configured rank divided by k, the number of experts per token; the router has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxlora.models.dropout import Noise
from jaxlora.models.grouped import WEIGHTS, expert_products, group_tokens, tile_rows, to_rows, to_tokens
from jaxlora.models.spec import PRODUCT, Experts, How, Weight
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import EXPERTS, auto_mesh, spec_for

GATHERED = "gathered"  # checkpoint name of weights that the backward pass re-gathers
NAMES = ("gate_proj", "up_proj", "down_proj")


class Router(nnx.Module):
    """The logits over all experts; never adapted."""

    def __init__(self, weight: Weight, spec: Any, stack: tuple[int, ...]):
        self.weight = nnx.Param(jnp.zeros((*stack, *weight.shape), jnp.dtype(spec.dtype)))


class ExpertLinear(nnx.Module):
    """One projection of all experts: W `[experts, out, in]`, A `[experts, r, in]`, B `[experts, out, r]`."""

    def __init__(self, weight: Weight, spec: Any, stack: tuple[int, ...]):
        experts, out_size, in_size = weight.shape
        self.weight = nnx.Param(jnp.zeros((*stack, *weight.shape), jnp.dtype(spec.dtype)))
        if weight in spec.adapted:
            rank = spec.stored_rank(weight)
            self.lora_a = nnx.LoRAParam(jnp.zeros((*stack, experts, rank, in_size), jnp.float32))
            self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, experts, out_size, rank), jnp.float32))
        else:
            self.lora_a = self.lora_b = None  # type: ignore[assignment]


class ExpertWeights(nnx.Module):
    """The three SwiGLU projections of all experts."""

    def __init__(self, table: Mapping[str, Weight], spec: Any, stack: tuple[int, ...]):
        self.gate_proj, self.up_proj, self.down_proj = (
            ExpertLinear(table[EXPERTS + name], spec, stack) for name in NAMES
        )

    def arrays(self) -> dict[str, dict[str, jax.Array]]:
        """The weight and, if any, the adapter of each projection."""
        found = {}
        for name in NAMES:
            module = getattr(self, name)
            found[name] = {"weight": module.weight[...]}
            if module.lora_a is not None:
                found[name] |= {"lora_a": module.lora_a[...], "lora_b": module.lora_b[...]}
        return found


class ExpertMLP(nnx.Module):
    """Router and experts."""

    def __init__(self, table: Mapping[str, Weight], spec: Any, stack: tuple[int, ...] = ()):
        self.gate = Router(table["layers.mlp.gate"], spec, stack)
        self.experts = ExpertWeights(table, spec, stack)
        self.config, self.scale, self.how, self.stacked = (
            spec.config.experts,
            spec.expert_scale,
            spec.products,
            bool(stack),
        )
        self.axes = tuple(table[EXPERTS + name].axes for name in NAMES)  # hashable: layers are traced once

    def __call__(self, x: jax.Array, noise: Noise | None = None, real: jax.Array | None = None) -> jax.Array:
        real = jnp.ones(x.shape[:-1], bool) if real is None else real
        run = partial(_experts, self.config, self.scale, self.how)
        axes = dict(zip(NAMES, self.axes, strict=True))
        return _over_mesh(run, axes, self.stacked)(x, real, self.gate.weight[...], self.experts.arrays())


def route(x: jax.Array, weight: jax.Array, experts: Experts, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their mixing weights (shares).

    Args:
      x: `[tokens, hidden]`.
      weight: the router's weight, `[experts, hidden]`.
      real: bool `[tokens]`; other tokens are routed to no expert.

    Returns:
      choices int32 `[tokens, k]`, equal to the number of experts for tokens that are not routed, and shares
      `[tokens, k]` in the dtype of x.
    """
    logits = jnp.einsum("ti,ei->te", x, weight, preferred_element_type=jnp.float32)
    shares, choices = jax.lax.top_k(jax.nn.softmax(logits), experts.num_experts_per_tok)
    if experts.norm_topk_prob:
        shares /= jnp.sum(shares, axis=-1, keepdims=True)
    return jnp.where(real[:, None], choices, experts.num_experts), shares.astype(x.dtype)


def _experts(config: Experts, scale: float, how: How, own: _Split, x, real, router, arrays):
    """The weighted sum of experts for tokens `[batch, length, hidden]`; every chip returns its own tokens.

    If experts are split over chips, these gather each other's tokens, compute their own experts, and
    reduce-scatter the sums. Every token goes to several experts, so most chips need it anyway.
    """
    arrays = {name: one | {"weight": own.whole(name, one["weight"])} for name, one in arrays.items()}
    tokens = x.reshape(-1, x.shape[-1])
    choices, shares = route(tokens, router, config, real.reshape(-1))
    if own.tokens:
        tokens, choices, shares = (
            jax.lax.all_gather(part, "expert", tiled=True) for part in (tokens, choices, shares)
        )
    if own.experts:
        choices -= jax.lax.axis_index("expert") * arrays["gate_proj"]["weight"].shape[0]
    y = own_experts(config, scale, how, tokens, choices, shares, arrays)
    if own.units:
        y = jax.lax.psum(y, "tensor")
    if own.tokens:
        y = jax.lax.psum_scatter(y, "expert", tiled=True)
    elif own.experts:
        y = jax.lax.psum(y, "expert")
    return y.reshape(x.shape)


def own_experts(config: Experts, scale: float, how: How, tokens, choices, shares, arrays):
    """The weighted sum over these experts, which may be only a part of all."""
    n_experts = arrays["gate_proj"]["weight"].shape[0]
    groups = group_tokens(choices, n_experts, tile_rows(choices.size, config.num_experts))

    def products(x, *names):
        own = [arrays[name] for name in names]
        adapters = [(one["lora_a"], one["lora_b"]) for one in own if "lora_a" in one]
        ys = expert_products(x, [one["weight"] for one in own], adapters, scale, groups, how)
        return [checkpoint_name(y, PRODUCT) for y in ys]

    gate, up = products(to_rows(tokens, groups), "gate_proj", "up_proj")
    (out,) = products(jax.nn.silu(gate) * up, "down_proj")
    return to_tokens(out, shares, groups)


# --- Over a mesh --------------------------------------------------------------------------------------------


class _Split(NamedTuple):
    """What is split over chips of the mesh."""

    experts: bool = False  # over `expert`
    tokens: bool = False  # also over `expert`
    units: bool = False  # the experts' hidden units, over `tensor`
    embed: Mapping[str, int] = {}  # by projection, the axis of its weight that is split over `fsdp`

    def whole(self, name: str, weight: jax.Array) -> jax.Array:
        """The weight of these experts and units, gathered over `fsdp`."""
        if name not in self.embed:
            return weight
        # The name makes the backward pass gather it again, see `_over_mesh`.
        return checkpoint_name(
            jax.lax.all_gather(weight, "fsdp", axis=self.embed[name], tiled=True), GATHERED
        )


def _over_mesh(run: Callable, axes: Mapping[str, tuple[str | None, ...]], stacked: bool) -> Callable:
    """`run(split, x, real, router, arrays)` on every chip for its own tokens; on one device, `run` itself."""
    mesh = auto_mesh()
    if mesh is None or mesh.size == 1:
        return partial(run, _Split())

    def on_mesh(x, real, router, arrays):
        places = {name: _places(mesh, axes[name], own) for name, own in arrays.items()}
        tokens = spec_for(mesh, ("batch", "length", None), x.shape)
        gate = places["gate_proj"]["weight"]
        embed = {
            name: dimension
            for name, own in places.items()
            for dimension, names in enumerate(own["weight"])
            if names in ("fsdp", ("fsdp",))
        }
        split = _Split(gate[0] is not None, "expert" in str(tokens), gate[1] is not None, embed)
        if mesh.shape.get("expert", 1) > 1 and not split.experts:
            raise UserError(
                f"config.mesh.expert: {mesh.shape['expert']} does not divide {router.shape[0]} experts"
            )
        specs = (tokens, PartitionSpec(*tokens[:2]), PartitionSpec(), places)
        mapped = jax.shard_map(partial(run, split), in_specs=specs, out_specs=tokens, check_vma=False)
        return mapped(x, real, router, arrays)

    return jax.checkpoint(on_mesh, policy=_keep_all_but_weights, prevent_cse=not stacked)


def _keep_all_but_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """Checkpoint policy: save all results but weights, which the backward pass reads from their arguments and
    re-gathers. A scan over layers would otherwise keep copies of all of them. (JAX's own policy that excludes
    names excludes nothing.)"""
    if primitive.name == "name":
        return params["name"] not in (GATHERED, WEIGHTS)
    return not (primitive.name.startswith("all_gather") and "fsdp" in str(params["axis_name"]))


def _places(mesh: Any, axes: tuple[str | None, ...], arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Partition specs of a projection's arrays; adapters are split as the products need them."""
    expert, *both = axes
    out_axis, in_axis = (None if axis == "embed" else axis for axis in both)
    all_axes = {"weight": axes, "lora_a": (expert, None, in_axis), "lora_b": (expert, out_axis, None)}
    return {name: spec_for(mesh, all_axes[name], array.shape) for name, array in arrays.items()}
