"""The loop: what a run writes, that a run killed anywhere ends in the same bytes, and what its options do."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.rl import job_of, make_model, outcome, parity, records, rl_config, ruled_rewards, run

from jaxlora.checkpoints.run_state import RunState
from jaxlora.config import MeshConfig, from_dict
from jaxlora.generate.decode import generate
from jaxlora.rl import loop
from jaxlora.rl.directory import RLDirectory
from jaxlora.rl.job import estimate_memory, prepare
from jaxlora.rl.learning import Learner
from jaxlora.rl.rewards import Graded
from jaxlora.rl.sampling import Sampler, grade_groups, shared_bytes
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh
from jaxlora.train.job import fresh_state, load_frozen
from jaxlora.train.loop import Diverged


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("rl") / "model")


@pytest.fixture(autouse=True)
def _rewards():
    with ruled_rewards():
        yield


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    config = rl_config(model, tmp_path_factory.mktemp("undisturbed"))
    with ruled_rewards():
        run(config)
    return config


def test_a_run_writes_its_numbers_and_its_answers(undisturbed):
    found = records(undisturbed)
    assert [record["step"] for record in found] == [1, 2, 3]
    for record in found:
        assert record["ratio/max"] == pytest.approx(1, abs=1e-3)  # on policy
        assert record["optim/kl_sample_train_v2"] < 1e-8
        assert record["optim/updates"] == 1
        assert 0 < record["bits/available"] <= 16
        assert record["optim/entropy"] > 0
    evaluations = records(undisturbed, "validation")
    assert [record["step"] for record in evaluations] == [0, 1, 2, 3]
    lines = (undisturbed.run_dir / "samples" / "step-000002.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 16
    assert [sample["reward"] for sample in samples] == [parity(sample["text"]) for sample in samples]
    assert np.mean([sample["reward"] for sample in samples]) == found[1]["reward/mean"]
    assert len({sample["text"] for sample in samples}) > 8
    summary = json.loads((undisturbed.run_dir / "summary.json").read_text())
    assert summary["primary_metric"] == {"name": "accuracy", "value": evaluations[-1]["eval_metric"]}
    assert summary["episodes"] == 48
    assert list((undisturbed.run_dir / "tensorboard").glob("events*"))
    assert (undisturbed.run_dir / "accuracy.png").is_file()


MOMENTS = {
    "after sampling": (Sampler, "groups", 2),
    "before a step": (Learner, "learn", 2),
    "before the samples": (RLDirectory, "write_samples", 3),
    "before the record": (RLDirectory, "record", 4),
    "before publishing": (RunState, "_publish", 2),
    "before the summary": (RLDirectory, "finish", 1),
}


class Killed(BaseException):
    pass


def killed_at(monkeypatch, moment: str) -> None:
    owner, name, nth = MOMENTS[moment]
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **named):
        calls[0] += 1
        if calls[0] == nth:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_anywhere_ends_in_the_same_bytes(undisturbed, model, tmp_path, monkeypatch, moment):
    config = rl_config(model, tmp_path)
    with monkeypatch.context() as patch:
        killed_at(patch, moment)
        with pytest.raises(Killed):
            run(config)
    for name in (".step-000002.jsonl.7.tmp", "step-000007.jsonl"):  # half written; of a step after the kill
        (config.run_dir / "samples" / name).touch()
    run(config)
    assert outcome(config.run_dir) == outcome(undisturbed.run_dir)


@pytest.mark.parametrize("recorded", [False, None], ids=["off", "not recorded"])
def test_a_run_from_before_prompts_were_shared_goes_on_and_says_what_changed(
    model, tmp_path, monkeypatch, recorded
):
    config = rl_config(model, tmp_path, train={"layout": "packed", "max_buffer_tokens": 256})
    with monkeypatch.context() as patch:
        killed_at(patch, "before a step")
        with pytest.raises(Killed):
            run(config)
    file = config.run_dir / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["rl"].pop("share_prompts")
    if recorded is not None:
        manifest["config"]["rl"]["share_prompts"] = recorded
    file.write_text(json.dumps(manifest))
    run(config)
    (changes,) = json.loads(file.read_text())["resumed_with"]
    assert "rl.share_prompts: False then, True now" in changes
    assert [record["step"] for record in records(config)] == [1, 2, 3]


def test_overlap_is_one_step_off_policy_says_so_and_survives_a_kill(
    model, tmp_path, monkeypatch, undisturbed
):
    options = {"overlap": True, "optim": {"peak_lr": 0.1}, "steps": 4}
    whole = rl_config(model, tmp_path / "whole", **options)
    run(whole)
    first, second, third, _ = records(whole)
    assert first["ratio/max"] == pytest.approx(1, abs=1e-3)
    assert second["optim/kl_sample_train_v2"] > 1e-6
    assert third["ratio/max"] > 1.001
    stopped = rl_config(model, tmp_path / "stopped", **options)
    with monkeypatch.context() as patch:
        killed_at(patch, "before the samples")
        with pytest.raises(Killed):
            run(stopped)
    run(stopped)
    assert outcome(stopped.run_dir) == outcome(whole.run_dir)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 8}, {"data": 4, "tensor": 2}], ids=str)
def test_eight_devices_find_the_same_tokens_and_losses(undisturbed, model, tmp_path, mesh):
    config = rl_config(model, tmp_path, slots=8, mesh=mesh)
    run(config, devices=8)
    for ours, theirs in zip(records(config), records(undisturbed), strict=True):
        for name in ("sampled_tokens", "reward/mean", "episode/truncated", "optim/rows"):
            assert ours[name] == theirs[name], name
        for name in ("optim/loss", "grad_norm", "update_norm", "optim/entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("mesh", [{"data": 4}, {"fsdp": 8}], ids=str)
def test_lines_of_several_gpus_learn_what_one_line_does(model, tmp_path, monkeypatch, mesh):
    """On GPUs each device has whole rows of its own; here devices are simulated, and told to do so."""
    options = {"train": {"layout": "packed", "max_buffer_tokens": 512}, "eval_problems": None, "steps": 2}
    one = rl_config(model, tmp_path / "one", **options)
    run(one)
    several = rl_config(model, tmp_path / "several", mesh=mesh, **options)
    (n,), shapes = mesh.values(), []
    original = Learner.buffers

    def seen(self, rows):
        found = original(self, rows)
        shapes.extend(batch["tokens"].shape for batch in found)
        return found

    def copies(mesh, *_):
        return make_mesh(MeshConfig(mesh.size, 1, 1), [*mesh.devices.flat])

    def on_one_mesh(spec, lora, weights, *rest, **options):  # GPUs' kernels refuse anything else
        assert {x.sharding.mesh for x in jax.tree.leaves((lora, weights))} == {jax.sharding.get_mesh()}
        return generate(spec, lora, weights, *rest, **options)

    monkeypatch.setattr("jaxlora.train.step.token_lines", lambda mesh: mesh.size)
    monkeypatch.setattr("jaxlora.rl.sampling.generate", on_one_mesh)
    monkeypatch.setattr("jaxlora.generate.weights.decode_mesh", copies)
    monkeypatch.setattr("jaxlora.rl.mesh.decode_mesh", copies)
    monkeypatch.setattr(Learner, "buffers", seen)
    run(several, devices=n)
    assert {shape[:2] for shape in shapes} == {(1, n)}
    for ours, theirs in zip(records(several), records(one), strict=True):
        assert ours["optim/tokens"] == theirs["optim/tokens"]
        for name in ("optim/loss", "grad_norm", "update_norm", "ratio/max"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name


def test_a_tracker_is_looked_for_first_and_told_the_end_as_well(model, tmp_path, monkeypatch):
    config = replace(rl_config(model, tmp_path, steps=1), tracking="trackio")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"config.tracking: trackio is not installed"):
            run(config)
    told = []

    class Recorder:
        def __init__(self, config):
            pass

        def write(self, values, step):
            told.append((dict(values), step))

        def close(self):
            told.append("closed")

    monkeypatch.setattr("jaxlora.rl.job.check_tracking", lambda config: None)
    monkeypatch.setattr("jaxlora.train.run_directory.Tracker", Recorder)
    result = run(config)
    assert told[-2:] == [({"final/accuracy": result.accuracy}, 1), "closed"]
    assert len(told) == 5  # two evaluations, a batch, and these


def test_a_batch_of_constant_groups_takes_no_step(model, tmp_path):
    config = rl_config(model, tmp_path, steps=2, eval_problems=None)
    with ruled_rewards(lambda text: 1.0):
        result = run(config)
    for record in records(config):
        assert record["optim/updates"] == 0
        assert record["group/constant"] == record["group/all_correct"] == 1
        assert record["bits/available"] == 0
        assert record["grad_norm"] is record["ratio/max"] is None
    start = fresh_state(job_of(config)).trained
    for ours, theirs in zip(jax.tree.leaves(result.trained), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_constant_groups_are_sampled_anew(model, tmp_path):
    """Half of the problems always give the same reward."""
    calls = [0]

    def rule(text: str) -> float:
        calls[0] += 1
        return 0.0 if (calls[0] - 1) // 8 % 2 == 0 else parity(text)

    config = rl_config(model, tmp_path, steps=1, eval_problems=None, refill=3)
    with ruled_rewards(rule):
        run(config)
    (record,) = records(config)
    assert record["group/learned"] > 2
    assert record["episode/count"] > 16
    assert record["optim/rows"] == 4 * record["group/learned"]


@pytest.mark.parametrize(
    "options",
    [
        {"train": {"what": "full"}, "optim": {"peak_lr": 1e-4}},
        {"loss": "ppo", "updates_per_batch": 3},
        {"loss": "cispo", "kl": 0.1, "mask_truncated": False},
        {"loss": "dro", "temperature": 0.7, "baseline": "leave_one_out", "divide_by_std": True},
        {"temperature": 1.3, "train": {"layout": "packed", "max_buffer_tokens": 512}},
    ],
    ids=["full", "ppo", "cispo+kl", "dro", "hot"],
)
def test_options_learn_and_begin_on_policy(model, tmp_path, options):
    config = rl_config(model, tmp_path, steps=1, eval_problems=None, **options)
    run(config)
    (record,) = records(config)
    parts = options.get("updates_per_batch", 1)
    assert record["optim/updates"] == parts
    assert record["update_norm"] > 0
    if parts == 1:
        assert record["ratio/max"] == pytest.approx(1, abs=2e-3)
        assert record["ratio/min"] == pytest.approx(1, abs=2e-3)
    else:  # later parts are off policy
        assert record["optim/kl_sample_train_v2"] > 0


def test_a_grader_that_gives_no_value_is_told_once_a_reason(model, tmp_path, monkeypatch, capsys):
    original = Sampler.groups
    monkeypatch.setattr(loop, "grade_groups", lambda groups, grader: [failed(group) for group in groups])

    def failed(group):
        one = Graded(0.0, False, True, "returned NaN")
        first, *others = group.episodes
        return replace(group, episodes=(replace(first, graded=one), *others))

    def groups(*arguments):
        return grade_groups(original(*arguments), loop.grader_named())

    monkeypatch.setattr(Sampler, "groups", groups)
    run(rl_config(model, tmp_path, steps=2))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "grader gave no value" in x]
    assert "step 1: the grader gave no value for 4 of 16 answers (returned NaN); they count as 0" in line


# What q does to exp(lp - q), the squares of the gradient, and a clipped ratio in float32.
@pytest.mark.parametrize("value", [-1e30, 1e30, -60.0, float("nan"), 1.0], ids=str)
@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_absurd_recorded_numbers_end_in_a_line_before_anything_is_learned_or_saved(
    model, tmp_path, monkeypatch, recwarn, loss, value
):
    config = rl_config(model, tmp_path, loss=loss, updates_per_batch=2)
    original = Sampler.groups

    def absurd(self, trained, step, *rest):
        groups = original(self, trained, step, *rest)
        if step < 2:
            return groups
        first, *others = groups[0].episodes
        first = replace(first, logprobs=[value, *first.logprobs[1:]])
        return [replace(groups[0], episodes=(first, *others)), *groups[1:]]

    monkeypatch.setattr(Sampler, "groups", absurd)
    monkeypatch.setattr(Learner, "learn", once(Learner.learn))
    with pytest.raises(UserError, match=r"step 2: the sampler recorded a log-probability of") as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert [record["step"] for record in records(config)] == [1]
    assert json.loads((config.run_dir / "failure.json").read_text())["step"] == 1
    assert not [warning for warning in recwarn if "overflow" in str(warning.message)]


def once(function):
    """The function, which must not be called twice."""
    calls = []

    def counted(*arguments):
        assert not calls
        calls.append(arguments)
        return function(*arguments)

    return counted


@pytest.mark.parametrize("loss", ["importance_sampling", "cispo"])
def test_a_batch_whose_numbers_are_not_finite_ends_in_a_line_before_a_checkpoint(
    model, tmp_path, monkeypatch, loss
):
    """Ratios of e^95 are more than float32 holds; clipped ones give a loss and a gradient all the same."""
    config = rl_config(model, tmp_path, loss=loss, eval_problems=None)
    monkeypatch.setattr("jaxlora.rl.learning.LEAST", -1e3)
    original = Sampler.groups

    def absurd(self, *arguments):
        groups = original(self, *arguments)
        return [
            replace(
                group,
                episodes=tuple(replace(one, logprobs=[-100.0] * len(one.tokens)) for one in group.episodes),
            )
            for group in groups
        ]

    monkeypatch.setattr(Sampler, "groups", absurd)
    with pytest.raises(Diverged, match=r"step 1: loss .*, gradient norm .*, largest ratio .*e\+4\d, KL"):
        run(config)
    assert not list((config.run_dir / "checkpoints").glob("step-*"))
    assert records(config) == []


def test_a_run_is_not_resumed_with_another_reward(undisturbed, model, tmp_path, monkeypatch):
    config = rl_config(model, tmp_path)
    with monkeypatch.context() as patch:
        killed_at(patch, "before a step")
        with pytest.raises(Killed):
            run(config)
    other = rl_config(model, tmp_path, reward="gsm8k_numeric")
    with pytest.raises(UserError, match=r"differs in rl\.reward: 'gsm8k_strict' then, 'gsm8k_numeric' now"):
        run(other)


def test_a_run_is_not_resumed_with_a_function_that_was_changed(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own_reward.py"
    begun = "def reward(row, text): return len(text) % 2"
    file.write_text(begun)
    config = rl_config(model, tmp_path, reward="own_reward:reward")
    with monkeypatch.context() as patch:
        killed_at(patch, "before a step")
        with pytest.raises(Killed):
            run(config)
    file.write_text("def reward(row, text): return 1")
    with pytest.raises(UserError, match=r"it differs in rl\.reward's file: '\w{64}' then, '\w{64}' now"):
        run(config)
    file.write_text(begun)
    manifest = config.run_dir / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"reward": None}))  # of an older run
    run(config)


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"group": 1}, r"config.rl.group: 1 is not allowed; give a whole number from 2 to"),
        ({"temperature": 0}, r"config.rl.temperature: 0 is not allowed; give a number above 0"),
        ({"top_p": 0.9}, r"config.rl.top_p: filtering would change the sampler's distribution"),
        ({"loss": "reinforce"}, r"config.rl.loss: \"reinforce\" is not allowed; give importance_sampling"),
        ({"max_new_tokens": 5000}, r"config.rl.max_new_tokens: .* but the model has 2,048 positions"),
        ({"reward": "nothing"}, r"rl.reward: 'nothing' is not known"),
        ({"clip_low": 1.3}, r"config.rl.clip_low: 1.3 must be below clip_high"),
        ({"updates_per_batch": 5}, r"config.rl.updates_per_batch: 5 updates need as many prompts"),
        ({"kl": 0.1, "train": {"what": "full"}}, r"config.rl.kl: train.what=full keeps no base"),
        ({"lora": {"dropout": 0.1}}, r"config.lora.dropout: answers are sampled without dropout"),
        ({"problems": "missing.jsonl"}, r"missing.jsonl"),
        ({"reward": "json:nothing"}, r"rl.reward: json:nothing cannot be imported: AttributeError"),
        ({"suffix": ""}, r"config.rl.suffix: '' is not allowed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line_before_a_model_is_loaded(model, tmp_path, monkeypatch, rl, message):
    monkeypatch.setattr(loop, "load_frozen", lambda job: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message) as caught:
        run(rl_config(model, tmp_path, **rl))
    assert "\n" not in str(caught.value)


def test_a_system_message_may_be_none_at_all_and_texts_may_have_lines(model, tmp_path):
    said = prepare(rl_config(model, tmp_path, system=None)).problems[0].messages
    assert [message["role"] for message in said] == ["system", "user"]
    job = prepare(rl_config(model, tmp_path, system="", suffix="\nStep by step."))
    assert job.problems[0].messages == [said[1] | {"content": said[1]["content"] + "\nStep by step."}]
    assert prepare(rl_config(model, tmp_path, system="a\nb")).problems[0].messages[0]["content"] == "a\nb"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_plan_counts_a_rounded_base_as_it_is_held(tmp_path, kind):
    model = {"path": "embedded:base", "dtype": "float32", "base_dtype": kind}
    job = prepare(from_dict({"model": model, "results_dir": str(tmp_path), "rl": {"problem_rows": 4}}))
    shards = [x.addressable_shards[0] for x in jax.tree.leaves(load_frozen(job))]
    assert estimate_memory(job)["base"] == sum(shard.data.nbytes for shard in shards)


def test_an_empty_file_of_problems_is_one_line(model, tmp_path):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(UserError, match=r"none.jsonl: holds no problems"):
        run(rl_config(model, tmp_path, problems=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("mesh", "copies"),
    [({"data": 8}, 0), ({"data": 4, "tensor": 2}, 0), ({"tensor": 8}, 0), ({"data": 2, "fsdp": 4}, 1)],
    ids=str,
)
def test_the_base_is_on_the_devices_once_unless_fsdp_splits_it(model, tmp_path, mesh, copies):
    job = job_of(rl_config(model, tmp_path, mesh=mesh), devices=8)
    frozen, trained = load_frozen(job), fresh_state(job).trained
    _, _, weights, _ = Sampler(job, frozen).decoding(trained)
    held, again = shared_bytes(frozen, weights)
    assert (again > 0) == copies
    told = estimate_memory(job)
    assert 8 * told["base"] == held
    assert 8 * told.get("copy for the sampler", 0) == again
