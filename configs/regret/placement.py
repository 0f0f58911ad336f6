"""Where adapters sit; the same as `--config regret/placement`, by path."""

from jaxlora.configs.regret.placement import get_config

__all__ = ["get_config"]
