"""A frozen base in 8 or 4 bits: rounding its weights once, and products with them.

    scheme = pick_scheme(ModelSource(base_dtype="float8"))
    w = quantise(scheme, weight)                       # `[out, in]` to a `Quantised`, a pytree of arrays
    y, = products(x, [w])                              # x `[..., in]` to `[..., out]`, in the dtype of x
    dequantise(w, jnp.float32)                         # the numbers that it stands for

- `float8`: e4m3 with one float32 scale for each output channel.
- `int8`: whole numbers from -127 to 127, with one scale for each output channel.
- `nf4`: 16 levels (Dettmers et al. 2023), one scale for each 64 inputs, and the scales themselves in 8 bits
  with one float32 for each 256 of them, as bitsandbytes does it: 4.13 bits a weight.

A product multiplies either with the weights turned back to the dtype of the activations (weight-only), whose
gradient is exactly that of the rounded model, or with both factors in 8 bits. Then each row of the
activations gets a scale of its own, and so does each row of the gradients in the backward pass, which passes
straight through the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.config import ModelSource
from jaxlora.runtime.devices import compute_capability
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import auto_mesh

Kind = Literal["float8", "int8", "nf4"]  # those of `BaseDtype` that are quantised
BLOCK = 64  # inputs that share a scale in nf4
GROUP = 256  # scales that share a scale of theirs

# Levels of a normal distribution with equal shares between them, in the digits of bitsandbytes.
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@dataclass(frozen=True)
class Scheme:
    """How the projections of a frozen base are kept and multiplied. Hashable."""

    kind: Kind
    activations: bool = False  # products of two 8-bit factors; else with the weights turned back
    native: bool = True  # the device has such products; else float32 imitates them, with the same numbers
    turned: bool = False  # float8: a second, transposed copy for the backward pass, see `quantise`
    fused: bool = False  # float8: rows of decoding go through `jaxlora.models.float8_kernels`

    @property
    def products(self) -> str:
        """As `config.model.base_products` names them."""
        return "both" if self.activations else "weights"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "groups", "mean", "turned"],
    meta_fields=["scheme"],
)
@dataclass(frozen=True)
class Quantised:
    """One weight `[out, in]`, or with a leading layer axis on every array."""

    scheme: Scheme
    values: jax.Array  # float8_e4m3fn or int8 [out, in]; nf4: uint8 [out, in / 2], the first in the high half
    scales: jax.Array  # float32 [out, 1]; nf4: uint8 [out, in / 64], codes of `dynamic_code`
    groups: jax.Array | None = None  # nf4: float32 [ceil(out in / 64 / 256), 1]: the largest of 256 scales
    mean: jax.Array | None = None  # nf4: float32, as groups: what was taken off the scales before
    turned: jax.Array | None = None  # values transposed, [in, out]


# --- What a device can do -----------------------------------------------------------------------------------


def pick_scheme(model: ModelSource, device: Any = None, training: bool = False) -> Scheme | None:
    """How the base of a configuration is kept and multiplied on this device; None: as it is.

    Args:
      device: a JAX device, of a topology too; None: the first of this machine.
      training: there will be a backward pass.
    """
    kind = model.base_dtype
    if kind is None or kind == "bfloat16":
        return None
    both, native, _ = capability(kind, jax.devices()[0] if device is None else device)
    both = both if model.base_products == "auto" else model.base_products == "both"
    return Scheme(kind, both, native, turned=both and native and kind == "float8" and training)


def capability(kind: str, device: Any) -> tuple[bool, bool, str]:
    """Whether both factors are 8-bit numbers on this device by default, whether it has such products itself,
    and why."""
    platform, name = device.platform, device.device_kind
    if kind == "nf4":
        return False, True, "no device multiplies 4-bit floats with scales inside a row"
    if platform == "cpu":
        reason = "imitated in float32, as on GPUs that have it" if kind == "float8" else "turned back"
        return kind == "float8", kind == "int8", f"CPUs: {reason}"
    if platform == "gpu":
        version = compute_capability(device)
        if kind == "int8":
            return False, True, "8-bit whole numbers are no faster than bfloat16 through cuBLAS (measured)"
        has = version >= (8, 9)
        return has, has, "e4m3 products since Ada and Hopper" if has else "no e4m3 products before Ada"
    if kind == "int8":
        fast = name != "TPU v4"
        return fast, True, "int8 at twice the rate of bfloat16" if fast else "v4: int8 is no faster"
    return False, False, "TPUs to v6e have no e4m3 products"


def described(scheme: Scheme) -> str:
    """A scheme in words, for plans."""
    if not scheme.activations:
        return f"{scheme.kind}, turned back for products"
    return f"{scheme.kind}, products of 8-bit factors{'' if scheme.native else ', imitated'}"


# --- Rounding -----------------------------------------------------------------------------------------------


def quantise(scheme: Scheme, weight: jax.Array) -> Quantised:
    """Round a weight `[out, in]`, from its own dtype.

    With `turned`, the values are kept transposed as well: Hopper's tensor cores multiply 8-bit floats only
    along the last axis of both factors, and the backward pass sums over `out`. Transposing in each step
    would read and write the whole base.
    """
    x = weight.astype(jnp.float32)
    if scheme.kind == "nf4":
        return _nf4(scheme, x)
    values, scales = round_rows(scheme.kind, x)
    return Quantised(scheme, values, scales, turned=values.T if scheme.turned else None)


def dequantise(weight: Any, dtype: Any) -> jax.Array:
    """The numbers `[..., out, in]` that a quantised weight stands for; another array in this dtype."""
    if not isinstance(weight, Quantised):
        return weight.astype(dtype)
    if weight.scheme.kind != "nf4":
        return (weight.values.astype(jnp.float32) * weight.scales).astype(dtype)
    if weight.values.ndim == 3:
        return jax.vmap(partial(dequantise, dtype=dtype))(weight)
    out, half = weight.values.shape
    nibbles = (weight.values[..., None] >> jnp.uint8([4, 0])) & 15
    levels = jnp.take(NF4_LEVELS, nibbles.reshape(out, half * 2 // BLOCK, BLOCK), mode="clip")
    return (levels * _block_scales(weight)[..., None]).reshape(out, half * 2).astype(dtype)


def round_rows(kind: str, x: jax.Array, most: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Rows as 8-bit numbers, and their scales, float32 `[..., 1]`.

    Args:
      x: float32 `[..., n]`.
      most: what the largest number of a row becomes the scale of, `[..., 1]`; None: the row's own.
    """
    largest = 448.0 if kind == "float8" else 127.0
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True) if most is None else most
    most = jnp.maximum(most, jnp.float32(1e-30))  # a row of zeros
    y = x * (largest / most)
    scales = most * jnp.float32(1 / largest)
    if kind == "float8":
        return y.astype(jnp.float8_e4m3fn), scales
    return jnp.round(y).astype(jnp.int8), scales


