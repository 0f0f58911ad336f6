"""The parity interface over this package: the programs of a real run, packed rows and all.

backend = OurBackend(model_dir, "float32")
trainer = backend.load(Path("adapter"))          # start from a given adapter
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import load_base
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import Condition, LoraConfig, MeshConfig, OptimConfig
from jaxlora.data.packing import Batch, cut_into_buffers, largest_buffer, pack, round_up
from jaxlora.data.render import RenderedRow
from jaxlora.generate.decode import generate
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import init_lora
from jaxlora.models.attention import pick_backend, segment_attention
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.families import load_model_config
from jaxlora.models.head import head_parts, token_nll
from jaxlora.parity.backend import AdamStep, Pass, Reduction, reduced
from jaxlora.runtime.devices import scan_layers
from jaxlora.sharding import make_mesh, place_batch, place_trained, token_multiple
from jaxlora.train.step import Compute, TrainState, init_state, make_eval_step, make_train_step

CHUNK = 128  # positions whose float32 logits are held at once
BUFFER = 512  # tokens of a packed buffer, and multiples for longer rows: few shapes, few compilations
TINKER_ALPHA = 32.0  # fixed by the service, whatever the rank
MAX_ROWS = 32  # rows of one packed buffer


class OurBackend:
    """Adapters on one base, trained by this package.

    Args:
      reduction: the loss of the service that is compared with.
      mesh: where it runs; None: all devices.
    """

    def __init__(
        self, model_dir: Path, dtype: str = "float32", reduction: Reduction = "sum", mesh: Mesh | None = None
    ):
        platform = jax.default_backend()
        if dtype == "float32":  # GPUs and TPUs would multiply float32 in fewer bits
            jax.config.update("jax_default_matmul_precision", "highest")
        self.dtype, self.reduction = dtype, reduction
        self.mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        self.compute = Compute(pick_backend("auto", platform, dtype, self.mesh.size), max_segments=MAX_ROWS)
        self.scan = scan_layers("auto", platform)
        self.config = load_model_config(model_dir)
        with jax.set_mesh(self.mesh):
            self.frozen = load_base(model_dir, ModelSpec(self.config, None, dtype, self.scan), self.mesh)

    def create(self, condition: Condition, rank: int, seed: int) -> OurTrainer:
        """A fresh adapter of this package's own initialisation."""
        lora = LoraConfig(targets=condition, rank=rank, alpha=TINKER_ALPHA)
        spec = ModelSpec(self.config, lora, self.dtype, self.scan)
        return OurTrainer(self, spec, init_lora(spec, seed))

    def load(self, adapter: Path) -> OurTrainer:
        """Start from the adapter in a PEFT folder; its rank, alpha and placement are its own."""
        config, lora, _, _ = read_adapter(adapter, self.config)
        return OurTrainer(self, ModelSpec(self.config, config, self.dtype, self.scan), lora)

    def describe(self) -> dict[str, str]:
        """See `Backend`."""
        return {"trainer": "jaxlora", "jax": version("jax"), "dtype": self.dtype}


