"""A small study with SmolLM2-135M-Instruct on GSM8K; the same as `--config smollm2_gsm8k`, by path."""

from jaxlora.configs.smollm2_gsm8k import get_config

__all__ = ["get_config"]
