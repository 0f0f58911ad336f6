"""LoRA as a trainable subtree: initialisation, parameter counts, merging.

y = W x + (alpha / r) B A x, with A uniform in ±1/sqrt(d_in) and B zero, so that training starts exactly at
the base (Hu et al. 2021; the bound is that of PEFT and of "LoRA Without Regret"). The tree holds float32
arrays under the module paths of the parameter table, with a leading layer axis:

    lora = init_lora(spec, seed=0)
    lora["layers"]["self_attn"]["q_proj"]["lora_a"].shape      # (36, 8, 4096)
"""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp

from jaxlora.config import Condition
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.families import count_parameters
from jaxlora.models.quantised import dequantise, is_quantised
from jaxlora.models.spec import Weight
from jaxlora.runtime.errors import UserError


def init_lora(spec: ModelSpec, seed: int) -> Tree:
    """A fresh adapter: A uniform in ±1/sqrt(d_in) of its own layer, B zero, float32.

    Each weight has its own random key, derived from its name, so adding a target never changes the values of
    another weight. Nor do the kind and number of devices, or compiler options.

    Raises:
      UserError: no weight is adapted, or a target is not a module of this model.
    """
    check_targets(spec)
    lora: Tree = {}
    for weight in spec.adapted:
        a_shape, b_shape = lora_shapes(spec, weight)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(weight.path.encode()))
        bound = 1.0 / math.sqrt(weight.shape[-1])
        # The difference is exact and the product rounds once, however the compiler orders or fuses them.
        a = (jax.random.uniform(key, a_shape, jnp.float32) - 0.5) * (2 * bound)
        set_path(lora, weight.path, {"lora_a": a, "lora_b": jnp.zeros(b_shape, jnp.float32)})
    return lora


def check_targets(spec: ModelSpec) -> None:
    """Refuse a placement that this model does not support.

    Raises:
      UserError: names the field and what is allowed.
    """
    lora = spec.lora
    if lora is None:
        raise UserError("config.lora: no projection would be adapted; give lora.targets")
    known = [weight.name for weight in spec.adaptable]
    if odd := [name for name in lora.modules if name not in known]:
        names = ", ".join((*get_args(Condition), *known))
        raise UserError(f"config.lora.targets: this model has no {', '.join(odd)}; it has {names}")
    if not spec.adapted:
        raise UserError(
            "config.lora: no projection would be adapted; check lora.targets and lora.output_head"
        )
    _check_experts(spec)


