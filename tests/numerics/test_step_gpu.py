"""A GPU's training step in CUDA graphs, loop over answers and all, computes what it computes without them.

Needs a GPU: `JAX_PLATFORMS=cuda python -m pytest -n 0 tests/numerics/test_step_gpu.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from helpers.hf_models import make_checkpoint, our_model
from helpers.rows import random_rows

from jaxlora.config import LoraConfig, OptimConfig
from jaxlora.data.packing import pack
from jaxlora.lora import init_lora
from jaxlora.models import head
from jaxlora.train import step
from jaxlora.train.step import Compute, init_state, make_train_step

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="CUDA graphs need a GPU")


@pytest.mark.parametrize("max_tokens", [384, 128], ids=["one buffer", "three buffers"])
def test_a_graph_with_the_loop_over_answers_in_it_changes_nothing(tmp_path, monkeypatch, max_tokens):
    make_checkpoint(tmp_path)
    spec, frozen = our_model(tmp_path, lora=LoraConfig(rank=4))
    lora = jax.tree.map(lambda x: x + 0.01, init_lora(spec, 0))
    batch = jax.tree.map(jnp.asarray, pack(random_rows(6), (max_tokens,), max_tokens))
    monkeypatch.setattr(head, "CHUNK", 32)  # several chunks a buffer

    def run(options):
        monkeypatch.setattr(step, "step_options", lambda: options)
        step._train_step.cache_clear()
        compiled = (
            make_train_step(spec, OptimConfig(), Compute())
            .lower(init_state(lora, OptimConfig()), frozen, batch, jnp.float32(1e-3))
            .compile()
        )
        metrics = []
        state = init_state(jax.tree.map(jnp.copy, lora), OptimConfig())
        for _ in range(4):  # the first runs before there is a graph, the second makes it
            state, values = compiled(state, frozen, batch, jnp.float32(1e-3))
            metrics.append(jax.device_get(values))
        return metrics

    with jax.default_matmul_precision("highest"):
        options = step.step_options()
        ours, expected = run(options), run(options | {"xla_gpu_enable_command_buffer": ""})
    step._train_step.cache_clear()
    for one, other in zip(ours, expected, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
