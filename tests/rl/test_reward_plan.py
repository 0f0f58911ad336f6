"""A plan of learning from rewards: its counts are the sampler's, its sums those of a pocket calculator."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.rl import job_of, make_model, rl_config
from rich.console import Console

from jaxlora.cli import load_config
from jaxlora.commands import plan as command
from jaxlora.config import LoraConfig, MeshConfig, TrainConfig
from jaxlora.estimate import REACHED, Roofline
from jaxlora.generate import decode
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import count_parameters, published_config
from jaxlora.plan.hlo import Work
from jaxlora.plan.programs import Memory, Program
from jaxlora.rl import planning, workload
from jaxlora.rl.mesh import mesh_on_slice, sampling_of
from jaxlora.rl.planning import Expected, batch_seconds, plan_rewards, print_rewards, what_would_fit
from jaxlora.rl.workload import Lengths, drawn_lengths, learning_buffers, sampling_calls
from jaxlora.runtime.devices import slice_named
from jaxlora.runtime.errors import UserError
from jaxlora.train.job import fresh_state, load_frozen

GIB = 2**30


# --- What a batch asks for


@pytest.mark.parametrize(("mean", "most"), [(170, 512), (3, 8), (500, 512)])
def test_lengths_have_the_mean_and_the_limit_that_were_asked_for(mean, most):
    lengths = drawn_lengths(64, 16, 120, mean, most)
    assert lengths.prompts.mean() == pytest.approx(120, rel=0.01)
    assert lengths.answers.mean() == pytest.approx(mean, rel=0.03)
    assert lengths.answers.min() >= 1
    assert lengths.answers.max() <= most
    assert lengths.group == 16
    np.testing.assert_array_equal(lengths.answers, drawn_lengths(64, 16, 120, mean, most).answers)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("slots", "group"), [(8, 4), (24, 8), (3, 2)])
def test_the_sampler_makes_as_many_calls_as_are_planned(tmp_path, monkeypatch, devices, slots, group):
    """The real sampler on the same lengths; no token ends an answer."""
    mesh = {"data": devices}
    job = job_of(rl_config(make_model(tmp_path / "model"), tmp_path, mesh=mesh), devices)
    lengths = drawn_lengths(10, group, 20, 30, 90)
    calls = {"prefills": 0, "windows": []}
    real_prefill, real_decode = decode.make_prefill, decode.make_decode

    def make_prefill(*settings):
        program = real_prefill(*settings)

        def prefill(*arguments):
            calls["prefills"] += 1
            return program(*arguments)

        return prefill

    def make_decode(*settings):
        program = real_decode(*settings)

        def step(state, lora, weights, window):
            calls["windows"].append(window)
            return program(state, lora, weights, window)

        return step

    monkeypatch.setattr(decode, "make_prefill", make_prefill)
    monkeypatch.setattr(decode, "make_decode", make_decode)
    sampling = replace(sampling_of(job.config.rl), logprobs=False)
    with jax.set_mesh(job.mesh):
        decode.generate(
            job.spec,
            fresh_state(job).trained,
            load_frozen(job),
            [[5] * n for n in lengths.prompts],
            stop_ids=(),
            max_new_tokens=int(lengths.answers.max()),
            limits=lengths.answers.tolist(),
            slots=slots,
            sampling=sampling,
            repeats=group,
        )
    planned = sampling_calls(lengths, slots * devices, devices)
    assert planned.prefills == calls["prefills"]
    assert planned.steps == decode.STEPS_PER_CALL * len(calls["windows"])
    assert planned.window == workload.round_up(int(np.mean(calls["windows"])), decode.WINDOW_MULTIPLE)
    assert 0.1 < planned.busy <= 1


def test_buffers_are_counted_in_the_largest_of_them():
    """Sixteen rows of 60 tokens in packed buffers of 512: eight each (9 make 540); padded, 4 lines of 64."""
    lengths = Lengths(np.full(2, 20), np.full(16, 40))
    packed = TrainConfig(max_buffer_tokens=512)
    largest, n = learning_buffers(lengths, packed, 128)
    assert (largest["tokens"].shape, n) == ((1, 1, 512), 2)
    padded = TrainConfig(layout="padded", max_buffer_tokens=256, buffer_multiple=64)
    largest, n = learning_buffers(lengths, padded, 1)
    assert (largest["tokens"].shape, n) == ((1, 4, 64), 4)
    # prompts once: 19 + 8 x 40 positions of three quarters of a buffer, beside 8 x 59 in a wider one of 512
    largest, n = learning_buffers(lengths, packed, 128, shares=True)
    assert (largest["tokens"].shape, largest["wide"].shape, n) == ((1, 1, 384), (1, 1, 512), 2)


def test_the_least_time_of_a_batch_is_below_what_one_h100_took_and_not_far_below():
    """Measured: 64 prompts x 16 answers of 170 tokens, 5,809 sampled tokens/s with an adapter of rank 1."""
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    spec = ModelSpec(published_config("qwen3-8b"), LoraConfig(rank=1))
    lengths = drawn_lengths(64, 16, 120, 170, 512)
    found = workload.least_seconds(spec, lengths, 384, mesh, 989e12, 3350e9)
    measured = lengths.answers.sum() / 5809
    assert 0.5 * measured < sum(found.values()) < measured
    # learning: 4 FLOPs for each of 7.568e9 weights and each token, at three quarters of the peak
    tokens = lengths.answers.sum() + lengths.of_answers.sum()
    assert found["learning"] == pytest.approx(4 * 7.568e9 * tokens / 989e12 / 0.75, rel=1e-3)
    once = workload.least_seconds(spec, lengths, 384, mesh, 989e12, 3350e9, shares=True)
    shared = (lengths.answers.sum() + lengths.prompts.sum()) / tokens
    assert once["learning"] == pytest.approx(shared * found["learning"])
    full = workload.least_seconds(replace(spec, lora=None, full=True), lengths, 384, mesh, 989e12, 3350e9)
    assert full["learning"] == pytest.approx(1.5 * found["learning"])


# --- Meshes


@pytest.mark.parametrize("name", ["rl_gsm8k", "rl_math"])
def test_learner_and_sampler_share_the_base_on_a_slice_where_one_mesh_serves_both(name):
    config, model = load_config(name), published_config("qwen3-8b")
    mesh = mesh_on_slice(config, model, slice_named("v5e-16"), 1200).mesh
    assert mesh.fsdp == 1
    assert mesh.data * mesh.tensor == 16
    given = replace(config, mesh=MeshConfig(1, 16, 1))
    assert mesh_on_slice(given, model, slice_named("v5e-16"), 1200).mesh == given.mesh


def test_what_would_fit_takes_fewer_slots_before_more_chips():
    config, model = load_config("rl_gsm8k", {"rl.slots": "1024"}), published_config("qwen3-8b")
    found = what_would_fit(config, model, slice_named("v5e-8"), 692)
    assert found.startswith("--config.mesh.data=")
    assert "--config.rl.slots=512 should fit" in found
    assert what_would_fit(config, published_config("qwen3-32b"), slice_named("v5e-4"), 692).startswith(
        "on v5e-"
    )
    assert (
        what_would_fit(config, published_config("qwen3-235b-a22b"), slice_named("v6e-8"), 692)
        == "no v6e slice in the table is large enough"
    )


# --- Plans without a compiler


def fake(name: str, seconds: float, peak: float = GIB) -> Program:
    """A program that likely takes so many seconds, and so many bytes."""
    best = Roofline(0, REACHED * seconds, 0)
    return Program(name, 1, Memory(int(peak), 0, 0, 0), 0.0, Work(), best, 1.0)


def test_the_split_of_a_batchs_time_by_hand():
    """Two prompts x 2 answers of 17 tokens in 4 slots: one prefill, one call of 16 steps; rows of 10 + 17."""
    lengths = Lengths(np.full(2, 10), np.full(4, 17))
    config = SimpleNamespace(train=TrainConfig(max_buffer_tokens=64, buffer_multiple=32))
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    programs = SimpleNamespace(
        slots=4, shards=1, shape=(1, 64), shares=False, of=SimpleNamespace(mesh=mesh, config=config),
        rl=SimpleNamespace(updates_per_batch=3),
    )  # fmt: skip
    done = [fake(name, s) for name, s in (("prefill", 2), ("decode", 0.5), ("gradient", 7), ("update", 0.1))]
    found = batch_seconds(programs, done, lengths, 0.25)  # type: ignore[arg-type]
    # two rows of 27 in each buffer of 64: two buffers
    assert found == pytest.approx({"sampling": 2 + 16 * 0.5, "scoring": 1.0, "learning": 2 * 7 + 0.3})
    with_reference = batch_seconds(programs, [*done, fake("reference", 2)], lengths, None)  # type: ignore[arg-type]
    assert with_reference["learning"] == pytest.approx(2 * 9 + 0.3)
    assert with_reference["scoring"] is None


class Fake:
    """Programs that take a second and a GiB each; nothing is compiled."""

    peak = GIB

    def __init__(self, config, model, slice_, lengths):
        mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
        self.of = SimpleNamespace(mesh=mesh, config=config)
        self.rl, self.slots, self.shards, self.shape = config.rl, 384, 1, (1, 4096)
        self.copied, self.longest, self.shares = 0, 692, False

    def prefill(self):
        return fake("prefill", 0.01, self.peak)

    decode_step = gradient = update = reference = prefill


def test_a_run_and_the_standard_one_cost_their_batches(monkeypatch):
    monkeypatch.setattr(planning, "RewardPrograms", Fake)
    monkeypatch.setattr(planning, "grading_seconds", lambda rl: 0.0)
    config, model = load_config("rl_gsm8k"), published_config("qwen3-8b")
    plan = plan_rewards(config, model, slice_named("v5e-8"), Expected(), 1.5)
    assert plan.fits
    batch = sum(plan.seconds.values())
    assert plan.run.hours == pytest.approx(117 * batch / 3600)
    assert plan.run.dollars == pytest.approx(plan.run.hours * 8 * 1.5)
    # 10,000 problems of 64 a batch, 32 answers each: 2.67 times the answers of 117 batches of 64 x 16; larger
    # batches have shorter ends
    assert 2 < plan.standard.hours / plan.run.hours < 320_000 / 119_808
    assert plan.answer_tokens == pytest.approx(512 / 3, rel=0.01)
    longer = plan_rewards(config, model, slice_named("v5e-8"), Expected(answer_tokens=300), 1.5)
    assert longer.run.hours > 1.3 * plan.run.hours
    assert json.loads(json.dumps(plan.to_json()))["standard"]["dollars"] > 0
    console = Console(width=200, file=io.StringIO())
    print_rewards(plan, console)
    text = console.file.getvalue()
    assert "the base is on the chips once" in text
    assert f"({plan.seconds['sampling'] / batch:.0%})" in text
    assert f"(${plan.standard.dollars:,.2f}) for 10,000 problems x 32 answers" in text


def test_a_plan_that_does_not_fit_says_what_would(monkeypatch):
    monkeypatch.setattr(planning, "RewardPrograms", Fake)
    monkeypatch.setattr(Fake, "peak", 20 * GIB)
    plan = plan_rewards(
        load_config("rl_gsm8k"), published_config("qwen3-8b"), slice_named("v5e-8"), Expected(), None
    )
    assert not plan.fits
    assert plan.seconds is plan.run is plan.standard is None
    assert "should fit" in plan.advice


@pytest.mark.parametrize(("reward", "known"), [("gsm8k_strict", True), ("math", True), ("mine:score", False)])
def test_scoring_is_measured_here_where_it_can_be(reward, known):
    if reward == "math":
        pytest.importorskip("math_verify")
    found = planning.grading_seconds(load_config("rl_gsm8k", {"rl.reward": reward}).rl)
    assert (found is not None) == known
    assert found is None or 0 < found < 1


# --- The command


def plan(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jaxlora plan", "--config", *words])
    return command.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("rl_gsm8k", "--topology", "v5e-8", "--search"),
            "--search is for supervised runs, not for learning",
        ),
        (("rl_gsm8k", "--topology", "v5e-8", "--train-rows", "5"), "--train-rows is for supervised runs"),
        (
            ("main", "--topology", "v5e-8", "--answer-tokens", "5"),
            "--answer-tokens is for learning from rewards",
        ),
        (("rl_gsm8k", "--answer-tokens", "5"), "--answer-tokens is for a slice: give --topology as well"),
        (
            ("rl_gsm8k", "--topology", "v5e-8", "--config.rl.top_p=0.5"),
            "config.rl.top_p: filtering would change",
        ),
        (("rl_gsm8k", "--topology", "v5e-7"), "--topology: 'v5e-7' is not known"),
    ],
)
def test_a_mistake_is_said_before_anything_is_compiled(monkeypatch, words, message):
    monkeypatch.setattr(planning, "RewardPrograms", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError, match=message):
        plan(monkeypatch, *words)


def test_the_command_plans_every_shipped_configuration_of_rewards(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(planning, "RewardPrograms", Fake)
    for name in ("rl_gsm8k", "rl_math", "rl_deepmath", "rl_tiny"):
        file = tmp_path / f"{name}.json"
        monkeypatch.setattr(planning, "grading_seconds", lambda rl: 0.0)
        assert plan(monkeypatch, name, "--topology", "v5e-8", "--price", "1.2", "--json", str(file)) == 0
        (told,) = json.loads(file.read_text())
        assert told["slice"]["name"] == "v5e-8"
        assert told["programs"][0]["memory"]["total"] == GIB
        assert "for 10,000 problems x 32 answers" in capsys.readouterr().out


def test_without_a_slice_the_plan_is_that_of_the_dry_run(monkeypatch, capsys, tmp_path):
    words = ("rl_tiny", f"--config.results_dir={tmp_path}")
    assert plan(monkeypatch, *words) == 0
    text = capsys.readouterr().err
    assert "episodes" in text
    assert "not known for cpu devices: the first batches will show" in text
    assert "room" in text
    monkeypatch.setattr("jaxlora.train.job.memory_of", lambda device: 2**20)
    assert plan(monkeypatch, *words) == 1


@pytest.mark.slow
def test_the_real_compiler_takes_sampler_and_learner_of_a_tiny_model(tpu_compiler):
    """On four chips of a topology: two copies of the weights, each split in two."""
    model = replace(published_config("qwen3-0.6b"), num_hidden_layers=2, vocab_size=4096)
    words = {"rl.prompts": "8", "rl.group": "4", "rl.slots": "16", "rl.max_new_tokens": "64"}
    config = load_config("rl_gsm8k", words | {"train.max_buffer_tokens": "1024", "rl.kl": "0.1"})
    config = replace(config, mesh=MeshConfig(2, 1, 2))
    found = plan_rewards(config, model, slice_named("v5e-4"), Expected(), 1.0)
    assert found.fits
    assert found.shared
    prefill, decoding, gradient, update, reference = found.programs
    layer = 1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072
    weights = 2 * (2 * layer + 4096 * 1024)  # the head is the embedding
    cache = (
        2 * 16 * 256 * 2 * 8 * 128 * 2
    )  # layers, slots, positions, keys and values, heads, head_dim, bytes
    assert decoding.memory.arguments == pytest.approx(weights / 2 + cache / 4, rel=0.05)
    assert gradient.memory.arguments == pytest.approx(weights / 2, rel=0.1)
    assert gradient.work.kernels["splash_mha_dq_segmented_no_residuals"] == 2
    assert not decoding.work.kernels
    assert reference.flops < gradient.flops / 2
    # of a step, on one of four chips: 2 FLOPs a weight and slot, and attention over 256 positions
    products = 2 * 16 * (2 * layer + 4096 * 1024) / 4 + 4 * 16 * 256 * 16 * 128 * 2 / 4
    assert products < decoding.flops < 1.3 * products
    assert update.memory.total < gradient.memory.total
    assert prefill.tokens == 4 * 192
    assert found.run.dollars > 0
    assert json.dumps(found.to_json())


@pytest.mark.slow
def test_a_plan_that_trains_all_weights_counts_masters_and_the_samplers_copy(tpu_compiler):
    """Parameters, gradients and two moments in float32, and a copy in bfloat16; split in four."""
    model = replace(published_config("qwen3-0.6b"), num_hidden_layers=1, vocab_size=4096)
    words = {"rl.prompts": "4", "rl.group": "4", "rl.slots": "8", "rl.max_new_tokens": "32"}
    config = load_config("rl_gsm8k", words | {"train.max_buffer_tokens": "512", "train.what": "full"})
    config = replace(config, mesh=MeshConfig(1, 4, 1))
    found = plan_rewards(config, model, slice_named("v5e-4"), Expected(), None)
    prefill, decoding, gradient, update = found.programs
    count = count_parameters(model)
    assert not found.shared
    assert update.memory.arguments == pytest.approx(4 * 4 * count / 4, rel=0.02)
    assert gradient.memory.arguments == pytest.approx(2 * 4 * count / 4, rel=0.02)
    assert gradient.memory.held == pytest.approx(2 * 4 * count / 4, rel=0.02)
    assert decoding.memory.held == prefill.memory.held == pytest.approx(3 * 4 * count / 4, rel=0.02)