def _check_experts(spec: ModelSpec) -> None:
    """Check experts' adapters: their rank is divided by the experts per token, and PEFT fuses gate and up."""
    lora, experts = spec.lora, spec.config.experts
    names = {weight.name for weight in spec.adapted if weight.experts}
    if lora is None or experts is None or not names:
        return
    active = experts.num_experts_per_tok
    if lora.dropout:
        raise UserError("config.lora.dropout: not supported in experts' adapters (nor in PEFT's); give 0")
    if lora.rank % active and not spec.shapes:
        near = sorted({max(lora.rank // active, 1) * active, (lora.rank // active + 1) * active})
        raise UserError(
            f"config.lora.rank: {lora.rank} is not a multiple of the {active} experts per token,"
            f" which share it; give {' or '.join(map(str, near))}, or lora.targets=attention_only"
        )
    if len(names & {"gate_proj", "up_proj"}) == 1:
        raise UserError(
            "config.lora.targets: experts' gate_proj and up_proj are adapted together; give both or neither"
        )


def lora_shapes(spec: ModelSpec, weight: Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A `[layers?, experts?, r, in]` and B `[layers?, experts?, out, r]` of one weight."""
    stack = (spec.config.num_hidden_layers,) if weight.stacked else ()
    *experts, out_size, in_size = weight.shape
    rank = spec.stored_rank(weight)
    return (*stack, *experts, rank, in_size), (*stack, *experts, out_size, rank)


def count_trainable(spec: ModelSpec) -> int:
    """Number of trained parameters: r (d_in + d_out) for each adapted matrix, or all weights."""
    if spec.full:
        return count_parameters(spec.config)
    return sum(map(spec.adapter_size, spec.adapted))


def check_lora(spec: ModelSpec, lora: Tree) -> None:
    """Refuse an adapter tree with paths, shapes or dtypes other than those of the placement.

    Raises:
      UserError: names the first difference.
    """
    found = arrays_by_path(lora)
    for weight in spec.adapted:
        for name, shape in zip(("lora_a", "lora_b"), lora_shapes(spec, weight), strict=True):
            array = found.pop(f"{weight.path}.{name}", None)
            if array is None:
                raise UserError(f"adapter: {weight.path}.{name} is missing")
            if array.shape != shape or array.dtype != jnp.float32:
                given = f"{array.dtype} {array.shape}"
                raise UserError(f"adapter: {weight.path}.{name} is {given}, expected float32 {shape}")
    if found:
        raise UserError(f"adapter: unexpected {', '.join(sorted(found)[:3])}")


def check_mergeable(spec: ModelSpec) -> None:
    """Refuse an adapter that cannot be merged into the weights, see `ModelSpec.mergeable`.

    Raises:
      UserError: says what to do instead.
    """
    if not spec.mergeable:
        raise UserError(
            "an adapter on the output head cannot be merged where the head is tied to the embedding; export"
            " the adapter itself"
        )


def merge_lora(spec: ModelSpec, lora: Tree, tree: Tree, layer: int | None = None) -> Tree:
    """Replace W by W + (alpha / r) B A, summed in float32 and cast once to the weights' dtype.

    Arrays of unadapted weights are shared with `tree`; the adapted ones are new.

    Args:
      tree: the base or, with `layer`, the subtree of that layer of an unrolled or sliced base.
      layer: the layer's number; None: `tree` is the whole base, its layers stacked or not as in the spec.

    Raises:
      UserError: as in `check_mergeable`.
    """
    check_mergeable(spec)
    merged = jax.tree.map(lambda x: x, tree)  # new dictionaries, modified below
    for weight in spec.adapted:
        if layer is not None and weight.stacked:
            module = get_path(merged, weight.path.removeprefix("layers."))
        elif layer is None and (spec.scan or not weight.stacked) and weight.path.partition(".")[0] in merged:
            module = get_path(merged, weight.path)
        else:
            continue
        module["weight"] = merged_weight(spec, lora, weight, module["weight"], layer)
    if layer is None and not spec.scan and "layers" in merged:
        merged["layers"] = {i: merge_lora(spec, lora, own, i) for i, own in merged["layers"].items()}
    return merged


def merged_weight(
    spec: ModelSpec, lora: Tree, weight: Weight, array: jax.Array, layer: int | None = None
) -> jax.Array:
    """W + (alpha / r) B A of one weight, for one layer of a stacked weight or for all at once (None).

    A quantised weight is dequantised: the result has the model's dtype.
    """
    pair = get_path(lora, weight.path)
    a, b = (pair[name] if layer is None else pair[name][layer] for name in ("lora_a", "lora_b"))
    scales = jnp.asarray(spec.scales(weight), jnp.float32)
    whole = scales.reshape(-1, *(1,) * len(weight.shape)) if weight.stacked else scales[0]
    dtype = spec.dtype if is_quantised(array) else array.dtype
    return _merged(array, a, b, whole if layer is None else scales[layer], jnp.dtype(dtype))


@partial(jax.jit, static_argnums=4)
def _merged(weight, a, b, scale, dtype):
    delta = jnp.einsum("...or,...ri->...oi", b, a, precision=jax.lax.Precision.HIGHEST)
    return (dequantise(weight, jnp.float32) + scale * delta).astype(dtype)


def arrays_by_path(tree: Tree) -> dict[str, jax.Array]:
    """The arrays of a tree by dotted path."""
    return {
        jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(tree)
    }


def get_path(tree: Tree, path: str) -> Tree:
    """The subtree at a dotted path."""
    for part in path.split("."):
        tree = tree[part]
    return tree


def set_path(tree: Tree, path: str, value) -> None:
    """Set the value at a dotted path, creating dictionaries along the way."""
    *parents, leaf = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[leaf] = value
