"""The loss as PyTorch computes it."""

from __future__ import annotations

import torch

from jaxlora.data.render import RenderedRow, shifted


def torch_summed_nll(model, rows: list[RenderedRow]) -> torch.Tensor:
    """Sum over weighted targets of -log p; padding lies on the right, where causal attention never looks."""
    length = max(row.n_tokens for row in rows)
    tokens, targets = torch.zeros(2, len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        for buffer, values in zip((tokens, targets, weights), shifted(row), strict=True):
            buffer[i, : row.n_tokens] = torch.tensor(values)
    logits = model(input_ids=tokens).logits.float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (weights.flatten() * nll).sum()
