"""A fresh adapter changes nothing, starts where the study's starts, and is the only thing that is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import PLACEMENTS, load, our_logits, trained_lora
from helpers.hf_models import make_checkpoint

from jaxlora.config import LoraConfig, MeshConfig, OptimConfig
from jaxlora.data.packing import pack
from jaxlora.data.render import RenderedRow
from jaxlora.lora import check_lora, count_trainable, get_path, init_lora, lora_shapes, merge_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import published_config
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh
from jaxlora.train.step import Compute, init_state, make_train_step

# every matrix has an input size of its own, so that a bound from a wrong size shows
SHAPE = ModelConfig(
    vocab_size=300,
    hidden_size=192,
    intermediate_size=448,
    num_hidden_layers=3,
    num_attention_heads=10,
    num_key_value_heads=2,
    head_dim=32,
)
ATTENTION = {f"layers.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
MLP = {f"layers.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


def spec_of(condition="all_layer", output_head=False, config=SHAPE, **lora) -> ModelSpec:
    return ModelSpec(config, LoraConfig(targets=condition, output_head=output_head, **lora), "float32")


def digest(lora) -> str:
    """Hash of all paths and bits."""
    digest = hashlib.sha256()
    for path, array in jax.tree.leaves_with_path(lora):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


class TestInitialisation:
    def test_a_fills_the_bound_of_its_own_layer_and_never_exceeds_it(self):
        spec = spec_of(output_head=True)
        lora = init_lora(spec, seed=0)
        assert len(spec.adapted) == 8
        for weight in spec.adapted:
            bound = 1 / np.sqrt(weight.shape[1])
            a = np.asarray(get_path(lora, weight.path)["lora_a"])
            for layer in a if weight.stacked else [a]:
                assert 0.99 * bound <= np.abs(layer).max() <= bound, weight.path
                assert abs(layer.mean()) < 0.1 * bound  # both signs
                assert np.abs(layer).mean() == pytest.approx(bound / 2, rel=0.1)  # uniform, not peaked

    def test_layers_differ_from_one_another(self):
        for weight in (spec := spec_of()).adapted:
            a = np.asarray(get_path(init_lora(spec, seed=0), weight.path)["lora_a"])
            assert len({layer.tobytes() for layer in a}) == SHAPE.num_hidden_layers, weight.path

    def test_b_is_zero_and_everything_is_float32(self):
        spec = spec_of(output_head=True)
        lora = init_lora(spec, seed=0)
        for weight in spec.adapted:
            pair = get_path(lora, weight.path)
            assert not np.asarray(pair["lora_b"]).any()
            assert (pair["lora_a"].shape, pair["lora_b"].shape) == lora_shapes(spec, weight)
        assert {x.dtype for x in jax.tree.leaves(lora)} == {jnp.dtype("float32")}

    @pytest.mark.parametrize(("dtype", "scan"), [("float32", True), ("bfloat16", True), ("bfloat16", False)])
    def test_logits_are_bit_equal_to_the_base_before_training(self, tmp_path, dtype, scan):
        make_checkpoint(tmp_path, num_hidden_layers=2)
        spec, frozen = load(tmp_path, PLACEMENTS["all_layer and head"], dtype, scan)
        base = our_logits(ModelSpec(spec.config, None, dtype, scan), {}, frozen)
        assert np.array_equal(our_logits(spec, init_lora(spec, seed=0), frozen), base)
        assert not np.array_equal(our_logits(spec, trained_lora(spec), frozen), base)


class TestPlacement:
    @pytest.mark.parametrize(
        ("condition", "paths"),
        [("attention_only", ATTENTION), ("mlp_only", MLP), ("all_layer", ATTENTION | MLP)],
    )
    @pytest.mark.parametrize("head", [False, True], ids=["", "head"])
    def test_each_condition_adapts_exactly_its_projections(self, condition, paths, head):
        lora = init_lora(spec_of(condition, head), seed=0)
        leaves = {
            jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree.leaves_with_path(lora)
        }
        expected = paths | ({"lm_head"} if head else set())
        assert leaves == {f"{path}.{part}" for path in expected for part in ("lora_a", "lora_b")}

    @pytest.mark.parametrize(
        ("condition", "count"), [("attention_only", 7_667_712), ("all_layer", 21_823_488)]
    )
    def test_qwen3_8b_has_the_studys_number_of_trainable_parameters(self, condition, count):
        spec = spec_of(condition, config=published_config("qwen3-8b"))
        assert count_trainable(spec) == count
        by_shape = jax.eval_shape(lambda: init_lora(spec, seed=0))
        assert sum(x.size for x in jax.tree.leaves(by_shape)) == count

    def test_no_adapted_projection_is_an_error(self):
        with pytest.raises(UserError, match="no projection would be adapted"):
            init_lora(ModelSpec(SHAPE, None), seed=0)

    def test_a_tree_that_is_not_the_placements_is_an_error(self):
        spec = spec_of("attention_only")
        check_lora(spec, init_lora(spec, seed=0))

        def refused(message, **kinds):
            with pytest.raises(UserError, match=message):
                check_lora(spec, kinds["lora"])

        refused("mlp.down_proj", lora=init_lora(spec_of("all_layer"), seed=0))
        refused("lm_head", lora=init_lora(spec_of("attention_only", True), seed=0))
        refused("q_proj.lora_a is missing", lora=init_lora(spec_of("mlp_only"), seed=0))
        refused("q_proj.lora_a is missing", lora={})
        refused("expected float32", lora=init_lora(spec_of("attention_only", rank=4), seed=0))
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_lora(spec, seed=0))
        refused("bfloat16", lora=half)


class TestSeeds:
    def test_the_seed_decides_every_number(self):
        spec = spec_of(output_head=True)
        first, again, other = (init_lora(spec, seed) for seed in (0, 0, 1))
        assert digest(first) == digest(again)
        for weight in spec.adapted:
            a, b = (np.asarray(get_path(lora, weight.path)["lora_a"]) for lora in (first, other))
            assert (a != b).mean() > 0.99, weight.path

    def test_placement_does_not_change_another_weights_numbers(self):
        everything = init_lora(spec_of("all_layer", True), seed=3)
        for condition in ("attention_only", "mlp_only", "all_layer"):
            spec = spec_of(condition)
            lora = init_lora(spec, seed=3)
            for weight in spec.adapted:
                ours, theirs = get_path(lora, weight.path), get_path(everything, weight.path)
                assert np.array_equal(ours["lora_a"], theirs["lora_a"]), weight.path

    def test_every_number_of_devices_and_every_compiler_option_draws_the_same_adapter(self, repository):
        spec = spec_of(output_head=True)
        assert len(jax.devices()) == 8
        here = digest(init_lora(spec, seed=5))
        mesh = make_mesh(MeshConfig(fsdp=8))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "fsdp"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        shapes = jax.eval_shape(partial(init_lora, spec), 5)
        placed = jax.tree.map(lambda x: split if x.ndim == 3 and x.shape[2] % 8 == 0 else whole, shapes)
        sharded = jax.jit(partial(init_lora, spec), out_shardings=placed)(5)
        assert len(sharded["layers"]["mlp"]["down_proj"]["lora_a"].sharding.device_set) == 8
        assert digest(sharded) == here
        code = f"""
            import hashlib, jax, numpy as np
            from jaxlora.config import LoraConfig
            from jaxlora.lora import init_lora
            from jaxlora.models.spec import ModelConfig
            from jaxlora.models.decoder import ModelSpec
            assert len(jax.devices()) == 1
            config = ModelConfig(**{dataclasses.asdict(SHAPE)})
            spec = ModelSpec(config, LoraConfig(output_head=True), "float32")
            digest = hashlib.sha256()
            for path, array in jax.tree.leaves_with_path(init_lora(spec, seed=5)):
                digest.update(jax.tree_util.keystr(path).encode() + np.asarray(array).tobytes())
            print(digest.hexdigest())
        """
        alone = {
            **os.environ,
            "XLA_FLAGS": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(repository),
        }
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == here, done.stderr


class TestTraining:
    def test_the_base_stays_bit_identical_and_every_adapter_weight_moves(self, tmp_path):
        make_checkpoint(tmp_path, num_hidden_layers=2)
        spec, frozen = load(tmp_path, PLACEMENTS["all_layer and head"], "bfloat16")
        before = digest(frozen)
        optim = OptimConfig()
        lora = init_lora(spec, seed=0)
        state, step = (
            init_state(jax.tree.map(jnp.copy, lora), optim),
            make_train_step(spec, optim, Compute()),
        )
        rng = np.random.default_rng(0)
        rows = [
            RenderedRow(str(i), rng.integers(0, 160, 30).astype(np.int32), np.ones(30, np.float32))
            for i in range(4)
        ]
        for _ in range(3):
            state, _ = step(state, frozen, pack(rows, (128,), 128), jnp.float32(1e-3))
        assert digest(frozen) == before
        for (path, start), end in zip(
            jax.tree.leaves_with_path(lora), jax.tree.leaves(state.trained), strict=True
        ):
            moved = np.asarray(start) != np.asarray(end)
            assert end.dtype == jnp.float32
            assert moved.mean() > 0.9, jax.tree_util.keystr(path)

    def test_moments_are_float32_and_belong_to_the_adapter_alone(self, tmp_path):
        make_checkpoint(tmp_path)
        spec, _ = load(tmp_path, PLACEMENTS["attention_only"], "bfloat16")
        state = init_state(init_lora(spec, seed=0), OptimConfig())
        for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
            assert jax.tree.structure(moment) == jax.tree.structure(state.trained)
            assert {x.dtype for x in jax.tree.leaves(moment)} == {jnp.dtype("float32")}


class TestMerging:
    @pytest.mark.parametrize("scan", [True, False], ids=["scan", "unroll"])
    def test_merged_weights_give_the_adapters_logits(self, tmp_path, scan):
        make_checkpoint(tmp_path, num_hidden_layers=2)
        spec, frozen = load(tmp_path, PLACEMENTS["all_layer and head"], scan=scan)
        lora, before = trained_lora(spec), digest(frozen)
        merged = merge_lora(spec, lora, frozen)
        assert digest(frozen) == before != digest(merged)
        adapted = our_logits(spec, lora, frozen)
        folded = our_logits(ModelSpec(spec.config, None, "float32", scan), {}, merged)
        np.testing.assert_allclose(folded, adapted, rtol=0, atol=2e-5 * np.abs(adapted).max())
