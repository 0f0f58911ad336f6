"""The embedded default: a tiny Qwen3 shipped with the package.

The same as `--config tiny`, by path; its fields are set in `jaxlora/configs/tiny.py`.
"""

from jaxlora.configs.tiny import get_config

__all__ = ["get_config"]
