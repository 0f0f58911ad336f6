"""Adapters that do something, and our logits under them: shared by the tests of adapters."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxlora.checkpoints.base import load_base, random_base
from jaxlora.config import LoraConfig, MeshConfig
from jaxlora.lora import init_lora
from jaxlora.models.attention import segment_attention
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.families import load_model_config
from jaxlora.models.spec import ModelConfig
from jaxlora.sharding import make_mesh

TOKENS = np.random.default_rng(0).integers(0, 160, (2, 24))

# every placement, with and without the output head
PLACEMENTS = {
    f"{condition}{' and head' if head else ''}": LoraConfig(targets=condition, output_head=head)
    for condition in ("attention_only", "mlp_only", "all_layer")
    for head in (False, True)
}


def load(folder: Path, lora: LoraConfig | None = None, dtype: str = "float32", scan: bool = True):
    """Spec and frozen base of a checkpoint, on one device."""
    spec = ModelSpec(load_model_config(folder), lora, dtype, scan)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    return spec, load_base(folder, spec, mesh)


def trained_lora(spec: ModelSpec, seed: int = 0) -> Tree:
    """An adapter whose B is not zero."""
    lora = init_lora(spec, seed)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), jnp.float32), lora)


def random_model(layers: int, rank: int) -> tuple[ModelSpec, Tree, Tree]:
    """Spec, adapter and base of a small random model whose layers are unrolled, as decoding takes them."""
    spec = ModelSpec(
        ModelConfig(
            vocab_size=160,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
        LoraConfig(rank=rank),
        "float32",
        scan=False,
    )
    frozen = random_base(spec, 0, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), std=0.15)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    lora = jax.tree.map(lambda x: 0.05 * jax.random.normal(next(keys), x.shape), init_lora(spec, 0))
    return spec, lora, frozen


def our_logits(
    spec: ModelSpec,
    lora: Tree,
    frozen: Tree,
    tokens: np.ndarray = TOKENS,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Logits `[batch, length, vocab]` as float32; positions count from 0 unless they are given."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segment_ids = np.ones_like(tokens)

    @jax.jit
    def run(lora, frozen):
        model = spec.bind(lora, frozen)
        hidden, _ = model(
            tokens, positions, lambda q, k, v, _: (segment_attention(q, k, v, segment_ids), None)
        )
        return model.logits(hidden)

    return np.asarray(run(lora, frozen), np.float32)


def torch_logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """The same from a PyTorch model."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.float().numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest relative difference (norm over the vocabulary) at any position."""
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max())
