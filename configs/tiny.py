"""The embedded default: a tiny Qwen3 that ships with the package.

The same as `--config tiny`, by path; its fields stand in `jaxlora/configs/tiny.py`.
"""

from jaxlora.configs.tiny import get_config

__all__ = ["get_config"]
