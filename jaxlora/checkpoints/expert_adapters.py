"""Adapters of experts in PEFT's form: one pair of matrices for all experts of a layer.

    tensors = dict(expert_tensors(spec, lora))     # "...mlp.experts.lora_A.weight": [rank * experts, in], ...
    found = read_experts(slices, config, asked, rank_and_alpha, file)    # takes theirs out of `slices`

PEFT adapts the fused parameters of Transformers 5, `target_parameters` `mlp.experts.gate_up_proj` and
`mlp.experts.down_proj`. A is `[rank * experts, in]` with an expert's rows side by side, B is
`[out, rank * experts]` with the experts of one rank side by side. Where both are adapted, the wrapper of the
first is inside that of the second. Our gate and up have an A each: fused, one is above the other at twice the
rank, and B holds a block for each.
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
# A fused parameter's projections, and where its tensors lie if it is the only one or one of both.
FUSED = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
_ALONE, _INNER = "mlp.experts", "mlp.experts.base_layer"
_PARTS = ("lora_A", "lora_B")


def fused_targets(spec: ModelSpec) -> dict[str, list[Weight]]:
    """PEFT's `target_parameters` of an adapter, each with our weights."""
    own = {weight.name: weight for weight in spec.adapted if weight.experts}
    return {name: [own[part] for part in parts] for name, parts in FUSED.items() if parts[0] in own}


def _where(name: str, both: bool) -> str:
    return _INNER if both and name == GATE_UP else _ALONE


# --- Out ----------------------------------------------------------------------------------------------------


def expert_tensors(spec: ModelSpec, lora: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Name (without PEFT's prefix) and array of each tensor; layers without an adapter have none.

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
    """Rank and alpha of each target as PEFT's patterns have them; by layer where layers differ."""
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


# --- In -----------------------------------------------------------------------------------------------------


class ExpertAdapter(NamedTuple):
    """The adapter of one projection of a layer's experts."""

    a: np.ndarray  # float32 [experts, rank, in]
    b: np.ndarray  # float32 [experts, out, rank]
    alpha: float  # what is divided by this rank


def read_experts(
    slices: dict[str, Any],
    config: ModelConfig,
    asked: Sequence[str],
    rank_and_alpha: Callable[[str], tuple[int, float]],
    file: Path,
) -> dict[str, ExpertAdapter]:
    """The adapters of experts by module and layer, such as `model.layers.0.mlp.experts.up_proj`.

    Their tensors are taken out of `slices`.

    Args:
      asked: the `target_parameters`, of those in `FUSED`.
      rank_and_alpha: of a fused parameter by its whole name.

    Raises:
      UserError: tensors are missing or of the wrong shape or dtype.
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
    """The projections of a fused parameter, which ours keep apart.

    Where the two halves of B use two halves of the rank, each has its own; else each takes the whole A.
    """
    if name == DOWN:
        return [(a, b)]
    half, rows = a.shape[1] // 2, b.shape[1] // 2
    gate, up = b[:, :rows], b[:, rows:]
    if a.shape[1] == 2 * half and not gate[:, :, half:].any() and not up[:, :, :half].any():
        return [(a[:, :half], gate[:, :, :half]), (a[:, half:], up[:, :, half:])]
    return [(a, gate), (a, up)]
