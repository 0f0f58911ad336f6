"""The ratio of best rates in short runs; the same as `--config regret/short_runs`, by path."""

from jaxlora.configs.regret.short_runs import get_config

__all__ = ["get_config"]
