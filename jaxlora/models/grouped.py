"""Grouped matrix products: each row times the matrix of its group, as computed by a mixture of experts.

    groups = group_tokens(choices, n_experts, tile)        # choices int32 [tokens, k]; n_experts: not routed
    rows = to_rows(x, groups)                              # [rows, hidden], an expert's rows contiguous
    gate, up = expert_products(rows, [w_gate, w_up], [], 0.0, groups, "auto")
    y = to_tokens(expert_products(...)[0], shares, groups) # [tokens, hidden]

Rows are sorted by expert and each expert's rows are padded to whole tiles, so every tile is multiplied with a
single matrix. No token is dropped, however uneven the choices: there is room for the worst case. No array
has the size of tokens times experts times anything.

Implementations: `triton`, GPU kernels (`jaxlora.models.grouped_triton`); `mosaic`, the same with faster
kernels for large products on Hopper GPUs (`jaxlora.models.grouped_mosaic`); `ragged_dot`, JAX's own, for
which the TPU compiler has kernels; `loop`, one tile at a time, for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxlora.models.spec import Experts, How
from jaxlora.runtime.devices import compute_capability

Adapter = tuple[jax.Array, jax.Array]  # A float32 [experts, r, in], B float32 [experts, out, r]
Term = tuple[jax.Array, jax.Array]  # rows [rows, in], matrices [experts, out, in]
WEIGHTS = "expert weights"  # checkpoint name of the frozen matrices used by the backward pass
TILES = (16, 128)  # fewest and most rows of a tile: the minimum of tensor cores, and enough to keep them busy
RANK_MULTIPLE = 16  # the inner dimension of adapters is padded to this for the kernel


class Groups(NamedTuple):
    """Where every token goes. Rows are numbered consecutively through all tiles."""

    place: jax.Array  # int32 [tokens, k]: the row of each choice; the number of rows means none
    token: jax.Array  # int32 [rows]: the token in each row; the number of tokens means padding
    choice: jax.Array  # int32 [rows]: which of the token's k choices
    expert: jax.Array  # int32 [tiles]: the expert of each tile, ascending; the number of experts means none
    tiles: jax.Array  # int32 [experts]: number of tiles of each expert
    counts: jax.Array  # int32 [experts]: number of rows of each expert that hold a token


def resolve(how: How) -> How:
    """The implementation, with `auto` resolved for this machine."""
    if how != "auto":
        return how
    platform = jax.default_backend()
    if platform == "gpu":
        return "mosaic" if compute_capability(jax.devices()[0])[0] == 9 else "triton"
    return "ragged_dot" if platform == "tpu" else "loop"


def tile_rows(choices: int, n_experts: int) -> int:
    """Rows per tile for this many choices: a power of two close to the mean number per expert."""
    tile = TILES[0]
    while tile < TILES[1] and 2 * tile * n_experts <= 2 * choices:
        tile *= 2
    return tile


def most_rows(choices: int, n_experts: int, tile: int) -> int:
    """Rows needed in the worst case, in whole tiles, however the choices fall on the experts."""
    return (choices + min(n_experts, choices) * (tile - 1)) // tile * tile


def rows_of(experts: Experts, tokens: int, ways: int = 1) -> int:
    """Rows allocated on a chip with this many tokens, if experts are split over `ways` chips."""
    choices = ways * experts.num_experts_per_tok * tokens
    return most_rows(choices, experts.num_experts // ways, tile_rows(choices, experts.num_experts))


def group_tokens(choices: jax.Array, n_experts: int, tile: int) -> Groups:
    """Sort choices int32 `[tokens, k]` by expert; numbers outside 0 to n_experts - 1 are not routed."""
    n_tokens, k = choices.shape
    flat = choices.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < n_experts), flat, n_experts)
    counts = jnp.zeros(n_experts + 1, jnp.int32).at[flat].add(1)
    starts = jnp.cumsum(counts) - counts  # first of each expert's sorted choices
    tiles = (counts[:-1] + tile - 1) // tile
    ends = jnp.cumsum(tiles)
    n_rows = most_rows(flat.size, n_experts, tile)
    n_tiles = n_rows // tile
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sorted_experts = flat[order]
    # The row of each sorted choice, and from it the row of each choice.
    first = jnp.append((ends - tiles) * tile, n_rows)
    row = first[sorted_experts] + jnp.arange(flat.size, dtype=jnp.int32) - starts[sorted_experts]
    row = jnp.where(sorted_experts < n_experts, row, n_rows)
    place = jnp.zeros_like(order).at[order].set(row, unique_indices=True).reshape(n_tokens, k)
    # The choice in each row.
    expert = jnp.sum(jnp.arange(n_tiles)[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    owner = jnp.broadcast_to(expert[:, None], (n_tiles, tile)).reshape(n_rows)
    own = jnp.minimum(owner, n_experts - 1)
    within = jnp.arange(n_rows, dtype=jnp.int32) - first[own]
    held = (within < counts[own]) & (owner < n_experts)
    source = order.at[starts[own] + within].get(mode="clip")
    token = jnp.where(held, source // k, n_tokens)
    return Groups(place, token, source % k, expert, tiles, counts[:-1])


# --- Between tokens and rows --------------------------------------------------------------------------------


@jax.custom_vjp
def to_rows(x: jax.Array, groups: Groups) -> jax.Array:
    """Gather each row's token of x `[tokens, hidden]`: `[rows, hidden]`, zeros in padding rows."""
    return _filled(x, groups.token)


