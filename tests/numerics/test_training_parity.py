"""Training computes what PyTorch + PEFT + torch.optim.Adam compute with the study's settings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.hf_models import FAMILY_SHAPES, make_checkpoint
from helpers.rows import random_rows
from helpers.torch_loss import torch_summed_nll
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from jaxlora.checkpoints.base import load_base
from jaxlora.config import LoraConfig, MeshConfig, OptimConfig, TrainConfig
from jaxlora.data.packing import pack
from jaxlora.data.render import shifted
from jaxlora.lora import get_path, init_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.sharding import make_mesh
from jaxlora.train.schedule import learning_rate, plan_run
from jaxlora.train.step import Compute, init_state, make_train_step

TARGETS = {
    "attention_only": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all_layer": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
STEPS = 30


def copy_adapter(lora, model) -> None:
    """Put our initial adapter into a PEFT model."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            path = name.split("layers.")[1].split(".")
            module = get_path(lora["layers"], ".".join(path[1:3]))
            key = "lora_a" if "lora_A" in name else "lora_b"
            parameter.data.copy_(torch.tensor(np.asarray(module[key][int(path[0])])))


def difference(lora, model) -> float:
    """Relative difference (norm) of the whole adapter."""
    ours, theirs = [], []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            path = name.split("layers.")[1].split(".")
            key = "lora_a" if "lora_A" in name else "lora_b"
            ours.append(np.asarray(get_path(lora["layers"], ".".join(path[1:3]))[key][int(path[0])]).ravel())
            theirs.append(parameter.detach().numpy().ravel())
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("family", "condition"),
    [("qwen3", "attention_only"), ("qwen3", "all_layer"), ("llama", "all_layer"), ("qwen2", "all_layer")],
)
def test_thirty_steps_equal_peft(tmp_path, family, condition):
    reference = make_checkpoint(tmp_path, family=family, **FAMILY_SHAPES[family])
    optim, train = OptimConfig(), TrainConfig(epochs=3)
    rows = random_rows(8 * STEPS // 3)
    plan = plan_run(optim, train, len(rows))
    assert plan.total_steps == STEPS

    spec = ModelSpec(load_model_config(tmp_path), LoraConfig(targets=condition), "float32")
    frozen = load_base(tmp_path, spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    lora = init_lora(spec, seed=0)
    peft_config = PeftConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS[condition])
    peft = get_peft_model(reference, peft_config).eval()
    copy_adapter(lora, peft)
    parameters = [p for n, p in peft.named_parameters() if "lora_" in n]
    adam = torch.optim.Adam(parameters, betas=(0.9, 0.95), eps=1e-12)

    state = init_state(jax.tree.map(jnp.copy, lora), optim)
    step_fn = make_train_step(spec, optim, Compute())
    for step in range(1, STEPS + 1):
        chosen = [rows[i] for i in plan.rows_of_step(step)]
        rate = learning_rate(step, optim, plan)
        state, metrics = step_fn(state, frozen, pack(chosen, (512,), 512), jnp.float32(rate))
        adam.zero_grad()
        total = torch_summed_nll(peft, chosen)
        total.backward()
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        assert float(metrics["nll"]) == pytest.approx(total.item(), rel=1e-5), step
        assert float(metrics["weight"]) == sum(shifted(r)[2].sum() for r in chosen)
    change = jax.tree.map(jnp.subtract, state.trained, lora)
    assert sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(change)) > 1
    assert difference(state.trained, peft) < 1e-3
