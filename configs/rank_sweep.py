"""A rank sweep: how much rank each condition needs.

The same as `--config rank_sweep`, by path; its fields are set in `jaxlora/configs/rank_sweep.py`.
"""

from jaxlora.configs.rank_sweep import get_config

__all__ = ["get_config"]
