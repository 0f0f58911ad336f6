"""Policy gradients are a Tinker service's: a recording of a local one, replayed.

Made by `python tests/helpers/tinker_recording.py`: SkyRL's JAX engine, driven by the real SDK, drew groups of
answers and took ten steps of `importance_sampling` and of `ppo` on them.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlora.config import MeshConfig
from jaxlora.data.render import RenderedRow
from jaxlora.parity.backend import Drawn, loss_of, reduced
from jaxlora.parity.comparing import BARS, relative
from jaxlora.parity.ours import OurBackend
from jaxlora.parity.policy import (
    OBJECTIVES,
    centred,
    compare_policy,
    group_of,
    load_policy,
    recorded_rows,
    rows_of,
    run_policy,
)
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tinker"


def one_device():
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def loaded():
    return load_policy(FIXTURE / "policy.json")


@pytest.fixture(scope="module")
def checks(loaded):
    found = compare_policy(loaded, FIXTURE / "base", "float32", one_device())
    return {(check.case, check.name): check for check in found}


# --- The recording of a real service ------------------------------------------------------------------------


def test_every_difference_is_within_the_bars_of_supervised_parity(checks):
    assert [check for check in checks.values() if not check.passed] == []
    assert {check.bar for check in checks.values()} <= {1e-3, 1e-4, 1e-5}
    for objective in OBJECTIVES:
        assert checks[objective, "log-probabilities in the steps, largest difference"].value <= 1e-4
        assert checks[objective, "adapter after the steps, relative"].value <= 1e-3


def test_the_samplers_own_log_probabilities_are_ours(checks):
    assert checks["start", "the sampler's own log-probabilities, largest difference"].value <= 1e-4


def test_the_services_length_normalisation_is_named_and_the_sum_would_be_seen(loaded, checks):
    """The engine divides by each row's tokens where Tinker sums; rows of unequal lengths show it."""
    assert loaded.recording.settings.reduction == "length_mean"
    assert len(set(map(len, loaded.recording.answers))) > 1
    for objective in OBJECTIVES:
        assert checks[objective, "adapter if the loss were the sum, relative"].value > 0.05


def test_one_objective_is_not_taken_for_the_other(checks):
    assert checks["ppo", "adapter if the loss were importance_sampling, relative"].value > 0.05
    assert checks["importance_sampling", "adapter if the loss were ppo, relative"].value > 0.05


def ratios(recording, objective) -> list[np.ndarray]:
    """exp(lp - q) of the answers' tokens in each recorded step: how far off policy the steps went."""
    found = []
    for step, one in enumerate(recording.lives[objective].steps):
        answers = group_of(recording.sampler_logprobs, recording.settings, step)
        gaps = [
            np.asarray(row[-len(own) :]) - np.asarray(own)
            for row, own in zip(one.logprobs, answers, strict=True)
        ]
        found.append(np.exp(np.concatenate(gaps)))
    return found


def test_the_recording_is_of_ten_steps_from_on_policy_to_beyond_both_clip_bounds(loaded):
    recording = loaded.recording
    assert recording.trainer == {"trainer": "tinker", "sdk": "0.24.1"}
    assert recording.settings.steps == 10
    groups = np.reshape(recording.advantages, (-1, recording.settings.group_size))
    np.testing.assert_allclose(groups.sum(1), 0, atol=1e-6)
    assert (groups.min(1) < 0).all()
    for objective in OBJECTIVES:
        found = ratios(recording, objective)
        np.testing.assert_allclose(found[0], 1, atol=1e-5)
        assert min(one.min() for one in found) < 0.8
        assert max(one.max() for one in found) > 1.2


# --- The comparison fails where it should -------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: {"advantages": [-x for x in r.advantages]},
        lambda r: {"sampler_logprobs": [[*row[1:], row[0]] for row in r.sampler_logprobs]},
        lambda r: {"settings": replace(r.settings, reduction="sum")},
        lambda r: {"settings": replace(r.settings, learning_rate=r.settings.learning_rate * 1.01)},
    ],
    ids=["sign", "shift", "normalisation", "rate"],
)
def test_what_is_broken_on_purpose_makes_another_adapter(loaded, wrong):
    recording = replace(loaded.recording, **wrong(loaded.recording))
    backend = OurBackend(FIXTURE / "base", "float32", recording.settings.reduction, one_device())
    end, ours = backend.load(loaded.adapter("ppo")).lora, backend.load(loaded.adapter("start"))
    start = ours.lora
    run_policy(ours, recorded_rows(recording), recording.settings, "ppo")
    assert relative(ours.lora, end, start) > 5 * BARS["float32"].adapter


