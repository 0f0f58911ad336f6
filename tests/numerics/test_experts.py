"""Mixtures of experts compute what Transformers and plain PyTorch compute, in training and in decoding."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.adapters import load, our_logits, relative_error, torch_logits, trained_lora
from helpers.hf_models import MIXTURES, make_checkpoint, torch_greedy
from helpers.rows import random_rows
from helpers.torch_loss import torch_summed_nll

from jaxlora.checkpoints.base import random_base
from jaxlora.config import LoraConfig, MeshConfig, OptimConfig
from jaxlora.data.packing import pack, pad
from jaxlora.data.render import shifted
from jaxlora.generate.decode import generate
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import check_targets, count_trainable, init_lora, lora_shapes
from jaxlora.models import experts
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.experts import route
from jaxlora.models.families import count_matrix_parameters, model_config_from_dict, published_config
from jaxlora.models.grouped import group_tokens
from jaxlora.models.spec import Experts
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import base_shardings, make_mesh, place_batch, place_trained
from jaxlora.train.step import Compute, buffer_loss, gradients, init_state, make_train_step

TOKENS = np.random.default_rng(1).integers(0, 160, (2, 64))
STEPS = 20


def torch_choices(model, tokens) -> list[np.ndarray]:
    """The experts of each token in each layer of a PyTorch model, int `[tokens, k]`."""
    found: list[np.ndarray] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out: found.append(out[2].numpy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor(tokens))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_choices_and_32_greedy_tokens_equal_transformers(tmp_path, monkeypatch, name):
    reference = make_checkpoint(tmp_path, family="qwen3_moe", seed=len(name), **MIXTURES[name])
    spec, frozen = load(tmp_path, scan=False)
    ours: list[np.ndarray] = []

    def watched(*arguments):
        choices, shares = route(*arguments)
        jax.debug.callback(lambda x: ours.append(np.asarray(x)), choices, ordered=True)
        return choices, shares

    with monkeypatch.context() as patch:
        patch.setattr(experts, "route", watched)
        logits = our_logits(spec, {}, frozen, TOKENS)
        jax.effects_barrier()
    assert relative_error(logits, torch_logits(reference, TOKENS)) < 2e-5
    theirs = torch_choices(reference, TOKENS)
    assert len(ours) == len(theirs) == spec.config.num_hidden_layers
    for own, other in zip(ours, theirs, strict=True):
        assert np.array_equal(np.sort(own), np.sort(other))
    if spec.config.experts.num_experts_per_tok < spec.config.experts.num_experts:
        assert len(np.unique(np.sort(ours[0]), axis=0)) > 4  # the router does choose

    stacked, frozen = load(tmp_path)
    prompts = [row[:length].tolist() for row, length in zip(TOKENS, (37, 5), strict=True)]
    form, lora, weights, mesh = decode_weights(stacked, {}, frozen)
    with jax.set_mesh(mesh):
        answers = generate(form, lora, weights, prompts, stop_ids=(), max_new_tokens=32, slots=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == torch_greedy(reference, prompt)


def test_neither_padding_nor_filler_rows_of_a_prefill_go_to_experts(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, family="qwen3_moe", num_hidden_layers=1, **MIXTURES["plain"])
    spec, frozen = load(tmp_path, scan=False)
    sent = []

    def watched(x, weight, config, real):
        jax.debug.callback(lambda real: sent.append(int(real.sum())), real, ordered=True)
        return route(x, weight, config, real)

    monkeypatch.setattr(experts, "route", watched)
    prompts = [TOKENS[0, :n].tolist() for n in (5, 7, 11)]
    # Two slots, so that the last prompt is read beside a filler row; one token each: nothing is decoded.
    generate(spec, {}, frozen, prompts, stop_ids=(3, 5), max_new_tokens=1, slots=2)
    jax.effects_barrier()
    prefilled = [n for n in sent if n]
    assert sum(prefilled) == 5 + 7 + 11
    assert len(prefilled) == 2


# --- Routing ------------------------------------------------------------------------------------------------


def test_padding_goes_to_no_expert_and_every_token_to_k_of_them():
    config = Experts(8, 3, 32, True)
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((50, 16), (8, 16)))
    real = jnp.arange(50) < 41
    choices, shares = route(x, weight, config, real)
    groups = group_tokens(choices, 8, 16)
    assert int(groups.counts.sum()) == 3 * 41
    assert np.allclose(shares.sum(-1), 1, atol=1e-6)
    assert np.all(np.asarray(groups.place)[41:] == groups.token.size)  # no row
    rows = np.asarray(groups.place)[:41]
    assert len(np.unique(rows)) == rows.size  # a row for each choice, and none dropped
    expert = np.repeat(np.asarray(groups.expert), 16)[rows]
    assert np.array_equal(expert, np.asarray(choices)[:41])
    assert np.array_equal(np.asarray(groups.token)[rows], np.arange(41)[:, None].repeat(3, 1))


def test_every_token_of_every_expert_has_a_row_when_all_choose_the_same():
    groups = group_tokens(jnp.full((64, 1), 3, jnp.int32), 8, 16)
    assert groups.counts.tolist() == [0, 0, 0, 64, 0, 0, 0, 0]
    assert sorted(groups.place[:, 0].tolist()) == list(range(64))


def test_what_padding_holds_changes_nothing(tmp_path):
    """Neither loss nor gradient: a row alone in a long line, and the same with other padding."""
    make_checkpoint(tmp_path, family="qwen3_moe", **MIXTURES["plain"])
    spec, frozen = load(tmp_path, LoraConfig(rank=4))
    lora = trained_lora(spec)
    buffer = jax.tree.map(lambda x: x[0], pad(random_rows(3), (64,), 4))
    other = buffer | {"tokens": np.where(buffer["segment_ids"] > 0, buffer["tokens"], 77)}
    loss = jax.jit(
        jax.value_and_grad(
            lambda lora, b: buffer_loss(spec, lora, frozen, b, Compute(), "cross_entropy", False)[0]
        )
    )
    for one, two in zip(*map(jax.tree.leaves, (loss(lora, buffer), loss(lora, other))), strict=True):
        assert np.array_equal(one, two)


# --- Adapters -----------------------------------------------------------------------------------------------


class TestRanks:
    @staticmethod
    def spec(rank: int, targets: str = "all_layer"):
        return ModelSpec(published_config("qwen3-30b-a3b"), LoraConfig(rank=rank, targets=targets))

    @pytest.mark.parametrize(("rank", "millions"), [(8, 51.904512), (32, 207.618048), (256, 1660.944384)])
    def test_an_experts_adapter_has_the_rank_divided_by_the_active_experts(self, rank, millions):
        assert count_trainable(self.spec(rank, "mlp_only")) == round(millions * 1e6)
        assert count_trainable(self.spec(rank)) == round(millions * 1e6) + 835_584 * rank
        up = next(w for w in self.spec(rank).adapted if w.name == "up_proj")
        assert lora_shapes(self.spec(rank), up) == ((48, 128, rank // 8, 2048), (48, 128, 768, rank // 8))

    @pytest.mark.parametrize("rank", [1, 4, 12])
    def test_a_rank_that_does_not_divide_is_refused_with_the_next_ones(self, rank):
        with pytest.raises(UserError, match=r"8 experts per token.*give 8.*or lora.targets=attention_only"):
            check_targets(self.spec(rank))
        check_targets(self.spec(rank, "attention_only"))

    def test_gate_and_up_go_together_and_the_router_is_no_target(self):
        with pytest.raises(UserError, match="gate_proj and up_proj are adapted together"):
            check_targets(self.spec(8, "up_proj,q_proj"))
        check_targets(self.spec(8, "down_proj"))
        names = [weight.name for weight in self.spec(8).adapted]
        assert "gate" not in names
        assert not any("norm" in name for name in names)

    def test_each_experts_a_is_bounded_by_its_own_width(self):
        config = model_config_from_dict(SHAPE)
        lora = init_lora(ModelSpec(config, LoraConfig(rank=16)), 0)["layers"]["mlp"]["experts"]
        for name, width in (("gate_proj", 64), ("up_proj", 64), ("down_proj", 32)):
            largest = np.abs(lora[name]["lora_a"]).max(axis=(-1, -2))  # [layers, experts]
            assert largest.shape == (2, 8)
            assert np.all(largest <= width**-0.5)
            assert np.all(largest > 0.95 * width**-0.5)
            assert not np.any(lora[name]["lora_b"])


def test_active_parameters_are_those_of_the_published_shape():
    config = published_config("qwen3-30b-a3b")
    assert count_matrix_parameters(config) == 3_041_656_832


SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


class TorchAdapters:
    """Plain LoRA in PyTorch beside a Transformers model: W + (alpha / r) B A of every adapted matrix.

    Each expert has its own. They are applied by replacing the weights in a functional call.
    """

    def __init__(self, reference, lora, spec):
        self.reference, self.spec = reference, spec
        self.leaves = {
            jax.tree_util.keystr(path, simple=True, separator="."): torch.tensor(
                np.asarray(x), requires_grad=True
            )
            for path, x in jax.tree.leaves_with_path(lora)
        }

    def delta(self, name: str, layer: int, scale: float):
        a, b = (self.leaves[f"layers.{name}.{part}"][layer] for part in ("lora_a", "lora_b"))
        return scale * b @ a  # of experts: a product for each

    def __call__(self, input_ids=None, **others):
        weights = dict(self.reference.named_parameters())
        alpha, rank = self.spec.lora.alpha, self.spec.lora.rank
        own = alpha / (rank // self.spec.config.experts.num_experts_per_tok)
        for i in range(self.spec.config.num_hidden_layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                key = f"model.layers.{i}.self_attn.{name}.weight"
                weights[key] = weights[key] + self.delta(f"self_attn.{name}", i, alpha / rank)
            key = f"model.layers.{i}.mlp.experts."
            gate_up = [self.delta(f"mlp.experts.{name}", i, own) for name in ("gate_proj", "up_proj")]
            weights[key + "gate_up_proj"] = weights[key + "gate_up_proj"] + torch.cat(gate_up, 1)
            weights[key + "down_proj"] = weights[key + "down_proj"] + self.delta(
                "mlp.experts.down_proj", i, own
            )
        return torch.func.functional_call(self.reference, weights, (), {"input_ids": input_ids} | others)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unroll"])
def test_twenty_steps_equal_plain_pytorch(tmp_path, scan):
    reference = make_checkpoint(tmp_path, family="qwen3_moe", num_hidden_layers=2, **MIXTURES["plain"])
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    spec, frozen = load(tmp_path, LoraConfig(rank=4), scan=scan)
    lora, optim = init_lora(spec, seed=0), OptimConfig()
    model = TorchAdapters(reference, lora, spec)
    adam = torch.optim.Adam(model.leaves.values(), 1e-3, (optim.b1, optim.b2), optim.eps)
    state = init_state(jax.tree.map(jnp.copy, lora), optim)
    step_fn = make_train_step(spec, optim, Compute())
    rows = random_rows(8 * 10)
    for step in range(STEPS):
        chosen = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        state, metrics = step_fn(state, frozen, pack(chosen, (512,), 512), jnp.float32(1e-3))
        adam.zero_grad()
        total = torch_summed_nll(model, chosen)
        total.backward()
        adam.step()
        assert float(metrics["nll"]) == pytest.approx(total.item(), rel=1e-5), step
        assert float(metrics["weight"]) == sum(shifted(r)[2].sum() for r in chosen)
    moved, apart = [], []
    for path, ours in jax.tree.leaves_with_path(state.trained):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        start = np.asarray(lora_leaf(lora, path))
        moved.append((np.asarray(ours) - start).ravel())
        apart.append((np.asarray(ours) - model.leaves[name].detach().numpy()).ravel())
        assert np.any(moved[-1])
    assert np.linalg.norm(np.concatenate(apart)) < 1e-3 * np.linalg.norm(np.concatenate(moved))


def lora_leaf(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_all_weights_get_the_gradient_of_pytorch(tmp_path):
    """The router's, too."""
    reference = make_checkpoint(tmp_path, family="qwen3_moe", num_hidden_layers=2, **MIXTURES["plain"])
    spec, weights = load(tmp_path)
    spec = ModelSpec(spec.config, None, "float32", full=True)
    rows = random_rows(6)
    ours, _, _ = jax.jit(lambda w, b: gradients(spec, w, {}, b, Compute(), "cross_entropy", False))(
        weights, pack(rows, (512,), 512)
    )
    torch_summed_nll(reference, rows).backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    for i in range(2):
        experts_own = ours["layers"]["mlp"]["experts"]
        gate_up = np.concatenate([experts_own[n]["weight"][i] for n in ("gate_proj", "up_proj")], 1)
        pairs = {
            "gate.weight": ours["layers"]["mlp"]["gate"]["weight"][i],
            "experts.gate_up_proj": gate_up,
            "experts.down_proj": experts_own["down_proj"]["weight"][i],
        }
        for name, own in pairs.items():
            other = theirs[f"model.layers.{i}.mlp.{name}"]
            assert np.linalg.norm(own - other) < 2e-5 * np.linalg.norm(other), (i, name)
    other = theirs["model.embed_tokens.weight"]
    assert np.linalg.norm(ours["embed_tokens"]["weight"] - other) < 2e-5 * np.linalg.norm(other)


