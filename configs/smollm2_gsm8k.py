"""The study in small, on SmolLM2-135M-Instruct and GSM8K; the same as `--config smollm2_gsm8k`, by path."""

from jaxlora.configs.smollm2_gsm8k import get_config

__all__ = ["get_config"]
