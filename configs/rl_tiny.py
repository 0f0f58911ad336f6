"""Learning from rewards in miniature.

The same as `--config rl_tiny`, by path; its fields are set in `jaxlora/configs/rl_tiny.py`.
"""

from jaxlora.configs.rl_tiny import get_config

__all__ = ["get_config"]
