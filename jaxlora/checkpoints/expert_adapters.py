"""Adapters of experts in PEFT's format: one pair of matrices for all experts of a layer.

    tensors = dict(expert_tensors(spec, lora))     # "...mlp.experts.lora_A.weight": [rank * experts, in], ...
    found = read_experts(slices, config, asked, rank_and_alpha, file)    # removes its tensors from `slices`

PEFT adapts the fused parameters of Transformers 5, with `target_parameters` `mlp.experts.gate_up_proj` and
`mlp.experts.down_proj`. A is `[rank * experts, in]` with each expert's rows contiguous; B is
`[out, rank * experts]` with all experts' columns of one rank index contiguous. If both parameters are
adapted, the first one's wrapper is nested inside the second's. Our gate and up each have their own A: in the
fused form they are stacked at twice the rank, and B is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlora.checkpoints.tensors import check_slice, slice_values
from jaxlora.lora import get_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.spec import ModelConfig, Weight
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
# The projections of each fused parameter; below, the prefix of its tensors: that of gate_up changes if down
# is adapted too.
FUSED = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
_ALONE, _INNER = "mlp.experts", "mlp.experts.base_layer"
_PARTS = ("lora_A", "lora_B")


def fused_targets(spec: ModelSpec) -> dict[str, list[Weight]]:
    """PEFT's `target_parameters` for an adapter, each with our weights."""
    own = {weight.name: weight for weight in spec.adapted if weight.experts}
    return {name: [own[part] for part in parts] for name, parts in FUSED.items() if parts[0] in own}


def _where(name: str, both: bool) -> str:
    return _INNER if both and name == GATE_UP else _ALONE


# --- Writing ------------------------------------------------------------------------------------------------


def expert_tensors(spec: ModelSpec, lora: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name (without PEFT's prefix) and array of each tensor; layers without an adapter are left out.

    Raises:
      UserError: a value is not finite.
    """
    targets = fused_targets(spec)
    for name, weights in targets.items():
        pairs = []
        for weight in weights:
            pair = tuple(hosts.whole(get_path(lora, weight.path)[part]) for part in ("lora_a", "lora_b"))
            if not all(np.isfinite(array).all() for array in pair):
                raise UserError(f"adapter: {weight.path} holds NaN or infinity; it is not written")
            pairs.append(pair)
        for layer in range(spec.config.num_hidden_layers):
            rank = spec.ranks(weights[0])[layer]
            if rank:
                own = [(a[layer][:, :rank], b[layer][:, :, :rank]) for a, b in pairs]
                place = f"model.layers.{layer}.{_where(name, len(targets) > 1)}"
                for part, array in zip(_PARTS, _fuse(own), strict=True):
                    yield f"{place}.{part}.weight", array


def _fuse(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B from A `[experts, rank, in]` and B `[experts, out, rank]` of each projection."""
    a = np.concatenate([a for a, _ in pairs], axis=1)
    outs, ranks = ([pair[1].shape[axis] for pair in pairs] for axis in (1, 2))
    b = np.zeros((a.shape[0], sum(outs), sum(ranks)), np.float32)
    for i, (_, own) in enumerate(pairs):
        row, column = sum(outs[:i]), sum(ranks[:i])
        b[:, row : row + outs[i], column : column + ranks[i]] = own
    return a.reshape(-1, a.shape[-1]), np.ascontiguousarray(b.transpose(1, 2, 0).reshape(b.shape[1], -1))


def expert_settings(spec: ModelSpec) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each target, as for PEFT's patterns; by layer if layers differ."""
    found: dict[str, tuple[int, float]] = {}
    for name, weights in fused_targets(spec).items():
        ranks, scales = spec.ranks(weights[0]), spec.scales(weights[0])
        own = [
            (len(weights) * rank, scale * len(weights) * rank)
            for rank, scale in zip(ranks, scales, strict=True)
        ]
        if len(set(own)) == 1:
            found[name] = own[0]
        else:
            found |= {f"model.layers.{i}.{name}": pair for i, pair in enumerate(own) if pair[0]}
    return found


# --- Reading ------------------------------------------------------------------------------------------------


class ExpertAdapter(NamedTuple):
    """The adapter of one projection of a layer's experts."""

    a: np.ndarray  # float32 [experts, rank, in]
    b: np.ndarray  # float32 [experts, out, rank]
    alpha: float  # the scale is alpha divided by this rank


def read_experts(
    slices: dict[str, Any],
    config: ModelConfig,
    asked: Sequence[str],
    rank_and_alpha: Callable[[str], tuple[int, float]],
    file: Path,
) -> dict[str, ExpertAdapter]:
    """Read the adapters of experts by module and layer, such as `model.layers.0.mlp.experts.up_proj`.

    Their tensors are removed from `slices`.

    Args:
      asked: the `target_parameters` that are in `FUSED`.
      rank_and_alpha: returns both for the full name of a fused parameter.

    Raises:
      UserError: tensors are missing, or have the wrong shape or dtype.
    """
    found: dict[str, ExpertAdapter] = {}
    for name in asked:
        for layer in range(config.num_hidden_layers):
            place = f"model.layers.{layer}.{_where(name, len(asked) > 1)}"
            keys = [f"{place}.{part}.weight" for part in _PARTS]
            if missing := [key for key in keys if key not in slices]:
                raise UserError(f"{file}: target_parameters asks for {name}, but {missing[0]} is missing")
            rank, alpha = rank_and_alpha(f"model.layers.{layer}.{name}")
            a, b = _unfused([slices.pop(key) for key in keys], keys, name, rank, config, file)
            parts = _split(name, a, b)
            for part, (own_a, own_b) in zip(FUSED[name], parts, strict=True):
                own = ExpertAdapter(own_a, own_b, alpha * own_a.shape[1] / rank)
                found[f"model.layers.{layer}.mlp.experts.{part}"] = own
    return found


def _unfused(given: list[Any], keys: list[str], name: str, rank: int, config: ModelConfig, file: Path):
    """A `[experts, rank, in]` and B `[experts, out, rank]` of a fused parameter."""
    assert config.experts is not None
    n, hidden, ffn = config.experts.num_experts, config.hidden_size, config.experts.moe_intermediate_size
    in_size, out_size = (hidden, 2 * ffn) if name == GATE_UP else (ffn, hidden)
    arrays = []
    for tensor, key, shape in zip(given, keys, ((rank * n, in_size), (out_size, rank * n)), strict=True):
        check_slice(tensor, key, shape, f"r and rank_pattern, for {n} experts,", file)
        arrays.append(slice_values(tensor, key, file))
    a, b = arrays
    return a.reshape(n, rank, in_size), b.reshape(out_size, rank, n).transpose(2, 0, 1)


def _split(name: str, a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split a fused parameter into its projections, which are separate here.

    If the two halves of B use separate halves of the rank, each gets its own; otherwise each gets all of A.
    """
    if name == DOWN:
        return [(a, b)]
    half, rows = a.shape[1] // 2, b.shape[1] // 2
    gate, up = b[:, :rows], b[:, rows:]
    if a.shape[1] == 2 * half and not gate[:, :, half:].any() and not up[:, :, :half].any():
        return [(a[:, :half], gate[:, :, :half]), (a[:, half:], up[:, :, half:])]
    return [(a, gate), (a, up)]
