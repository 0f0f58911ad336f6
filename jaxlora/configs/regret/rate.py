"""A wider and finer sweep of learning rates: three ranks and full fine-tuning at nine rates each.

jaxlora study --config regret/rate
"""

from dataclasses import replace

from jaxlora.config import RegretConfig, RunConfig
from jaxlora.configs.regret import rank


def get_config() -> RunConfig:
    arms = ("full", "all_layer:1", "all_layer:32", "all_layer:512")
    return replace(
        rank.get_config(), prefix="llama-1b-rates", regret=RegretConfig(arms=arms, rates=9, repeats=2)
    )
