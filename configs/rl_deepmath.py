"""Learning DeepMath from rewards at rank 1.

The same as `--config rl_deepmath`, by path; its fields are set in `jaxlora/configs/rl_deepmath.py`.
"""

from jaxlora.configs.rl_deepmath import get_config

__all__ = ["get_config"]
