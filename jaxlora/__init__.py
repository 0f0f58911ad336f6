"""LoRA and full fine-tuning of language models in JAX, checked against independent references.

import jaxlora
trainer = jaxlora.load("embedded:base").lora(rank=8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlora.engine import Engine

__version__ = "0.1.0"


def load(path: str, dtype: str | None = None, mesh: Any = None, base_dtype: str | None = None) -> Engine:
    """Load a base, to train or sample from; see `jaxlora.engine.load`."""
    from jaxlora import engine  # importing JAX takes seconds

    return engine.load(path, dtype, mesh, base_dtype)
