"""A quantised base: its numbers are those of PyTorch and bitsandbytes, its gradients the rounded model's."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.hf_models import make_checkpoint
from helpers.rows import random_rows
from helpers.torch_loss import torch_summed_nll
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from jaxlora.checkpoints.base import load_base
from jaxlora.config import LoraConfig, MeshConfig, ModelSource
from jaxlora.data.packing import pack
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import get_path, init_lora, merge_lora
from jaxlora.models.attention import segment_attention
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.models.quantised import (
    NF4_LEVELS,
    Quantised,
    Scheme,
    capability,
    dequantise,
    dequantised,
    dynamic_code,
    pick_scheme,
    products,
    quantise,
)
from jaxlora.sharding import make_mesh
from jaxlora.train.step import Compute, make_gradient_step

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
KINDS = [("float8", False), ("float8", True), ("int8", False), ("int8", True), ("nf4", False)]
LARGEST = {"float8": 448.0, "int8": 127.0}


# --- The same in PyTorch ------------------------------------------------------------------------------------


def torch_round(kind: str, x: torch.Tensor, most: torch.Tensor | None = None) -> torch.Tensor:
    """x rounded to 8-bit numbers with one scale a row, as the numbers that they stand for."""
    most = x.abs().amax(-1, keepdim=True) if most is None else most
    y = x * (LARGEST[kind] / most.clamp_min(1e-30))
    y = y.to(torch.float8_e4m3fn).float() if kind == "float8" else y.round()
    return y * (most * np.float32(1 / LARGEST[kind]))


def torch_nf4(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 64, each scale rounded to the dynamic code in groups of 256, written out weight by weight."""
    levels, code = torch.tensor(NF4_LEVELS), torch.tensor(dynamic_code())
    blocks = x.reshape(-1, 64)
    most = blocks.abs().amax(1)
    nearest = (blocks[:, :, None] / most[:, None, None] - levels).abs().argmin(-1)
    centred = most - most.mean()
    scales = torch.empty_like(centred)
    for i in range(0, len(centred), 256):
        group = centred[i : i + 256]
        largest = group.abs().max()
        scales[i : i + 256] = code[(group[:, None] / largest - code).abs().argmin(-1)] * largest
    return (levels[nearest] * (scales + most.mean())[:, None]).reshape(x.shape)


def torch_weight(kind: str, x: torch.Tensor) -> torch.Tensor:
    return torch_nf4(x) if kind == "nf4" else torch_round(kind, x)


class Rounded(torch.autograd.Function):
    """W x with both factors in 8 bits; its gradient passes the rounding of x, and is rounded itself."""

    @staticmethod
    def forward(ctx, x, kind, *weights):
        ctx.kind = kind
        ctx.save_for_backward(*weights)
        return tuple(torch_round(kind, x) @ torch_round(kind, w).T for w in weights)

    @staticmethod
    def backward(ctx, *dys):
        scales = [w.abs().amax(1) * np.float32(1 / LARGEST[ctx.kind]) for w in ctx.saved_tensors]
        parts = [dy * scale for dy, scale in zip(dys, scales, strict=True)]
        most = torch.cat(parts, -1).abs().amax(-1, keepdim=True)  # one scale for all projections of an input
        total = 0
        for part, w, scale in zip(parts, ctx.saved_tensors, scales, strict=True):
            total = total + torch_round(ctx.kind, part, most) @ (torch_round(ctx.kind, w) / scale[:, None])
        return total, None, *[None] * len(dys)


class Joint(torch.nn.Module):
    """One projection of several that read the same input: the first computes for all."""

    def __init__(self, kind, linears, i):
        super().__init__()
        self.kind, self.linears, self.i = kind, linears, i

    def forward(self, x):
        if self.i == 0:
            self.linears[0].made = Rounded.apply(x, self.kind, *(one.weight for one in self.linears))
        return self.linears[0].made[self.i]


def reference_of(folder, kind, activations):
    """The Hugging Face model with a rounded base, and its adapter of PEFT."""
    model = make_checkpoint(folder, **SHAPE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in TARGETS and not activations:
                parameter.copy_(torch_weight(kind, parameter))
    peft = get_peft_model(model, PeftConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS))
    if activations:
        for layer in peft.base_model.model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for names, owner in (
                (("q_proj", "k_proj", "v_proj"), attention),
                (("o_proj",), attention),
                (("gate_proj", "up_proj"), mlp),
                (("down_proj",), mlp),
            ):
                linears = [getattr(owner, name).base_layer for name in names]
                for i, linear in enumerate(linears):
                    linear.forward = Joint(kind, linears, i).forward
    return peft.eval()


