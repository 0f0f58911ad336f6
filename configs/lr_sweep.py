"""A learning-rate sweep for each condition.

The same as `--config lr_sweep`, by path; its fields are set in `jaxlora/configs/lr_sweep.py`.
"""

from jaxlora.configs.lr_sweep import get_config

__all__ = ["get_config"]
