"""How a model is laid out over devices never changes what it computes, and no device holds the whole base."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import sharding
from jaxlora.config import LoraConfig, MeshConfig, OptimConfig
from jaxlora.data.packing import pack, pad
from jaxlora.data.render import RenderedRow
from jaxlora.generate.decode import Sampling, generate, init_decode, make_decode
from jaxlora.lora import init_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.quantised import Scheme, products
from jaxlora.models.spec import Experts, ModelConfig
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import (
    base_shardings,
    decode_mesh,
    make_mesh,
    place_batch,
    place_trained,
    spec_for,
    token_multiple,
    token_shards,
    trained_shardings,
)
from jaxlora.train import step as steps
from jaxlora.train.step import Compute, init_state, make_eval_step, make_logprob_step, make_train_step

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
)
STEPS, LENGTH = 20, 256
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EVERY_MESH = [(1, f, 8 // f) for f in (8, 4, 2, 1)] + [
    (8, 1, 1),
    (4, 2, 1),
    (4, 1, 2),
    (2, 4, 1),
    (2, 2, 2),
    (2, 1, 4),
]
QUICK_MESHES = [(1, 8, 1), (2, 2, 2)]
MESHES_BY_LINE = [(8, 1, 1), (1, 8, 1), (2, 4, 1)]


def mesh_of(data: int, fsdp: int, tensor: int):
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def model_spec(rank: int = 8, scan: bool = True) -> ModelSpec:
    return ModelSpec(CONFIG, LoraConfig(rank=rank), "float32", scan)


@cache
def host_weights(spec: ModelSpec):
    """A random base and adapter on the host, so that each mesh starts from the same numbers; or no base and
    all weights."""
    rng = np.random.default_rng(0)

    def draw(path, x) -> np.ndarray:
        is_norm = "norm" in jax.tree_util.keystr(path)
        return (is_norm + 0.15 * rng.normal(size=x.shape)).astype(x.dtype)

    if spec.full:
        return {}, jax.tree.map_with_path(draw, spec.abstract_base)
    lora = jax.eval_shape(lambda: init_lora(spec, seed=0))
    return jax.tree.map_with_path(draw, spec.abstract_base), jax.tree.map_with_path(draw, lora)


def placed_base(mesh, spec: ModelSpec, frozen):
    return jax.tree.map(jax.device_put, frozen, base_shardings(mesh, spec)) if frozen else {}


def batches(layout: str = "packed", lines: int = 1):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = []
        for i in range(8):
            length = int(rng.integers(12, 32))
            weights = (np.arange(length) >= int(rng.integers(3, 9))).astype(np.float32)
            rows.append(RenderedRow(str(i), rng.integers(0, 256, length).astype(np.int32), weights))
        if layout == "padded":
            yield pad(rows, (32,), 8)
        else:
            yield pack(rows, (LENGTH // lines,), LENGTH, lines)


def splits_rows(mesh) -> bool:
    """`jaxlora.sharding._splits_rows` on GPUs."""
    return mesh.shape["tensor"] == 1


def as_on_gpus(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sharding, "_splits_rows", splits_rows)
    patch.setattr(sharding, "gathers_mapped_memory", lambda: True)


@cache
def train(mesh, spec: ModelSpec, *, remat: bool = False, layout: str = "packed"):
    """Losses of 20 steps, the final adapter, and the compiled step."""
    host_frozen, lora = host_weights(spec)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        if layout == "lines":
            as_on_gpus(patch)
        frozen = placed_base(mesh, spec, host_frozen)
        state = place_trained(mesh, spec, init_state(lora, OptimConfig()))
        rate = jnp.float32(1e-3)
        step, losses = None, []
        for batch in batches(layout, token_shards(mesh) if layout == "lines" else 1):
            placed = place_batch(mesh, batch)
            if step is None:
                compute = Compute(remat=remat, by_line=layout == "lines")
                lowered = make_train_step(spec, OptimConfig(), compute).lower(state, frozen, placed, rate)
                step = lowered.compile(QUICK_COMPILE)
            state, metrics = step(state, frozen, placed, rate)
            losses.append(float(metrics["nll"]))
    return np.array(losses), jax.tree.map(np.asarray, state.trained), step


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def check_equals_one_device(spec: ModelSpec, mesh, tolerance: float = 1e-5, **options) -> None:
    layout = "padded" if options.get("layout") == "padded" else "packed"
    losses, lora, _ = train(mesh_of(1, 1, 1), spec, layout=layout)
    other_losses, other_lora, _ = train(mesh, spec, **options)
    np.testing.assert_allclose(other_losses, losses, rtol=tolerance)
    assert np.linalg.norm(flat(other_lora) - flat(lora)) / np.linalg.norm(flat(lora)) < tolerance
    start = flat(host_weights(spec)[1])
    assert np.linalg.norm(flat(lora) - start) / np.linalg.norm(start) > 0.02  # it did learn


@pytest.mark.parametrize("shape", QUICK_MESHES, ids=str)
def test_a_mesh_gives_the_losses_and_the_adapter_of_one_device(shape):
    check_equals_one_device(model_spec(), mesh_of(*shape))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_mesh_trains_other_families_as_one_device_does(family, full):
    config = dataclasses.replace(CONFIG, model_type=family)
    spec = ModelSpec(config, None if full else LoraConfig(), "float32", full=full)
    check_equals_one_device(spec, mesh_of(2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"remat": True}, {"layout": "padded"}, {"layout": "lines"}], ids=str)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unroll"])
@pytest.mark.parametrize("shape", EVERY_MESH, ids=str)
def test_every_mesh_gives_the_losses_and_the_adapter_of_one_device(shape, scan, options):
    check_equals_one_device(model_spec(scan=scan), mesh_of(*shape), **options)


def collectives(step) -> Counter[str]:
    """How often the compiled step has each kind of communication."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", step.as_text()))


