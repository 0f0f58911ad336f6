"""The study: Qwen3-8B, attention only versus all layers.

The same as `--config main`, by path; its fields are set in `jaxlora/configs/main.py`.
"""

from jaxlora.configs.main import get_config

__all__ = ["get_config"]
