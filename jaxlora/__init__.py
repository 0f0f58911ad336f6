"""jaxlora: LoRA fine-tuning of Qwen3 in JAX, with every number checked against an independent reference."""

__version__ = "0.1.0"
