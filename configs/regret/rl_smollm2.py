"""SmolLM2-135M learns from rewards at several ranks; the same as `--config regret/rl_smollm2`, by path."""

from jaxlora.configs.regret.rl_smollm2 import get_config

__all__ = ["get_config"]
