"""Learning GSM8K from rewards at rank 1.

The same as `--config rl_gsm8k`, by path; its fields are set in `jaxlora/configs/rl_gsm8k.py`.
"""

from jaxlora.configs.rl_gsm8k import get_config

__all__ = ["get_config"]
