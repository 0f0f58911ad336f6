"""Random rows to train on."""

from __future__ import annotations

import numpy as np

from jaxlora.data.render import RenderedRow


def random_rows(n: int, vocab: int = 160, seed: int = 0) -> list[RenderedRow]:
    """Rows of 12 to 59 random tokens, of which the first few, the prompt, weigh nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        length, prompt = int(rng.integers(12, 60)), int(rng.integers(3, 9))
        tokens = rng.integers(0, vocab, length).astype(np.int32)
        weights = (np.arange(length) >= prompt).astype(np.float32)
        rows.append(RenderedRow(str(i), tokens, weights))
    return rows