# --- Compiled programs --------------------------------------------------------------------------------------


def test_no_array_of_tokens_times_experts_times_anything_is_made():
    config = model_config_from_dict(SHAPE | {"num_experts": 7, "moe_intermediate_size": 24})
    spec = ModelSpec(config, LoraConfig(rank=4), "float32")
    base = random_base(spec, 0, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    batch = pack(random_rows(8), (512,), 512)
    step = make_train_step(spec, OptimConfig(), Compute())
    state = init_state(init_lora(spec, 0), OptimConfig())
    text = step.lower(state, base, batch, jnp.float32(1e-3)).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\w\d+\[([\d,]+)\]", text)}
    assert (512, 7) in shapes  # the router's
    tokens = {512, 1024}
    largest = 512 * 7 * config.num_hidden_layers  # the router's, kept for the backward pass
    assert not [s for s in shapes if tokens & set(s) and 7 in s and math.prod(s) > largest]


# --- Over a mesh --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (1, 1, 1, 8), (1, 4, 2, 1)], ids=str)
def test_a_mesh_computes_what_one_device_computes(shape):
    spec = ModelSpec(model_config_from_dict(SHAPE), LoraConfig(rank=8), "float32", scan=shape[1] != 2)
    base = random_base(spec, 0, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), std=0.15)
    lora = trained_lora(spec)
    batch = pack(random_rows(5), (256,), 256)

    def run(lora, base, batch):
        return gradients(spec, lora, base, batch, Compute(), "cross_entropy", False)[:2]

    expected = jax.jit(run)(lora, base, batch)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        spread = jax.tree.map(jax.device_put, jax.tree.map(np.asarray, base), base_shardings(mesh, spec))
        found = jax.jit(run)(
            place_trained(mesh, spec, jax.tree.map(np.asarray, lora)), spread, place_batch(mesh, batch)
        )
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            gap = np.linalg.norm(np.asarray(one) - np.asarray(other))
            assert gap < 2e-5 * np.linalg.norm(np.asarray(other))
        form, _, weights, decoding = decode_weights(spec, jax.tree.map(jnp.asarray, lora), spread)
    assert dict(decoding.shape) == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 2}
    prompts = [[5, 6, 7], [9, 2]]
    with jax.set_mesh(decoding):
        answers = generate(form, {}, weights, prompts, stop_ids=(), max_new_tokens=8, slots=8)
    form, _, weights, decoding = decode_weights(spec, lora, base)
    with jax.set_mesh(decoding):
        alone = generate(form, {}, weights, prompts, stop_ids=(), max_new_tokens=8, slots=8)
    assert [a.tokens for a in answers] == [a.tokens for a in alone]


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (1, 4, 1, 1), (1, 2, 1, 2)], ids=str)
def test_a_loop_over_layers_keeps_no_copies_of_the_experts_weights(shape):
    """Split over chips, gathered or not: the backward pass reads them where they lie."""
    spec = ModelSpec(model_config_from_dict(SHAPE), LoraConfig(rank=8), "bfloat16")
    state = jax.eval_shape(lambda: init_state(init_lora(spec, 0), OptimConfig()))
    batch = pack(random_rows(8), (512,), 512)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[:4])
    step = make_train_step(spec, OptimConfig(), Compute())
    with jax.set_mesh(mesh):
        traced = step.trace(state, spec.abstract_base, batch, jnp.float32(1e-3))
    hidden, ffn = spec.config.hidden_size, spec.config.experts.moe_intermediate_size
    kept = list(loop_results(traced.jaxpr.jaxpr))
    assert any(len(shape) == 3 and shape[2] == ffn for shape in kept)  # rows of experts
    assert not [shape for shape in kept if len(shape) == 4 and {hidden, ffn} == set(shape[2:])]


def loop_results(jaxpr):
    """Shapes of what loops hand on, of all depths."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield from (tuple(x.aval.shape) for x in equation.outvars[equation.params["num_carry"] :])
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from loop_results(inner)


def test_an_axis_that_does_not_divide_the_experts_is_refused():
    spec = ModelSpec(model_config_from_dict(SHAPE | {"num_experts": 6}), None, "float32")
    mesh = make_mesh(MeshConfig(1, 1, 1, 4), jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"config.mesh.expert: 4 does not divide 6"):
        our_logits(spec, {}, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec.abstract_base))