def adapter(spec, seed=1):
    """An adapter whose B is not zero, so that every gradient has something to say."""
    tree = init_lora(spec, 0)
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(seed), x.shape), tree)


def our_model(folder, kind, activations, scan=True):
    scheme = Scheme(kind, activations, native=kind != "float8")
    spec = ModelSpec(
        load_model_config(folder), LoraConfig(targets="all_layer", rank=4), "float32", scan, scheme=scheme
    )
    return spec, load_base(folder, spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))


def logits_of(spec, lora, frozen, tokens):
    def attend(q, k, v, cache):
        return segment_attention(q, k, v, jnp.ones(tokens.shape, jnp.int32)), cache

    model = spec.bind(lora, frozen)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model(tokens, positions, attend)[0])


# --- Numbers ------------------------------------------------------------------------------------------------


def test_nf4_has_the_published_levels_and_codes():
    # The sixteen levels as published with QLoRA (Dettmers et al. 2023), to the digits given there.
    published = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    published += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]
    np.testing.assert_allclose(NF4_LEVELS, published, atol=6e-9)
    code = dynamic_code()
    assert len(np.unique(code)) == 256
    assert code[-1] == 1.0
    np.testing.assert_allclose(code[:4], [-0.9929687, -0.9789063, -0.9648438, -0.9507813], atol=1e-7)


def test_nf4_takes_a_little_over_four_bits_and_rounds_as_bitsandbytes():
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    w *= torch.linspace(0.01, 2, 128)[:, None]
    found = jax.jit(quantise, static_argnums=0)(Scheme("nf4"), w.numpy())
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves(found)) / w.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 2 * 32 / (64 * 256), abs=1e-4)
    np.testing.assert_allclose(dequantise(found, jnp.float32), torch_nf4(w), rtol=1e-5, atol=1e-6)
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    packed, state = bitsandbytes.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    np.testing.assert_array_equal(np.ravel(found.values), packed.numpy().ravel())
    # A scale in the middle between two codes may fall on either side.
    differ = np.ravel(found.scales).astype(int) - state.absmax.numpy().ravel()
    assert np.abs(differ).max() <= 1
    assert np.mean(differ != 0) < 0.01


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_eight_bit_weights_are_pytorchs_rounding_with_a_scale_for_each_output(kind):
    w = (
        torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
        * torch.linspace(0.01, 2, 40)[:, None]
    )
    w[3] = 0
    found = quantise(Scheme(kind), jnp.asarray(w.numpy()))
    np.testing.assert_array_equal(dequantise(found, jnp.float32)[3], 0)
    np.testing.assert_allclose(dequantise(found, jnp.float32), torch_round(kind, w), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "activations"), KINDS)
def test_loss_and_gradients_of_the_adapter_are_those_of_the_rounded_model(tmp_path, kind, activations):
    reference = reference_of(tmp_path, kind, activations)
    spec, frozen = our_model(tmp_path, kind, activations)
    lora = adapter(spec)
    parameters = {name: p for name, p in reference.named_parameters() if "lora_" in name}
    for name, parameter in parameters.items():
        layer, *path = name.split("layers.")[1].split(".")
        part = "lora_a" if "lora_A" in name else "lora_b"
        value = get_path(lora["layers"], ".".join(path[:2]))[part][int(layer)]
        parameter.data.copy_(torch.tensor(np.asarray(value)))
    rows = random_rows(3)
    total = torch_summed_nll(reference, rows)
    total.backward()

    step = make_gradient_step(spec, Compute())
    grads, nll, _ = step(lora, jax.tree.map(jnp.zeros_like, lora), frozen, pack(rows, (256,), 256))
    # A number near the middle of two 8-bit ones may fall on either side.
    bound = 2e-2 if activations else 1e-4
    assert float(nll) == pytest.approx(total.item(), rel=bound / 10)
    ours, theirs = [], []
    for name, parameter in parameters.items():
        layer, *path = name.split("layers.")[1].split(".")
        part = "lora_a" if "lora_A" in name else "lora_b"
        ours.append(np.ravel(get_path(grads["layers"], ".".join(path[:2]))[part][int(layer)]))
        theirs.append(parameter.grad.numpy().ravel())
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    assert np.linalg.norm(ours - theirs) < bound * np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_a_turned_copy_changes_nothing(kind):
    w = jax.random.normal(jax.random.key(0), (48, 64))
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    scheme = Scheme(kind, True, native=False)
    plain, turned = quantise(scheme, w), quantise(replace(scheme, turned=True), w)
    assert turned.turned.shape == (64, 48)
    gradients = [jax.grad(lambda x, w=w: jnp.sum(products(x, [w, w])[0] ** 2))(x) for w in (plain, turned)]
    np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize(("kind", "activations"), KINDS)
