"""The conditions compared: an arm is full fine-tuning, or an adapter with a certain placement and rank.

arm = parse_arm("all_layer:16", model)                       # model: a ModelConfig
arm = parse_arm("attention_only~mlp_only:64", model)         # rank 106 on SmolLM2: as many parameters
arm.label, arm.lora.rank, arm.parameters, arm.residual
parse_arm("full@8", model).batch_rows                        # 8 rows a step instead of the configuration's
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import ValidationError

from jaxlora.config import Condition, LoraConfig, one_line
from jaxlora.lora import check_targets, count_trainable
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import count_parameters
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.errors import UserError

FULL = "full"
HEAD = "lm_head"
WORST_MATCH = 0.05  # matched placements may differ in parameters by at most this fraction
_PLACE = r"[a-z_]+(?:\+[a-z_]+)*"
_FORM = re.compile(rf"(?:{FULL}|({_PLACE})(?:~({_PLACE}))?:(\d+))(?:@(\d+))?")
MOST_ROWS = 65_536  # per step


@dataclass(frozen=True)
class Arm:
    """One condition. `lora` is None for full fine-tuning; `residual` is the relative error of a match."""

    label: str  # in file names and tables, such as `all_layer-r16`
    lora: LoraConfig | None
    parameters: int
    batch_rows: int
    residual: float | None = None

    @property
    def what(self) -> Literal["lora", "full"]:
        return "full" if self.lora is None else "lora"

    @property
    def rank(self) -> int | None:
        return None if self.lora is None else self.lora.rank

    @property
    def placement(self) -> str:
        """The label without the rank."""
        return self.label.rpartition("-r")[0] if self.lora else FULL


def parse_arms(
    texts: Sequence[str], model: ModelConfig, batch_rows: int = 32, alpha: float = 32.0
) -> list[Arm]:
    """The arms of a configuration, in its order.

    Raises:
      UserError: one is not understood, is impossible for this model, or is named twice.
    """
    arms = [parse_arm(text, model, batch_rows, alpha) for text in texts]
    labels = [f"{arm.label}@{arm.batch_rows}" for arm in arms]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"config.regret.arms: {twice[0]} is named twice; give each arm once")
    return arms


def parse_arm(text: str, model: ModelConfig, batch_rows: int = 32, alpha: float = 32.0) -> Arm:
    """One arm, see `jaxlora.config.RegretConfig`; raises like `parse_arms`.

    Args:
      batch_rows: rows per step, unless the text states them.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise UserError(
            f"config.regret.arms: {text!r:.80} is not understood; give full, PLACEMENT:RANK such as"
            " all_layer:16, or PLACEMENT~OTHER:RANK, each with @ROWS if need be"
        )
    place, other, number, given = match.groups()
    rows = int(given) if given else batch_rows
    if not 0 < rows <= MOST_ROWS:
        raise UserError(f"config.regret.arms: {text}: give 1 to {MOST_ROWS:,} rows per step")
    if place is None:
        return Arm(FULL, None, count_parameters(model), rows)
    rank, residual = int(number), None
    if other is not None:
        rank, residual = matched_rank(place, other, rank, model, alpha)
    lora = _lora(text, place, rank, alpha)
    return Arm(f"{place}-r{rank}", lora, _count(text, lora, model), rows, residual)


def matched_rank(place: str, other: str, rank: int, model: ModelConfig, alpha: float) -> tuple[int, float]:
    """The rank at which `place` has as many parameters as `other` at `rank`, and the relative error.

    Raises:
      UserError: the nearest rank is off by more than `WORST_MATCH`.
    """
    text = f"{place}~{other}:{rank}"
    wanted = _count(text, _lora(text, other, rank, alpha), model)
    of_one = _count(text, _lora(text, place, 1, alpha), model)
    found = max(1, round(wanted / of_one))
    residual = found * of_one / wanted - 1
    if abs(residual) > WORST_MATCH:
        enough = math.ceil(rank * 0.5 / WORST_MATCH)
        raise UserError(
            f"config.regret.arms: {text} cannot be matched: the nearest rank, {found}, has {residual:+.0%}"
            f" parameters; give a higher rank, such as {enough}"
        )
    return found, residual


def _lora(text: str, place: str, rank: int, alpha: float) -> LoraConfig:
    names = place.split("+")
    head = HEAD in names and len(names) > 1
    if head:
        names.remove(HEAD)
    named = [name for name in names if name in get_args(Condition)]
    if named and len(names) > 1:
        raise UserError(f"config.regret.arms: {text}: {named[0]} stands alone, or with {HEAD}")
    try:
        return LoraConfig(targets=",".join(names), rank=rank, alpha=alpha, output_head=head)
    except ValidationError as error:
        raise UserError(f"config.regret.arms: {text}: {one_line(error)}") from None


def _count(text: str, lora: LoraConfig, model: ModelConfig) -> int:
    spec = ModelSpec(model, lora)
    try:
        check_targets(spec)
    except UserError as error:
        raise UserError(f"config.regret.arms: {text}: {error}") from None
    return count_trainable(spec)