class OurTrainer:
    """One adapter in training, on the base of its backend."""

    def __init__(self, backend: OurBackend, spec: ModelSpec, lora: Tree):
        self.backend, self.spec = backend, spec
        self.lora = place_trained(backend.mesh, spec, lora)
        self.saved: dict[str, Tree] = {}
        self._kept: list[RenderedRow] = []
        self._adam: AdamStep | None = None

    def forward(self, rows: Sequence[RenderedRow]) -> Pass:
        """See `Trainer`."""
        logprob_step, eval_step = _forward_programs(self.spec, self.backend.compute)
        frozen, logprobs, total = self.backend.frozen, [], 0.0
        with jax.set_mesh(self.backend.mesh):
            for part in cut_into_buffers([row.n_tokens for row in rows], BUFFER):  # one buffer at a time
                chosen = [rows[i] for i in part]
                batch = place_batch(self.backend.mesh, self._batch(chosen))
                values = np.asarray(logprob_step(self.lora, frozen, batch))[0, 0]
                loss, _ = eval_step(self.lora, frozen, batch)
                total += float(loss)
                ends = np.cumsum([row.n_tokens for row in chosen])
                logprobs += np.split(values[: ends[-1]], ends[:-1])
        return Pass(logprobs, total)

    def forward_backward(self, rows: Sequence[RenderedRow]) -> Pass:
        """See `Trainer`. The gradient itself is computed by the training step, in `optim_step`."""
        self._kept += reduced(rows, self.backend.reduction)
        return self.forward(rows)

    def optim_step(self, adam: AdamStep) -> None:
        """One step of `jaxlora.train.step`, the one that training runs."""
        if self._adam is None:
            optim = OptimConfig(b1=adam.b1, b2=adam.b2, eps=adam.eps)
            with jax.set_mesh(self.backend.mesh):
                start = place_trained(self.backend.mesh, self.spec, init_state(self.lora, optim))
            self._state: TrainState = jax.tree.map(jnp.copy, start)
            self._step = _train_program(self.spec, optim, self.backend.compute)
        assert self._adam is None or self._adam[1:] == adam[1:], "only the learning rate changes"
        self._adam = adam
        with jax.set_mesh(self.backend.mesh):
            batch = place_batch(self.backend.mesh, self._batch(self._kept))
            rate = jnp.float32(adam.learning_rate)
            self._state, _ = self._step(self._state, self.backend.frozen, batch, rate)
        self.lora = jax.tree.map(jnp.copy, self._state.lora)  # the state is donated to the next step
        self._kept = []

    def save(self, name: str) -> str:
        """See `Trainer`."""
        self.saved[name] = self.lora
        return name

    def sample(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], limit: int, end: int
    ) -> list[list[int]]:
        """See `Trainer`; the adapter is not merged."""
        adapter = self.saved[checkpoint]
        spec, lora, frozen, mesh = decode_weights(self.spec, adapter, self.backend.frozen, merge=False)
        with jax.set_mesh(mesh):
            answers = generate(
                spec,
                lora,
                frozen,
                prompts,
                eos_ids=(end,),
                max_new_tokens=limit,
                slots=len(prompts),
                backend=self.backend.compute.backend,
            )
        return [answer.tokens for answer in answers]

    def fetch(self, checkpoint: str, folder: Path) -> None:
        """See `Trainer`."""
        export_adapter(folder, self.spec, self.saved[checkpoint], "base")

    def _batch(self, rows: Sequence[RenderedRow]) -> Batch:
        assert len(rows) <= MAX_ROWS, f"{len(rows)} rows in one pass; at most {MAX_ROWS}"
        multiple = math.lcm(BUFFER, token_multiple(self.backend.mesh))
        longest = largest_buffer([row.n_tokens for row in rows], BUFFER)
        return pack(rows, (round_up(longest, multiple),), BUFFER)


@cache
def _forward_programs(spec: ModelSpec, compute: Compute):
    """Log-probabilities and loss; every trainer of the same placement shares the compiled programs."""
    return make_logprob_step(spec, compute), make_eval_step(spec, compute)


@cache
def _train_program(spec: ModelSpec, optim: OptimConfig, compute: Compute):
    return make_train_step(spec, optim, compute)


def make_logprob_step(spec: ModelSpec, compute: Compute):
    """The jitted `(lora, frozen, batch) -> log p of every target`, float32 `[buffers, batch, length]`."""

    def buffer_logprobs(lora: Tree, frozen: Tree, buffer: Tree) -> jax.Array:
        model = spec.bind(lora, frozen)

        def attend(q, k, v, cache):
            segment_ids = buffer["segment_ids"]
            return segment_attention(q, k, v, segment_ids, compute.backend, compute.max_segments), cache

        hidden, _ = model(buffer["tokens"], buffer["positions"], attend)
        weight, adapter, scales = head_parts(model)
        chunks = hidden.reshape(-1, CHUNK, hidden.shape[-1]), buffer["targets"].reshape(-1, CHUNK)
        shares = jnp.asarray(scales)
        values = jax.lax.map(lambda chunk: -token_nll(chunk[0], adapter, weight, chunk[1], shares), chunks)
        return values.reshape(buffer["targets"].shape)

    def logprobs(lora: Tree, frozen: Tree, batch: Tree) -> jax.Array:
        return jax.lax.map(lambda buffer: buffer_logprobs(lora, frozen, buffer), batch)

    return jax.jit(logprobs)
