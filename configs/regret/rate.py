"""A closer look at learning rates; the same as `--config regret/rate`, by path."""

from jaxlora.configs.regret.rate import get_config

__all__ = ["get_config"]
