"""Ranks 1 to 512 and full fine-tuning; the same as `--config regret/rank`, by path."""

from jaxlora.configs.regret.rank import get_config

__all__ = ["get_config"]