def _to_rows_forward(x, groups):
    return to_rows(x, groups), groups


def _to_rows_backward(groups, d_rows):
    # Gathers and a fixed sum: a scatter-add would sum in an order that varies from run to run.
    return _summed(d_rows, groups, lambda j: jnp.float32(1)).astype(d_rows.dtype), _no_gradient(groups)


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def to_tokens(rows: jax.Array, shares: jax.Array, groups: Groups) -> jax.Array:
    """Sum each token's rows, weighted by its shares `[tokens, k]`, in float32: `[tokens, hidden]`."""
    return _summed(rows, groups, lambda j: shares[:, j, None].astype(jnp.float32)).astype(rows.dtype)


def _to_tokens_forward(rows, shares, groups):
    return to_tokens(rows, shares, groups), (rows, shares, groups)


def _to_tokens_backward(saved, d_y):
    rows, shares, groups = saved
    own = shares.at[groups.token, groups.choice].get(mode="fill", fill_value=0).astype(jnp.float32)
    d_own = _filled(d_y, groups.token).astype(jnp.float32)
    d_rows = (own[:, None] * d_own).astype(rows.dtype)
    products = jnp.sum(rows.astype(jnp.float32) * d_own, axis=-1)
    d_shares = products.at[groups.place].get(mode="fill", fill_value=0).astype(shares.dtype)
    return d_rows, d_shares, _no_gradient(groups)


to_tokens.defvjp(_to_tokens_forward, _to_tokens_backward)