def test_scanned_and_unrolled_layers_compute_the_same(tmp_path, kind, activations):
    make_checkpoint(tmp_path, **SHAPE)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 160)
    found = []
    for scan in (True, False):
        spec, frozen = our_model(tmp_path, kind, activations, scan)
        found.append(logits_of(spec, adapter(spec), frozen, tokens))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


# --- Merging and decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float8", "int8", "nf4"])
def test_merging_goes_onto_the_numbers_that_the_base_stood_for(tmp_path, kind):
    make_checkpoint(tmp_path, **SHAPE)
    spec, frozen = our_model(tmp_path, kind, False, scan=False)
    lora, tokens = adapter(spec), jax.random.randint(jax.random.key(0), (2, 9), 0, 160)
    merged = dequantised(merge_lora(spec, lora, frozen), "float32")
    assert not any(
        isinstance(x, Quantised) for x in jax.tree.leaves(merged, is_leaf=lambda x: isinstance(x, Quantised))
    )
    found = logits_of(replace(spec, lora=None, scheme=None), {}, merged, tokens)
    np.testing.assert_allclose(found, logits_of(spec, lora, frozen, tokens), atol=2e-4)
    # On the base's own numbers the model is another one.
    plain, unrounded = (
        replace(spec, scheme=None),
        load_base(tmp_path, replace(spec, scheme=None), make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])),
    )
    other = logits_of(replace(plain, lora=None), {}, merge_lora(plain, lora, unrounded), tokens)
    assert float(jnp.abs(other - found).max()) > 1e-2


@pytest.mark.parametrize(("kind", "activations"), KINDS)
def test_decoding_keeps_the_adapter_beside_a_quantised_base(tmp_path, kind, activations):
    make_checkpoint(tmp_path, **SHAPE)
    spec, frozen = our_model(tmp_path, kind, activations)
    lora, tokens = adapter(spec), jax.random.randint(jax.random.key(0), (2, 9), 0, 160)
    form, kept, weights, mesh = decode_weights(spec, lora, frozen, merge=True)
    assert form.lora == spec.lora
    with jax.set_mesh(mesh):
        found = logits_of(form, kept, weights, tokens)
    np.testing.assert_allclose(found, logits_of(spec, lora, frozen, tokens), atol=2e-3)


# --- Devices ------------------------------------------------------------------------------------------------


class Device:
    def __init__(self, platform, kind, version=None):
        self.platform, self.device_kind, self.compute_capability = platform, kind, version


@pytest.mark.parametrize(
    ("kind", "device", "both", "native"),
    [
        ("float8", Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), True, True),
        ("float8", Device("gpu", "NVIDIA L4", "8.9"), True, True),
        ("float8", Device("gpu", "NVIDIA A100-SXM4-40GB", "8.0"), False, False),
        ("float8", Device("gpu", "NVIDIA B200", "10.0"), True, True),
        ("float8", Device("tpu", "TPU v5 lite"), False, False),
        ("float8", Device("cpu", "cpu"), True, False),
        ("int8", Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), False, True),
        ("int8", Device("tpu", "TPU v5 lite"), True, True),
        ("int8", Device("tpu", "TPU v4"), False, True),
        ("nf4", Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), False, True),
    ],
)
def test_each_device_has_the_products_that_pay_there_with_a_reason(kind, device, both, native):
    found = capability(kind, device)
    assert found[:2] == (both, native)
    assert len(found[2]) > 10
    scheme = pick_scheme(ModelSource(base_dtype=kind), device, training=True)
    assert scheme.turned == (both and native and kind == "float8")
    other = "weights" if both else "both"
    if kind != "nf4":
        asked = pick_scheme(ModelSource(base_dtype=kind, base_products=other), device)
        assert asked.products == other
