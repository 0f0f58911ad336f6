"""Training all weights computes what PyTorch and torch.optim.AdamW compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.hf_models import FAMILY_SHAPES, make_checkpoint
from helpers.rows import random_rows
from helpers.torch_loss import torch_summed_nll

from jaxlora.checkpoints.base import _arrays, load_base
from jaxlora.config import MeshConfig, OptimConfig
from jaxlora.data.packing import pack
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.sharding import make_mesh
from jaxlora.train.step import Compute, init_state, make_train_step

STEPS = 30


def named(spec, weights) -> dict[str, np.ndarray]:
    """Every weight by its Hugging Face key."""
    return {key: np.asarray(get()) for key, _, get in _arrays(spec, weights)}


@pytest.mark.parametrize(
    ("family", "tied", "optim"),
    [
        ("qwen3", False, OptimConfig()),
        ("qwen3", True, OptimConfig(weight_decay=0.1)),
        ("qwen3", False, OptimConfig(b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=5.0)),
        ("llama", True, OptimConfig()),
        ("qwen2", False, OptimConfig(weight_decay=0.1)),
    ],
    ids=["Adam, untied", "AdamW, tied", "AdamW, clipped", "Llama, tied", "Qwen2.5, with biases"],
)
def test_thirty_steps_equal_torch(tmp_path, family, tied, optim):
    shape = FAMILY_SHAPES[family] | {"tie_word_embeddings": tied}
    reference = make_checkpoint(tmp_path, family=family, num_hidden_layers=2, **shape)
    spec = ModelSpec(load_model_config(tmp_path), None, "float32", full=True)
    start = load_base(tmp_path, spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    rows, rate = random_rows(8 * 10), 1e-3
    adam = torch.optim.AdamW(
        reference.parameters(), rate, (optim.b1, optim.b2), optim.eps, weight_decay=optim.weight_decay
    )
    state = init_state(jax.tree.map(jnp.copy, start), optim)
    step_fn = make_train_step(spec, optim, Compute())
    for step in range(STEPS):
        chosen = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        state, metrics = step_fn(state, {}, pack(chosen, (512,), 512), jnp.float32(rate))
        adam.zero_grad()
        total = torch_summed_nll(reference, chosen)
        total.backward()
        if optim.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), optim.clip_norm)
            assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
            assert norm.item() > optim.clip_norm  # it clips
        adam.step()
        assert float(metrics["nll"]) == pytest.approx(total.item(), rel=1e-5), step
    before, after = named(spec, start), named(spec, state.trained)
    theirs = {name: value.detach().numpy() for name, value in reference.named_parameters()}
    assert set(after) == set(theirs)
    moved = np.concatenate([(after[name] - before[name]).ravel() for name in theirs])
    apart = np.concatenate([(after[name] - theirs[name]).ravel() for name in theirs])
    assert np.linalg.norm(apart) < 1e-3 * np.linalg.norm(moved)
    assert all(np.any(after[name] != before[name]) for name in theirs)


def test_small_rates_move_the_float32_master_weights_under_bfloat16(tmp_path):
    """In bfloat16 such steps would round away: 1e-5 on weights of 0.15."""
    make_checkpoint(tmp_path, num_hidden_layers=2)
    spec = ModelSpec(load_model_config(tmp_path), None, "bfloat16", full=True)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    start = load_base(tmp_path, ModelSpec(spec.config, None, "float32"), mesh)
    state = init_state(jax.tree.map(jnp.copy, start), OptimConfig())
    step_fn = make_train_step(spec, OptimConfig(), Compute())
    batch = pack(random_rows(8), (512,), 512)
    for _ in range(10):
        state, _ = step_fn(state, {}, batch, jnp.float32(1e-5))
    used = np.unique(batch["tokens"])
    for path, x in jax.tree.leaves_with_path(state.trained):
        assert x.dtype == jnp.float32
        changed = np.asarray(x) != np.asarray(jax.tree.leaves(_at(start, path))[0])
        if path[0].key == "embed_tokens":  # tokens that never occur have no gradient
            changed = changed[used]
        assert changed.mean() > 0.99, jax.tree_util.keystr(path)


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree
