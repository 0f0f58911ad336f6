"""LoRA as a trainable subtree: initialisation, counts, merging.

y = W x + (alpha / r) B A x, with A uniform in ±1/sqrt(d_in) and B zero, so that training starts from the
base exactly (Hu et al. 2021; the bound is PEFT's and that of "LoRA Without Regret"). The tree holds float32
arrays under the module paths of the parameter table, with a leading layer axis:

    lora = init_lora(spec, seed=0)
    lora["layers"]["self_attn"]["q_proj"]["lora_a"].shape      # (36, 8, 4096)
"""

from __future__ import annotations

import math
import zlib

import jax
import jax.numpy as jnp

from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.table import Weight
from jaxlora.runtime.errors import UserError


def init_lora(spec: ModelSpec, seed: int) -> Tree:
    """A fresh adapter: A uniform in ±1/sqrt(d_in) of its own layer, B zero, float32.

    Each weight draws from a key of its own, derived from its name, so that adding a target never changes
    another weight's numbers; nor do the kind and number of devices and the compiler's options.

    Raises:
      UserError: no weight is adapted.
    """
    if spec.lora is None or not spec.adapted:
        raise UserError(
            "config.lora: no projection would be adapted; check lora.condition and lora.output_head"
        )
    lora: Tree = {}
    for weight in spec.adapted:
        a_shape, b_shape = lora_shapes(spec, weight)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(weight.path.encode()))
        bound = 1.0 / math.sqrt(weight.shape[1])
        # The difference is exact and the product is rounded once, however a compiler orders or fuses them.
        a = (jax.random.uniform(key, a_shape, jnp.float32) - 0.5) * (2 * bound)
        set_path(lora, weight.path, {"lora_a": a, "lora_b": jnp.zeros(b_shape, jnp.float32)})
    return lora


def lora_shapes(spec: ModelSpec, weight: Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A `[layers?, r, in]` and B `[layers?, out, r]` of one weight."""
    assert spec.lora is not None
    stack = (spec.config.num_hidden_layers,) if weight.stacked else ()
    out_size, in_size = weight.shape
    return (*stack, spec.lora.rank, in_size), (*stack, out_size, spec.lora.rank)


def count_trainable(spec: ModelSpec) -> int:
    """Number of trainable parameters: r (d_in + d_out) for each adapted matrix."""
    return sum(math.prod(shape) for weight in spec.adapted for shape in lora_shapes(spec, weight))


def check_lora(spec: ModelSpec, lora: Tree) -> None:
    """Refuse an adapter tree whose paths, shapes or dtypes are not exactly the placement's.

    Raises:
      UserError: names the first difference.
    """
    found = {
        jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(lora)
    }
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


def merge_lora(spec: ModelSpec, lora: Tree, frozen: Tree) -> Tree:
    """The base with W + (alpha / r) B A in place of W: the sum in float32, cast once to the base's dtype.

    Arrays of unadapted weights are shared with `frozen`; the adapted ones are new.
    """
    merged = jax.tree.map(lambda x: x, frozen)
    for weight in spec.adapted:
        if spec.scan or not weight.stacked:
            module = get_path(merged, weight.path)
            module["weight"] = merged_weight(spec, lora, weight, module["weight"])
        else:
            for i in range(spec.config.num_hidden_layers):
                module = get_path(merged["layers"][i], weight.path.removeprefix("layers."))
                module["weight"] = merged_weight(spec, lora, weight, module["weight"], i)
    return merged


def merged_weight(
    spec: ModelSpec, lora: Tree, weight: Weight, array: jax.Array, layer: int | None = None
) -> jax.Array:
    """W + (alpha / r) B A of one weight: of this layer of a stacked one, or of all at once (None)."""
    assert spec.lora is not None
    pair = get_path(lora, weight.path)
    a, b = (pair[name] if layer is None else pair[name][layer] for name in ("lora_a", "lora_b"))
    return _merged(array, a, b, spec.lora.alpha / spec.lora.rank)


@jax.jit
def _merged(weight, a, b, scale):
    delta = jnp.einsum("...or,...ri->...oi", b, a, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)


def get_path(tree: Tree, path: str) -> Tree:
    """The subtree at a dotted path."""
    for part in path.split("."):
        tree = tree[part]
    return tree


def set_path(tree: Tree, path: str, value) -> None:
    """Put a value at a dotted path, making the dictionaries on the way."""
    *parents, leaf = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[leaf] = value