@pytest.mark.parametrize("shape", MESHES_BY_LINE, ids=str)
def test_whole_rows_on_each_device_give_the_adapter_of_one_and_are_summed_once(shape):
    check_equals_one_device(model_spec(), mesh_of(*shape), layout="lines")
    _, _, step = train(mesh_of(*shape), model_spec(), layout="lines")
    found = collectives(step)
    assert found.pop("all-reduce") == 1  # the adapter's gradient and the loss, together
    # A layer's weights are gathered forward and backward, the head once; the embedding's rows change places.
    gathers = {"all-gather": 2 * 7 + 1 + 1, "all-to-all": 1}
    assert found == ({} if shape[1] == 1 else gathers)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES_BY_LINE, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"rank": 256, "output_head": True}, {"full": True}, {"remat": True}, {"scan": False, "remat": True}],
    ids=str,
)
def test_whole_rows_on_each_device_train_whatever_is_trained(shape, options):
    remat, full = options.get("remat", False), options.get("full", False)
    lora = (
        None
        if full
        else LoraConfig(rank=options.get("rank", 8), output_head=options.get("output_head", False))
    )
    spec = ModelSpec(CONFIG, lora, "float32", options.get("scan", True), full=full)
    # Of all weights some have a gradient that is rounding alone, and Adam moves those by the whole rate.
    tolerance = 1e-4 if full else 1e-5
    check_equals_one_device(spec, mesh_of(*shape), tolerance, layout="lines", remat=remat)


@pytest.mark.parametrize(
    ("changed", "full"), [({"tie_word_embeddings": True}, False), ({"vocab_size": 258}, True)], ids=str
)
def test_a_head_that_cannot_be_split_by_rows_is_split_by_columns(changed, full):
    config = dataclasses.replace(CONFIG, **changed)
    spec = ModelSpec(config, None if full else LoraConfig(), "float32", full=full)
    check_equals_one_device(spec, mesh_of(2, 4, 1), 1e-4 if full else 1e-5, layout="lines")


