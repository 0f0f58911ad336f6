"""The published rule for learning rates, by model family, width, and LoRA or full fine-tuning.

    published_rate(config, "lora")          # 2.856e-4 for Llama 3.1 8B
    published_rate(config, "full")          # a tenth of it
    rate_warning(config, "lora", 5e-7)      # a sentence; None if the rate is not far below the rule

The rule is `LR = 5e-5 x 10 x (2000 / hidden)^p`, without the 10 for full fine-tuning, where p is 0.781 for
Llama and 0.0775 for Qwen. It was fitted to supervised runs of 14 models with 1,024 to 8,192 hidden units; it
says nothing about reinforcement learning, and little about runs of under 100 steps, which prefer higher
rates.
"""

from __future__ import annotations

from typing import Literal

from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.errors import UserError

POWERS = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}  # by `model_type`
WIDTHS = (1024, 8192)  # hidden units of the models that it was fitted to
FULL_RATE, RATIO = 5e-5, 10.0
FAR_BELOW = 30.0  # an adapter hardly moves at a rate this many times below the rule


def published_rate(config: ModelConfig, what: Literal["lora", "full"]) -> float:
    """The rule's learning rate for supervised fine-tuning.

    Raises:
      UserError: the rule does not cover this family.
    """
    if config.model_type not in POWERS:
        raise UserError(
            f"no learning rate is published for the family {config.model_type!r}, only for"
            f" {', '.join(POWERS)}; give config.regret.lora_rate and config.regret.full_rate, and sweep wide"
        )
    rate = FULL_RATE * (2000 / config.hidden_size) ** POWERS[config.model_type]
    return rate * RATIO if what == "lora" else rate


def outside_domain(config: ModelConfig) -> str | None:
    """Why the rule is only a guess for this model; None if it was fitted to models of this width."""
    low, high = WIDTHS
    if low <= config.hidden_size <= high:
        return None
    return f"the rule was fitted to {low:,} to {high:,} hidden units; this model has {config.hidden_size:,}"


def rate_warning(config: ModelConfig, what: Literal["lora", "full"], rate: float) -> str | None:
    """A one-line warning if an adapter's rate is far below the rule; None if not, or if there is no rule."""
    if what != "lora" or config.model_type not in POWERS:
        return None
    usual = published_rate(config, "lora")
    if rate * FAR_BELOW >= usual:
        return None
    return (
        f"a learning rate of {rate:g} is {usual / rate:,.0f} times below the published rule for adapters on"
        f" this model ({usual:.2g}); it looks like one of full fine-tuning, and the adapter will hardly learn"
    )
