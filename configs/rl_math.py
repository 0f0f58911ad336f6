"""Learning MATH from rewards at rank 1.

The same as `--config rl_math`, by path; its fields are set in `jaxlora/configs/rl_math.py`.
"""

from jaxlora.configs.rl_math import get_config

__all__ = ["get_config"]
