"""Adapter placement: attention, MLP, both; at the post's ranks, at equal parameters, with the output head.

    jaxlora study --config regret/placement

`attention_only~mlp_only:128` is the attention rank with as many parameters as rank 128 on the MLP; the report
states the remaining difference. The post's own parameter table has an adapter on the head in every row.
"""

from dataclasses import replace

from jaxlora.config import RegretConfig, RunConfig
from jaxlora.configs.regret import rank

POST = ("attention_only:256", "mlp_only:256", "all_layer:256", "mlp_only:128")
MATCHED = ("attention_only~mlp_only:128", "attention_only~mlp_only:256")
WITH_HEAD = tuple(arm.replace(":", "+lm_head:") for arm in POST)


def get_config() -> RunConfig:
    arms = (*POST, *MATCHED, *WITH_HEAD)
    return replace(rank.get_config(), prefix="llama-1b-places", regret=RegretConfig(arms=arms, repeats=2))