def _filled(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _summed(rows: jax.Array, groups: Groups, share: Callable[[int], jax.Array]) -> jax.Array:
    """Weighted sum of each token's rows, float32 `[tokens, hidden]`; one gather per choice."""
    total = jnp.float32(0)
    for j in range(groups.place.shape[1]):
        total += share(j) * _filled(rows, groups.place[:, j]).astype(jnp.float32)
    return total


def _no_gradient(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tree)


# --- Products -----------------------------------------------------------------------------------------------


def expert_products(
    rows: jax.Array,
    weights: Sequence[jax.Array],
    adapters: Sequence[Adapter],
    scale: float,
    groups: Groups,
    how: How = "auto",
) -> list[jax.Array]:
    """W x for each row with its expert's matrix, plus (alpha / r) B A x if there are adapters.

    Args:
      rows: `[rows, in]`.
      weights: matrices `[experts, out, in]` of several projections of the same input.
      adapters: one for each projection, or none.
      scale: alpha / r; static.

    Returns:
      `[rows, out]` for each; zeros in tiles without an expert.
    """
    return _products(resolve(how), scale, rows, list(weights), list(adapters), groups)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _products(how, scale, rows, weights, adapters, groups):
    return _forward(how, scale, rows, weights, adapters, groups)[0]


def _forward(how, scale, rows, weights, adapters, groups):
    """The products, and (alpha / r) A x of all adapters side by side (None if there are none)."""
    if not adapters:
        return [_sum(how, [(rows, w)], groups) for w in weights], None
    all_a, own_b = _side_by_side(adapters, rows.dtype)
    low = _sum(how, [(rows, all_a)], groups) * jnp.asarray(scale, rows.dtype)
    terms = [[(rows, w), (low, b)] for w, b in zip(weights, own_b, strict=True)]
    return [_sum(how, own, groups) for own in terms], low


def _side_by_side(adapters: Sequence[Adapter], dtype: Any) -> tuple[jax.Array, list[jax.Array]]:
    """All A stacked, `[experts, ranks, in]`, and each B `[experts, out, ranks]` in its own columns.

    Both are padded with zeros to whole blocks of the kernel.
    """
    ranks = [a.shape[1] for a, _ in adapters]
    width = -(-sum(ranks) // RANK_MULTIPLE) * RANK_MULTIPLE
    all_a = jnp.concatenate([a.astype(dtype) for a, _ in adapters], axis=1)
    own_b = []
    for i, (_, b) in enumerate(adapters):
        before = sum(ranks[:i])
        after = width - before - ranks[i]
        own_b.append(jnp.pad(b.astype(dtype), ((0, 0), (0, 0), (before, after))))
    return jnp.pad(all_a, ((0, 0), (0, width - sum(ranks)), (0, 0))), own_b


def _products_forward(how, scale, rows, weights, adapters, groups):
    """Keep only the residuals needed for the matrices that are differentiated."""
    trained = tuple(w.perturbed for w in weights)
    rows, weights, adapters, groups = jax.tree.map(
        lambda x: x.value, (rows, weights, adapters, groups), is_leaf=_is_primal
    )
    ys, low = _forward(how, scale, rows, weights, adapters, groups)
    own_rows = rows if adapters or any(trained) else None
    # A frozen weight needs no gradient, so its rows are not kept.
    marks = [jnp.zeros((0,)) if one else None for one in trained]
    # Named so that a checkpoint policy need not save them: they are copies of what the caller holds.
    own_weights = [checkpoint_name(w, WEIGHTS) for w in weights]
    return ys, (own_rows, own_weights, adapters, low, groups, marks)


def _products_backward(how, scale, saved, d_ys):
    rows, weights, adapters, low, groups, marks = saved
    d_ys = [jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in d_ys]
    d_weights = [
        None if mark is None else _outer(how, d_y, rows, groups).astype(w.dtype)
        for w, d_y, mark in zip(weights, d_ys, marks, strict=True)
    ]
    terms = list(zip(d_ys, weights, strict=True))
    d_adapters: list[Adapter] = []
    if adapters:
        all_a, own_b = _side_by_side(adapters, d_ys[0].dtype)
        d_low = _sum(how, list(zip(d_ys, own_b, strict=True)), groups, transposed=True)
        d_low = d_low * jnp.asarray(scale, d_low.dtype)
        terms.append((d_low, all_a))
        d_all_a, start = _outer(how, d_low, rows, groups), 0
        for (a, _), d_y in zip(adapters, d_ys, strict=True):
            own = slice(start, start + a.shape[1])
            d_adapters.append((d_all_a[:, own], _outer(how, d_y, low, groups)[..., own]))
            start = own.stop
    return _sum(how, terms, groups, transposed=True), d_weights, d_adapters, _no_gradient(groups)


_products.defvjp(_products_forward, _products_backward, symbolic_zeros=True)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _sum(how: How, terms: Sequence[Term], groups: Groups, transposed: bool = False) -> jax.Array:
    """Sum over terms (x, W) of W x, or of W^T x, with each tile's matrix: `[rows, out or in]`."""
    if how == "mosaic":
        from jaxlora.models import grouped_mosaic

        if grouped_mosaic.supports(terms, groups.expert, transposed):
            return grouped_mosaic.sum_of_products(terms, groups.expert, transposed)
    if how in ("triton", "mosaic"):
        from jaxlora.models import grouped_triton  # imported only where used: it imports a compiler

        return grouped_triton.sum_of_products(terms, groups.expert, transposed)
    if how == "ragged_dot":
        return _ragged_sum(terms, groups, transposed)
    return _loop_sum(terms, groups, transposed)


def _outer(how: How, left: jax.Array, right: jax.Array, groups: Groups) -> jax.Array:
    """Sum of outer products over each expert's rows: float32 `[experts, left's width, right's width]`."""
    if how in ("triton", "mosaic"):
        from jaxlora.models import grouped_triton

        return grouped_triton.outer_products(left, right, groups.tiles, _tile(left, groups))
    if how == "ragged_dot" and min(left.shape[1], right.shape[1]) <= _THIN:
        return _tiles_outer(left, right, groups)
    return _loop_outer(left, right, groups)


def _tile(rows: jax.Array, groups: Groups) -> int:
    return rows.shape[0] // groups.expert.shape[0]


_THIN = 128  # up to this width (adapters), the products of all tiles are small compared with the rows
_ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_ROWS_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])