def test_gpus_split_the_matrices_of_layers_by_rows(monkeypatch):
    """Then what they gather needs no transposed copy."""
    spec, mesh = model_spec(scan=False), mesh_of(2, 4, 1)
    before = base_shardings(mesh, spec)["layers"][0]["mlp"]["gate_proj"]["weight"].spec
    monkeypatch.setattr(sharding, "_splits_rows", splits_rows)
    base = base_shardings(mesh, spec)
    assert (before, base["embed_tokens"]["weight"].spec) == (jax.P(("tensor",), ("fsdp",)),) * 2
    parts = (base["layers"][0][part].items() for part in ("mlp", "self_attn"))
    specs = {name: x["weight"].spec for part in parts for name, x in part if name.endswith("_proj")}
    specs["lm_head"] = base["lm_head"]["weight"].spec
    assert len(specs) == 8
    assert {jax.P(*own)[0] for own in specs.values()} == {"fsdp"}
    odd = dataclasses.replace(spec, config=dataclasses.replace(CONFIG, vocab_size=258))
    assert base_shardings(mesh, odd)["lm_head"]["weight"].spec == jax.P(None, ("fsdp",))
    everything = ModelSpec(CONFIG, None, "float32", False, full=True)
    trained = trained_shardings(mesh, everything, everything.abstract_base)
    assert trained["layers"][0]["mlp"]["gate_proj"]["weight"].spec == jax.P(("fsdp",), None)
    split = base_shardings(mesh_of(2, 2, 2), spec)["layers"][0]["mlp"]["gate_proj"]["weight"].spec
    assert split == jax.P(("tensor",), ("fsdp",))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_mapped_memory_gathers_is_a_copy_that_no_compiler_leaves_out(dtype):
    x = jnp.array([[3.5, -2.0, jnp.nan], [0.0, 1e30, -7.25]], dtype)
    copy = jax.jit(sharding._in_its_own_memory)
    for first in (1.0, -2.0, 5.5, -3e9, jnp.nan, jnp.inf):
        one = x.at[0, 0].set(first)
        np.testing.assert_array_equal(*(np.asarray(found, np.float32) for found in (copy(one), one)))
    gradient = jax.grad(lambda x: jnp.sum(copy(x).astype(jnp.float32) * jnp.arange(6.0).reshape(2, 3)))(x)
    np.testing.assert_array_equal(gradient, jnp.arange(6.0).reshape(2, 3))
    assert "select(" in copy.lower(x).compile().as_text()


