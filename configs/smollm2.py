"""SmolLM2-135M-Instruct on your own rows: a real model that trains on a CPU.

The same as `--config smollm2`, by path; its fields are set in `jaxlora/configs/smollm2.py`.
"""

from jaxlora.configs.smollm2 import get_config

__all__ = ["get_config"]
