"""The tensors of experts in files: one per expert, or fused tensors for all experts of a layer.

    check_layout(stored, "path/to/Qwen3-30B-A3B")          # refuses a mix
    tensor = take(stored, weight, key, "path/to/...")      # reads as [experts, out, in] from any layout

Files on the Hub have `...mlp.experts.{expert}.gate_proj.weight`. Transformers 5 keeps in memory, and some
tools write, `...mlp.experts.gate_up_proj` `[experts, 2 ffn, hidden]`, gate first, and
`...mlp.experts.down_proj`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlora.checkpoints.tensors import StoredTensor
from jaxlora.models.spec import Weight
from jaxlora.runtime.errors import UserError

# projection -> the fused tensor that contains it, and which half of its rows.
FUSED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None)}
_SINGLE = re.compile(r"\.mlp\.experts\.\d+\.")
_WHOLE = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class OfExperts(StoredTensor):
    """Matrices of all experts, `[experts, out, in]`, from one tensor per expert or half of a fused one."""

    parts: tuple[StoredTensor, ...]
    half: int | None = None  # which half of the rows of each expert's matrix in a fused tensor

    @property
    def row_bytes(self) -> int:
        """Bytes of one expert's matrix."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The matrices of experts `[stop - start, out, in]`, read now."""
        if len(self.parts) == 1:
            found = self.parts[0].rows(start, stop)
            if self.half is None:
                return found
            size = self.shape[1]
            return np.ascontiguousarray(found[:, self.half * size : (self.half + 1) * size])
        return np.stack([part.rows(0, self.shape[1]) for part in self.parts[start:stop]])


def check_layout(stored: dict[str, StoredTensor], directory: str | Path) -> None:
    """Refuse a checkpoint that has both kinds of tensors: one kind would be ignored.

    Raises:
      UserError: it has both.
    """
    single = next(filter(_SINGLE.search, stored), None)
    whole = next(filter(_WHOLE.search, stored), None)
    if single is not None and whole is not None:
        raise UserError(
            f"{directory}: holds experts both separately ({single}) and fused ({whole}); keep one of them"
        )


def take(stored: dict[str, StoredTensor], weight: Weight, key: str, directory: str | Path) -> StoredTensor:
    """Remove the tensor of one weight in one layer from `stored`, with all experts as one tensor.

    Args:
      key: its Hugging Face key, containing `{expert}` for experts.

    Raises:
      UserError: it is missing, or the experts' tensors differ in shape or dtype.
    """
    if not weight.experts:
        return _found(stored.pop(key, None), key, directory)
    fused, half = FUSED[weight.name]
    name = key.partition("{expert}")[0] + fused
    if name in stored:
        # gate and up share a tensor; up is read last.
        whole = stored[name] if half == 0 else stored.pop(name)
        shape = whole.shape
        if half is not None and len(shape) == 3 and shape[1] % 2 == 0:
            shape = (shape[0], shape[1] // 2, shape[2])
        return OfExperts(whole.file, key, shape, whole.dtype, whole.offset, (whole,), half)
    names = [key.format(expert=i) for i in range(weight.experts)]
    parts = [_found(stored.pop(one, None), one, directory) for one in names]
    first = parts[0]
    for part in parts:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            own, others = (f"{one.dtype} {one.shape}" for one in (part, first))
            raise UserError(f"{directory}: {part.key} is {own}, but others of its layer are {others}")
    return OfExperts(first.file, key, (len(parts), *first.shape), first.dtype, 0, tuple(parts))


def _found(tensor: StoredTensor | None, key: str, directory: str | Path) -> StoredTensor:
    if tensor is None:
        raise UserError(f"{directory}: no tensor {key}; the checkpoint is incomplete")
    return tensor
