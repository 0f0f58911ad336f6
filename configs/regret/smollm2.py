"""Adapters against full fine-tuning on SmolLM2-135M; the same as `--config regret/smollm2`, by path."""

from jaxlora.configs.regret.smollm2 import get_config

__all__ = ["get_config"]
