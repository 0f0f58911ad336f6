"""Your own rows, with nothing to set but their path.

The same as `--config own`, by path; its fields are set in `jaxlora/configs/own.py`.
"""

from jaxlora.configs.own import get_config

__all__ = ["get_config"]