def test_what_is_not_gathered_by_line_is_not_gathered_in_mapped_memory(monkeypatch):
    """The compiler would keep a copy of every part there."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("NCCL_CTA_POLICY", "2")
    spec = model_spec(scan=False)
    experts = dataclasses.replace(CONFIG, model_type="qwen3_moe", experts=Experts(8, 2, 32, True))
    others = [
        dataclasses.replace(spec, scheme=Scheme("int8", False)),
        dataclasses.replace(spec, config=experts),
    ]
    asked = [steps._options(one, Compute(by_line=True)) for one in (spec, *others)]
    asked.append(steps._options(spec, Compute()))
    mapped = "xla_gpu_experimental_enable_nccl_symmetric_buffers"
    assert [options[mapped] for options in asked] == [True, False, False, False]


def test_whole_rows_on_each_device_have_the_log_probabilities_of_one(monkeypatch):
    as_on_gpus(monkeypatch)
    spec = model_spec()
    host_frozen, lora = host_weights(spec)
    found = []
    for mesh, lines in ((mesh_of(1, 1, 1), 1), (mesh_of(2, 4, 1), 8)):
        with jax.set_mesh(mesh):
            arrays = place_trained(mesh, spec, lora), placed_base(mesh, spec, host_frozen)
            batch, compute = next(batches("lines", lines)), Compute(by_line=lines > 1)
            placed = place_batch(mesh, batch)
            values = np.asarray(make_logprob_step(spec, compute)(*arrays, placed))
            nll, weight = make_eval_step(spec, compute)(*arrays, placed)
        np.testing.assert_allclose(-(values * batch["weights"]).sum(), nll, rtol=1e-5)
        found.append((float(nll), float(weight), np.sort(values[batch["segment_ids"] > 0])))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == found[0][1]
    np.testing.assert_allclose(found[1][2], found[0][2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", QUICK_MESHES, ids=str)
def test_a_split_adapter_of_rank_256_gives_the_adapter_of_one_device(shape):
    check_equals_one_device(model_spec(rank=256), mesh_of(*shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", QUICK_MESHES, ids=str)
def test_validation_on_a_mesh_gives_the_sum_of_one_device(shape):
    spec = model_spec()
    sums = []
    for mesh in (mesh_of(1, 1, 1), mesh_of(*shape)):
        frozen, lora = host_weights(spec)
        with jax.set_mesh(mesh):
            batch = place_batch(mesh, next(batches()))
            step = make_eval_step(spec, Compute())
            sums.append(step(place_trained(mesh, spec, lora), placed_base(mesh, spec, frozen), batch))
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_a_mesh_decodes_the_greedy_tokens_of_one_device(shape):
    spec = model_spec(scan=False)
    frozen, lora = host_weights(spec)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, n).tolist() for n in (5, 9, 3, 12, 7, 7, 20, 4)]
    answers = []
    for mesh in (mesh_of(1, 1, 1), decode_mesh(mesh_of(*shape), CONFIG.num_key_value_heads)):
        with jax.set_mesh(mesh):
            weights = place_trained(mesh, spec, lora), placed_base(mesh, spec, frozen)
            answers.append(generate(spec, *weights, prompts, stop_ids=(6,), max_new_tokens=12, slots=4))
    assert answers[0] == answers[1]
    assert len({token for answer in answers[0] for token in answer.tokens}) > 10  # not one token repeated


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_devices_with_slots_of_their_own_decode_the_tokens_of_one(shape, packed):
    spec = model_spec(scan=False)
    frozen, lora = host_weights(spec)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, n).tolist() for n in rng.integers(1, 30, 21)]
    options = {"stop_ids": (6,), "max_new_tokens": 12, "limits": rng.integers(1, 12, 21).tolist()}
    answers = []
    for mesh in (mesh_of(1, 1, 1), mesh_of(*shape)):
        with jax.set_mesh(mesh):
            weights = place_trained(mesh, spec, lora), placed_base(mesh, spec, frozen)
            answers.append(
                generate(spec, *weights, prompts, slots=4, tail_slots=(2, 1), packed=packed, **options)
            )
    assert answers[0] == answers[1]


def test_devices_with_slots_of_their_own_exchange_nothing():
    spec, mesh = dataclasses.replace(model_spec(scan=False), lora=None), mesh_of(8, 1, 1)
    with jax.set_mesh(mesh):
        frozen = placed_base(mesh, spec, host_weights(model_spec(scan=False))[0])
        state = init_decode(spec, 16, 128, 8)
        program = make_decode(spec, (6,)).lower(state, {}, frozen, 128).compile(QUICK_COMPILE)
    assert not collectives(program)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_answers_that_share_a_prompt_are_those_of_one_device(shape):
    spec = model_spec(scan=False)
    frozen, lora = host_weights(spec)
    prompts = [[5, 9, 3], [12, 7], [7, 20, 4, 1]]
    answers = []
    for mesh in (mesh_of(1, 1, 1), mesh_of(*shape)):
        with jax.set_mesh(mesh):
            weights = place_trained(mesh, spec, lora), placed_base(mesh, spec, frozen)
            options = {"stop_ids": (6,), "max_new_tokens": 6, "slots": 8, "repeats": 8}
            answers.append(generate(spec, *weights, prompts, sampling=Sampling(1.0), **options))
    assert answers[0] == answers[1]


def whole_stacks_in(program: str, spec: ModelSpec) -> list[str]:
    """Weights of which the program holds all layers, unsplit, in one array."""
    shapes = set(re.findall(r"f32\[([\d,]+)\]", program))
    assert "3,96,8" in shapes  # all layers of up_proj, split
    assert "96,64" in shapes  # one layer of it, whole
    matrices = [w for w in spec.table if w.stacked and len(w.shape) == 2]
    return [w.path for w in matrices if ",".join(map(str, (3, *w.shape))) in shapes]


def test_no_device_ever_holds_the_whole_base():
    _, _, step = train(mesh_of(1, 8, 1), model_spec())
    assert whole_stacks_in(step.as_text(), model_spec()) == []


def test_a_step_keeps_no_second_copy_of_the_base():
    """Without fsdp there is nothing to gather, and the loop over layers must not save its weights again."""
    spec, mesh = model_spec(), mesh_of(1, 1, 2)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        spec.abstract_base,
        base_shardings(mesh, spec),
    )
    with jax.set_mesh(mesh):
        state = place_trained(mesh, spec, init_state(host_weights(spec)[1], OptimConfig()))
        step = make_train_step(spec, OptimConfig(), Compute())
        lowered = step.lower(state, abstract, place_batch(mesh, next(batches())), jnp.float32(0))
        program = lowered.compile(QUICK_COMPILE).as_text()
    assert "f32[3,48,64]" in program  # all layers of up_proj, half of its units
    assert not re.search(r"f32\[3,48,64\]\S* dynamic-update-slice\(", program)


@pytest.mark.slow
def test_no_device_ever_holds_the_whole_base_with_remat():
    _, _, step = train(mesh_of(1, 8, 1), model_spec(), remat=True)
    assert whole_stacks_in(step.as_text(), model_spec()) == []


@pytest.mark.parametrize(("tensor", "together"), [(1, False), (2, True)])
def test_gradients_that_chips_sum_are_added_up_before_anything_else_is(tensor, together):
    """So the compiler sums one array over the chips that split the products, not one for each product."""
    x, *weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 16), (8, 16), (4, 16), (4, 16)))

    def gradient(x, weights):
        ys, pull = jax.vjp(lambda x: products(x, weights), x)
        return pull(ys)[0]

    with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor), jax.devices()[:tensor])):
        traced = jax.make_jaxpr(gradient)(x, weights)
    inner = [
        Counter(e.primitive.name for e in eqn.params["jaxpr"].eqns)
        for eqn in traced.eqns
        if "jaxpr" in eqn.params
    ]
    assert any(found["add_any"] == 2 and found["dot_general"] == 3 for found in inner) == together


def test_a_large_adapter_is_split_and_a_small_one_is_not():
    mesh = mesh_of(2, 2, 2)
    for rank, ways in ((8, 1), (256, 2)):
        spec = model_spec(rank)
        state = place_trained(mesh, spec, init_state(host_weights(spec)[1], OptimConfig()))
        for leaf in jax.tree.leaves((state.trained, state.opt_state[0][1:])):
            assert leaf.addressable_shards[0].data.size * ways == leaf.size
        assert state.opt_state[0].count.sharding.is_fully_replicated


def test_tokens_of_a_packed_buffer_and_rows_of_a_padded_batch_are_split_over_chips():
    mesh = mesh_of(2, 4, 1)
    packed = place_batch(mesh, next(batches()))
    assert packed["tokens"].addressable_shards[0].data.shape == (1, 1, LENGTH // 8)
    padded = place_batch(mesh, next(batches("padded")))
    assert padded["tokens"].addressable_shards[0].data.shape == (1, 1, 32)
    lines = place_batch(mesh, next(batches("lines", 8)))
    assert lines["tokens"].addressable_shards[0].data.shape == (1, 1, LENGTH // 8)
    assert token_shards(mesh) == token_multiple(mesh) == 8
    assert token_shards(mesh_of(2, 2, 2)) == 4


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = mesh_of(1, 4, 2)
    assert spec_for(mesh, ("mlp", "embed"), (6, 8)) == jax.P(("tensor",), ("fsdp",))
    assert spec_for(mesh, ("mlp", "embed"), (7, 6)) == jax.P(None, None)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match="data=1, fsdp=3, tensor=-1 does not fit 8 devices"):
        make_mesh(MeshConfig(1, 3, -1))
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(1, 4, 4))
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