def _ragged_sum(terms, groups, transposed):
    sizes = groups.tiles * _tile(terms[0][0], groups)
    numbers = _ROWS_TRANSPOSED if transposed else _ROWS
    dtype = terms[0][0].dtype  # of each product: float32 would take twice the memory
    ys = [jax.lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=dtype) for x, w in terms]
    total = ys[0].astype(jnp.float32)
    for y in ys[1:]:
        total += y.astype(jnp.float32)
    return total.astype(dtype)


def _loop_sum(terms, groups, transposed):
    n_tiles, n_experts = groups.expert.shape[0], groups.tiles.shape[0]
    tiles = [x.reshape(n_tiles, -1, x.shape[-1]) for x, _ in terms]

    def one(_, inputs):
        expert, own = inputs
        total: Any = jnp.float32(0)
        for x, (_, w) in zip(own, terms, strict=True):
            matrix = w[jnp.minimum(expert, n_experts - 1)]
            equation = "mo,oi->mi" if transposed else "mi,oi->mo"
            total += jnp.einsum(equation, x, matrix, preferred_element_type=jnp.float32)
        return None, jnp.where(expert < n_experts, total, 0).astype(terms[0][0].dtype)

    _, ys = jax.lax.scan(one, None, (groups.expert, tiles))
    return ys.reshape(-1, ys.shape[-1])


def _tiles_outer(left, right, groups):
    """The products of all tiles at once, then their sums per expert. (`ragged_dot` also offers this product,
    but the TPU compiler turns it into a dense one, of every row with every expert.)"""
    n_tiles = groups.expert.shape[0]
    own_left, own_right = (x.reshape(n_tiles, -1, x.shape[-1]) for x in (left, right))
    products = jnp.einsum("tml,tmr->tlr", own_left, own_right, preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(products, groups.expert, groups.tiles.shape[0], indices_are_sorted=True)


def _loop_outer(left, right, groups):
    n_tiles, n_experts = groups.expert.shape[0], groups.tiles.shape[0]

    def add(total, inputs):
        expert, own_left, own_right = inputs
        product = jnp.einsum("ml,mr->lr", own_left, own_right, preferred_element_type=jnp.float32)
        return total.at[expert].add(product, mode="drop"), None

    start = jnp.zeros((n_experts, left.shape[1], right.shape[1]), jnp.float32)
    tiles = (x.reshape(n_tiles, -1, x.shape[-1]) for x in (left, right))
    return jax.lax.scan(add, start, (groups.expert, *tiles))[0]