@pytest.mark.slow
def test_this_package_recorded_as_if_it_were_a_service_comes_back(tmp_path, monkeypatch):
    """By the two commands; JSON holds every float32 exactly, so the replay differs nowhere."""
    backend = OurBackend(FIXTURE / "base", "float32", "sum", one_device())
    monkeypatch.setattr("jaxlora.parity.tinker_service.TinkerBackend", lambda base, seconds: backend)
    main = runpy.run_path("tools/tinker_parity.py")["main"]
    out = tmp_path / "own.json"
    words = ["record", "--policy", "--out", str(out), "--base-label", "tiny", "--tokenizer", "embedded:base"]
    monkeypatch.setattr(sys, "argv", ["tinker_parity.py", *words, "--steps", "4"])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", ["x", "compare", str(out), "--base", str(FIXTURE / "base")])
    assert main() == 0
    assert str(tmp_path) not in out.read_text()
    found = compare_policy(load_policy(out), FIXTURE / "base", "float32", one_device())
    # Drawing and reading are two programs; all else is the same one.
    assert max(check.value for check in found[1:] if not check.above) == 0
    assert found[0].value < 1e-5


# --- Pieces -------------------------------------------------------------------------------------------------


def test_rows_hold_advantages_and_the_samplers_values_on_the_answer_alone():
    drawn = [Drawn([4, 5], [-1.0, -2.0]), Drawn([4], [-3.0])]
    first, second = rows_of([[1, 2, 3]], drawn, [0.25, -0.25], 2)
    assert first.tokens.tolist() == [1, 2, 3, 4, 5]
    assert first.weights.tolist() == [0, 0, 0, 1, 1]
    assert first.extras["advantages"].tolist() == [0, 0, 0, 0.25, 0.25]
    assert second.extras["sampler_logprobs"].tolist() == [0, 0, 0, -3]
    np.testing.assert_allclose(centred([*drawn, Drawn([5], [0]), Drawn([5], [0])], 2), [-0.25, 0.25, 0, 0])


def test_the_length_mean_divides_by_all_tokens_of_a_row():
    row = RenderedRow("a", np.arange(7, dtype=np.int32), np.array([0, 0, 0, 0, 1, 1, 1], np.float32))
    (found, _) = reduced([row, row], "length_mean")
    np.testing.assert_allclose(found.weights[4:], 1 / 12)
    (found, _) = reduced([row, row], "sequence_mean")
    np.testing.assert_allclose(found.weights[4:], 1 / 6)


def test_the_loss_of_a_row_is_the_published_value():
    """The three tokens of the documentation's example, behind a prompt of two."""
    drawn = [Drawn([3, 4, 5], [-0.7, -1.0, -2.0])]
    (row,) = rows_of([[1, 2]], drawn, [0.75], 1)
    logprobs = np.array([9.0, -0.5, -1.2, -2.0], np.float32)
    assert loss_of(row, logprobs, "importance_sampling") == pytest.approx(-2.2801001334, abs=1e-6)
    assert loss_of(row, logprobs, "ppo") == pytest.approx(-2.2640480648, abs=1e-6)


def test_a_changed_adapter_is_refused_by_its_hash(tmp_path):
    shutil.copy(FIXTURE / "policy.json", tmp_path)
    shutil.copytree(FIXTURE / "policy-adapters", tmp_path / "policy-adapters")
    file = tmp_path / "policy-adapters" / "ppo" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="not the file that was recorded"):
        load_policy(tmp_path / "policy.json").adapter("ppo")
    assert load_policy(tmp_path / "policy.json").adapter("start").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("start"), "not a recording of this version: start"),
        (lambda r: r["lives"].pop("ppo"), "an objective is missing"),
        (lambda r: r["answers"].pop(), "7 answers, not 4 to each of 2 prompts"),
        (lambda r: r["sampler_logprobs"][3].pop(), "sampler_logprobs do not have the lengths"),
        (lambda r: r["advantages"].pop(), "advantages are not one an answer"),
        (lambda r: r["lives"]["ppo"]["steps"].pop(), "ppo: 9 steps, settings say 10"),
        (lambda r: r["lives"]["ppo"]["steps"][2]["logprobs"][0].pop(), "ppo: log-probabilities do not"),
        (lambda r: r["answers"].__setitem__(0, []), "a prompt or an answer is empty"),
    ],
)
def test_half_a_recording_is_one_line(tmp_path, change, message):
    content = json.loads((FIXTURE / "policy.json").read_text())
    change(content)
    (tmp_path / "policy.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_policy(tmp_path / "policy.json")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_bfloat16_is_held_to_its_own_bars(loaded):
    found = compare_policy(loaded, FIXTURE / "base", "bfloat16", one_device())
    assert [check for check in found if not check.passed] == []
    assert max(check.value for check in found if "largest" in check.name) > BARS["float32"].logprob
