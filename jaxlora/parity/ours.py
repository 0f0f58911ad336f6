"""The parity interface implemented by this package's engine: the programs of a real run, with packed rows.

backend = OurBackend(model_dir, "float32")
trainer = backend.load(Path("adapter"))          # start from a given adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora import engine
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import Condition
from jaxlora.data.render import RenderedRow
from jaxlora.models.decoder import Tree
from jaxlora.parity.backend import AdamStep, Drawn, Pass, Reduction, loss_of, reduced

TINKER_ALPHA = 32.0  # fixed by the service, whatever the rank


class OurBackend:
    """Adapters on one base, trained by this package.

    Args:
      reduction: the loss reduction of the service being compared.
      mesh: where it runs; None: all devices.
    """

    def __init__(
        self, model_dir: Path, dtype: str = "float32", reduction: Reduction = "sum", mesh: Mesh | None = None
    ):
        self.dtype, self.reduction = dtype, reduction
        self.engine = engine.load(str(model_dir), dtype, mesh)

    def create(self, condition: Condition, rank: int, seed: int) -> OurTrainer:
        """A fresh adapter with this package's own initialisation."""
        return OurTrainer(self.engine.lora(rank, condition, TINKER_ALPHA, seed), self.reduction)

    def load(self, adapter: Path) -> OurTrainer:
        """Start from the adapter in a PEFT folder, with its own rank, alpha and placement."""
        return OurTrainer(self.engine.open(adapter), self.reduction)

    def describe(self) -> dict[str, str]:
        """See `Backend`."""
        return {"trainer": "jaxlora", "jax": version("jax"), "dtype": self.dtype}


class OurTrainer:
    """One adapter in training, on the base of its backend."""

    def __init__(self, trainer: engine.Trainer, reduction: Reduction):
        self.trainer, self.reduction = trainer, reduction
        self.saved: dict[str, engine.Trainer] = {}

    @property
    def lora(self) -> Tree:
        """A copy of the current adapter; the trainer's own arrays are donated to the next step."""
        return jax.tree.map(jnp.copy, self.trainer.trained)

    def forward(self, rows: Sequence[RenderedRow]) -> Pass:
        """See `Trainer`."""
        return _pass(rows, self.trainer.logprobs(rows))

    def forward_backward(self, rows: Sequence[RenderedRow], loss: str = "cross_entropy") -> Pass:
        """See `Trainer`."""
        result = self.trainer.forward_backward(reduced(rows, self.reduction), loss)
        if self.reduction == "sum":
            return Pass(result.logprobs, result.loss)
        return _pass(rows, result.logprobs, loss)

    def optim_step(self, adam: AdamStep) -> None:
        """See `Trainer`."""
        self.trainer.optim_step(adam.learning_rate, b1=adam.b1, b2=adam.b2, eps=adam.eps)

    def save(self, name: str) -> str:
        """See `Trainer`."""
        own = self.trainer
        self.saved[name] = engine.Trainer(own.engine, own.spec, self.lora, own.seed)
        return name

    def sample(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], limit: int, end: int
    ) -> list[list[int]]:
        """See `Trainer`; the adapter is not merged."""
        answers = self.saved[checkpoint].sample(prompts, limit, temperature=0, stop_ids=(end,))
        return [answer.tokens for answer in answers]

    def draw(self, checkpoint: str, prompt: Sequence[int], limits: Sequence[int], end: int) -> list[Drawn]:
        """See `Trainer`."""
        drawn = []
        for seed, limit in enumerate(limits):
            (answer,) = self.saved[checkpoint].sample([list(prompt)], limit, seed=seed, stop_ids=(end,))
            drawn.append(Drawn(answer.tokens, answer.logprobs))
        return drawn

    def fetch(self, checkpoint: str, folder: Path) -> None:
        """See `Trainer`."""
        saved = self.saved[checkpoint]
        export_adapter(folder, saved.spec, saved.trained, "base")


def _pass(rows: Sequence[RenderedRow], logprobs: list[np.ndarray], loss: str = "cross_entropy") -> Pass:
    """Log-probabilities with the loss computed from them and the rows' own weights."""
    pairs = zip(rows, logprobs, strict=True)
    return Pass(logprobs, sum(loss_of(row, values, loss) for row, values in pairs))
