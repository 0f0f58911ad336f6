"""Batch sizes; the same as `--config regret/batch`, by path."""

from jaxlora.configs.regret.batch import get_config

__all__ = ["get_config"]