def _nf4(scheme: Scheme, x: jax.Array) -> Quantised:
    out, size = x.shape
    if size % BLOCK:
        raise UserError(
            f"config.model.base_dtype: nf4 needs inputs in blocks of {BLOCK}, but this model has a projection"
            f" of {size}; give int8"
        )
    blocks = x.reshape(out, size // BLOCK, BLOCK)
    most = jnp.max(jnp.abs(blocks), axis=-1)
    y = blocks / jnp.where(most > 0, most, 1)[..., None]
    bounds = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
    code = jnp.zeros(y.shape, jnp.uint8)
    for bound in bounds:
        code += y > bound
    code = code.reshape(out, size)
    mean = jnp.mean(most)
    flat = jnp.pad((most - mean).reshape(-1), (0, -most.size % GROUP)).reshape(-1, GROUP)
    groups = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
    known = dynamic_code()
    found = jnp.searchsorted((known[1:] + known[:-1]) / 2, flat / jnp.where(groups > 0, groups, 1))
    scales = found.reshape(-1)[: most.size].reshape(most.shape).astype(jnp.uint8)
    return Quantised(
        scheme, (code[:, ::2] << 4) | code[:, 1::2], scales, groups, jnp.broadcast_to(mean, groups.shape)
    )


def _block_scales(weight: Quantised) -> jax.Array:
    """The float32 scales `[out, in / 64]` of nf4."""
    assert weight.groups is not None
    assert weight.mean is not None
    group = np.arange(weight.scales.size).reshape(weight.scales.shape) // GROUP
    own = jnp.take(dynamic_code(), weight.scales, mode="clip")
    return own * weight.groups[group, 0] + weight.mean[group, 0]


def dynamic_code() -> np.ndarray:
    """The 256 signed values of bitsandbytes' 8-bit "dynamic" code (Dettmers 2016), in order, float32.

    Seven decades, each with twice as many linear steps as the one below it.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1, dtype=np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


# --- Products -----------------------------------------------------------------------------------------------


def products(x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
    """W x of each weight `[out, in]`, an array or quantised, with one input x `[..., in]`, in its dtype."""
    if isinstance(weights[0], Quantised) and weights[0].scheme.activations:
        return _both_rounded(x, list(weights))
    mesh = auto_mesh()
    alone = mesh is None or mesh.shape["tensor"] == 1 or len(weights) == 1
    return (_each if alone else _each_together)(x, list(weights))


def _each(x: jax.Array, weights: list[Any]) -> list[jax.Array]:
    if isinstance(weights[0], Quantised):
        return [_turned_back(x, w) for w in weights]
    return [jnp.einsum("...i,oi->...o", x, w) for w in weights]


# A function of its own, so that its gradients for x are added up before any other is added: the compiler then
# sums one array over the chips that split the products, not one for each product.
_each_together = jax.jit(_each)


@jax.custom_vjp
def _turned_back(x, weight):
    return jnp.einsum("...i,oi->...o", x, dequantise(_when(x, weight), x.dtype))


def _turned_back_forward(x, weight):
    return _turned_back(x, weight), weight


def _turned_back_backward(weight, dy):
    return jnp.einsum("...o,oi->...i", dy, dequantise(_when(dy, weight), dy.dtype)), None


_turned_back.defvjp(_turned_back_forward, _turned_back_backward)


def _when(x, weight):
    """The weight, once x is there: or the compiler would turn back all layers early, or keep them for the
    backward pass, and the whole base would lie in memory in the dtype of the activations."""
    return jax.lax.optimization_barrier((weight, x))[0]


@jax.custom_vjp
def _both_rounded(x, weights):
    kind = weights[0].scheme.kind
    rows, scale = round_rows(kind, x.astype(jnp.float32))
    return [
        (_dot(rows, w.values, w.scheme, x.dtype) * scale * w.scales[:, 0]).astype(x.dtype) for w in weights
    ]


def _both_rounded_forward(x, weights):
    return _both_rounded(x, weights), (weights, jnp.zeros((), x.dtype))


def _both_rounded_backward(saved, dys):
    weights, like = saved
    # The gradient takes the weights' scales first, which lie along the axis that is summed over. All
    # projections share the scales of the rows, so that their products add up before they are scaled.
    kind = weights[0].scheme.kind
    parts = [dy.astype(jnp.float32) * w.scales[:, 0] for dy, w in zip(dys, weights, strict=True)]
    mosts = [jnp.max(jnp.abs(part), axis=-1, keepdims=True) for part in parts]
    most = mosts[0]
    for other in mosts[1:]:
        most = jnp.maximum(most, other)
    sums = []
    for part, w in zip(parts, weights, strict=True):
        rows, scale = round_rows(kind, part, most)
        sums.append(_dot(rows, w.values.T if w.turned is None else w.turned, w.scheme, like.dtype))
    return (sum(sums[1:], sums[0]) * scale).astype(like.dtype), None


_both_rounded.defvjp(_both_rounded_forward, _both_rounded_backward)


FUSED_RANK = 64  # most ranks of the adapters of one input


def fuses(x: jax.Array, weights: Sequence[Any], ranks: Sequence[int]) -> bool:
    """Whether `fused_products` serves these weights, which all have adapters of such ranks.

    Its kernels are of one device, and have no gradient.
    """
    if not (isinstance(weights[0], Quantised) and weights[0].scheme.fused and x.dtype == jnp.bfloat16):
        return False
    sizes = [x.shape[-1], *(w.values.shape[0] for w in weights)]
    suits = sum(ranks) <= FUSED_RANK and not any(size % 128 for size in sizes)
    return suits and ((mesh := auto_mesh()) is None or mesh.size == 1)


def fused_products(
    x: jax.Array,
    weights: Sequence[Quantised],
    a: jax.Array,
    all_b: Sequence[jax.Array],
    scale: float,
    gated: bool = False,
) -> list[jax.Array]:
    """W x + (alpha / r) B A x of each weight, bfloat16 `[..., out]`, rounded as one by one.

    Args:
      x: bfloat16 `[..., in]`.
      a: bfloat16 `[r, in]`: every A, one below the other.
      all_b: bfloat16 `[out, r]` each.
      scale: alpha / r.
      gated: of two weights give silu(first) * second alone.
    """
    from jaxlora.models import float8_kernels  # not everywhere: it imports a compiler

    flat = x.reshape(-1, x.shape[-1])
    most = jnp.max(jnp.abs(flat.astype(jnp.float32)), axis=-1, keepdims=True)
    values, low = float8_kernels.round_and_lower(flat, most, a)
    # In the dtype of the activations, as cuBLAS hands them over.
    ys = [_dot(values, w.values, w.scheme, x.dtype).astype(x.dtype) for w in weights]
    columns = [w.scales.reshape(1, -1) for w in weights]
    ys = float8_kernels.scale_and_add(ys, most, columns, low, all_b, scale, gated)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def _dot(rows, values, scheme: Scheme, dtype):
    """Products over the last axes of both, float32 `[..., out]`.

    8-bit floats are summed in float32 and handed over in the dtype of the activations, which is scaled next:
    in float32 a training step would be 2% slower, and the 8 bits have lost far more.
    """
    flat, sums = rows.reshape(-1, rows.shape[-1]), dtype
    if scheme.kind == "int8":
        sums = jnp.int32
    elif not scheme.native:
        flat, values, sums = flat.astype(jnp.float32), values.astype(jnp.float32), jnp.float32
    y = jax.lax.dot_general(flat, values, (((1,), (1,)), ((), ())), preferred_element_type=sums)
    return y.reshape(*rows.shape[:-1], -1).astype(jnp.float32)


# --- Trees --------------------------------------------------------------------------------------------------


def abstract(scheme: Scheme, weight: jax.ShapeDtypeStruct) -> Quantised:
    """The shapes of a weight `[..., out, in]` once it is quantised."""
    *stack, out, size = weight.shape
    one = jax.eval_shape(partial(quantise, scheme), jax.ShapeDtypeStruct((out, size), weight.dtype))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), one)


def bits_of(scheme: Scheme) -> float:
    """Bits that a large weight takes for each of its numbers."""
    if scheme.kind == "nf4":
        return 4 + 8 / BLOCK + 2 * 32 / (BLOCK * GROUP)
    return 16.0 if scheme.turned else 8.0


def is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


def dequantised(tree: Any, dtype: Any) -> Any:
    """A tree of weights with arrays of this dtype in place of what is quantised."""
    return jax.tree.map(lambda x: dequantise(x, dtype) if is_quantised(x) else x, tree, is_leaf=is_quantised)


def decoding_scheme(scheme: Scheme) -> Scheme:
    """The scheme of a weight that `for_decoding` gives."""
    fused = scheme.kind == "float8" and scheme.activations and scheme.native
    return replace(scheme, turned=False, fused=fused and jax.default_backend() == "gpu")


def for_decoding(weight: Any) -> Any:
    """The weight without what only a backward pass reads, and with the kernels that have none."""
    if not isinstance(weight, Quantised):
        return weight
    return replace(weight, turned=None, scheme=decoding_scheme(weight.scheme))
