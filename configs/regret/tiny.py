"""The experiments in miniature; the same as `--config regret/tiny`, by path."""

from jaxlora.configs.regret.tiny import get_config

__all__ = ["get_config"]
