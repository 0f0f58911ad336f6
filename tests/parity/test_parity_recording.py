"""What a Tinker service answered, this package answers too: a recording of a local service, replayed.

Made by `python tests/helpers/tinker_recording.py`: SkyRL's JAX engine driven by the real SDK, a random
float32 Qwen3, rows of the embedded data, ten Adam steps with eps 1e-12.
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
from helpers.hf_models import make_checkpoint

from jaxlora.config import MeshConfig
from jaxlora.data.render import RenderedRow, shifted
from jaxlora.parity.backend import AdamStep, Pass, reduced
from jaxlora.parity.comparing import BARS, Check, compare, judge, largest, relative, replay, table
from jaxlora.parity.ours import OurBackend
from jaxlora.parity.recording import (
    Settings,
    choose_rows,
    cut_answers,
    learning_rates,
    load_recording,
    make_settings,
    record,
)
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tinker"


def one_device():
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def recording():
    return load_recording(FIXTURE / "recording.json")


@pytest.fixture(scope="module")
def checks(recording) -> dict[tuple[str, str], Check]:
    found = compare(recording, FIXTURE / "base", "float32", one_device())
    return {(check.case, check.name): check for check in found}


# --- The recording of a real service ------------------------------------------------------------------------


def test_the_recording_is_of_the_real_sdk_and_of_the_studys_adam(recording):
    assert recording.trainer == {"trainer": "tinker", "sdk": "0.24.1"}
    assert recording.settings.steps == 10
    assert AdamStep(1.0)[1:] == (0.9, 0.95, 1e-12)
    assert [case.lengths for case in recording.cases] == ["equal", "unequal"]
    assert all(len(case.steps) == 10 and len(case.rows) == 8 for case in recording.cases)


def test_every_difference_is_within_its_float32_bar(checks):
    assert [check for check in checks.values() if not check.passed] == []
    assert len(checks) >= 30


@pytest.mark.parametrize("case", ["all_layer-equal", "all_layer-unequal"])
def test_the_bars_are_those_that_were_promised(checks, case):
    """Log-probabilities within 1e-4, adapters within 1e-3 after ten steps, the same greedy tokens."""
    for when in ("before training", "in the steps", "after the steps", "of the service's own adapter"):
        assert checks[case, f"log-probabilities {when}, largest difference"].value <= 1e-4
    assert checks[case, "adapter after the steps, relative"].value <= 1e-3
    assert checks[case, "greedy tokens of the service's own adapter that differ"].value == 0


def test_the_recording_moved_the_adapter_and_the_loss(recording):
    for case in recording.cases:
        assert case.after.loss < 0.95 * case.before.loss
        assert largest([case.before], [case.after]) > 0.1


def test_the_services_loss_is_named_and_the_other_one_would_be_seen(checks):
    """The engine averages over rows where Tinker sums: on unequal answers that is another adapter."""
    check = checks["all_layer-unequal", "adapter if the loss were the sum, relative"]
    assert check.above
    assert check.value > 0.01


def test_equal_answers_have_equal_weight_sums_and_unequal_ones_do_not(recording):
    equal, unequal = ({shifted(row)[2].sum() for row in case.rows} for case in recording.cases)
    assert len(equal) == 1
    assert len(unequal) > 1


def test_a_changed_adapter_is_refused_by_its_hash(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "copy")
    file = tmp_path / "copy/recording-adapters/all_layer-equal/start/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = load_recording(tmp_path / "copy" / "recording.json")
    assert changed.adapter(changed.cases[1], "start").is_dir()
    with pytest.raises(UserError, match="not the file that was recorded"):
        changed.adapter(changed.cases[0], "start")


# --- The comparison fails where it should -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """This package recorded as if it were a service: cheap, and wrong exactly where a test makes it wrong."""
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder / "base", vocab_size=64, hidden_size=16, num_hidden_layers=1, head_dim=8)
    rng = np.random.default_rng(5)
    rows = []
    for i in range(8):
        length, prompt = int(rng.integers(20, 40)), int(rng.integers(4, 9))
        weights = (np.arange(length) >= prompt).astype(np.float32)
        rows.append(RenderedRow(str(i), rng.integers(0, 64, length).astype(np.int32), weights))
    backend = OurBackend(folder / "base", "float32", "sum", one_device())
    settings = Settings(steps=3, batch_rows=2, max_new_tokens=4)
    record(backend, rows, settings, folder / "recording.json", "tiny", stop_token=63)
    read = load_recording(folder / "recording.json")
    return folder, read, [replay(read, case, backend) for case in read.cases]


def failing(recording, case, answers, bars: str = "float32") -> set[str]:
    return {check.name for check in judge(recording, case, answers, BARS[bars]) if not check.passed}


def test_a_recording_comes_back_as_it_was_written(tiny):
    """JSON holds every float32 exactly, so the replay of this package's own recording differs nowhere."""
    _, recording, replays = tiny
    for case, ours in zip(recording.cases, replays, strict=True):
        checks = judge(recording, case, ours, BARS["float32"])
        assert all(check.value == 0 for check in checks if not check.above)
        assert failing(recording, case, ours) == set()


def test_a_wrong_log_probability_fails(tiny):
    _, recording, (ours, _) = tiny
    wrong = Pass([ours.before.logprobs[0] + 2e-4, *ours.before.logprobs[1:]], ours.before.loss)
    assert failing(recording, recording.cases[0], replace(ours, before=wrong)) == {
        "log-probabilities before training, largest difference",
        "log-probabilities before training, mean difference",
    }


def test_a_wrong_loss_fails(tiny):
    _, recording, (ours, _) = tiny
    wrong = replace(ours.steps[2], loss=ours.steps[2].loss * 1.001)
    expected = {"summed loss in the steps, relative"}
    assert failing(recording, recording.cases[0], replace(ours, steps=[*ours.steps[:2], wrong])) == expected


def test_a_wrong_greedy_token_fails(tiny):
    _, recording, (ours, _) = tiny
    answers = [[(ours.answers[0][0] + 1) % 60, *ours.answers[0][1:]], *ours.answers[1:]]
    expected = {"greedy tokens of the service's own adapter that differ"}
    assert failing(recording, recording.cases[0], replace(ours, answers=answers)) == expected


def test_a_wrong_step_fails(tiny):
    """An adapter that moved one part in a hundred too far."""
    _, recording, (ours, _) = tiny
    end = jax.tree.map(lambda start, end: start + 1.01 * (end - start), ours.start, ours.end)
    assert failing(recording, recording.cases[0], replace(ours, end=end)) == {
        "adapter after the steps, relative"
    }


def test_another_loss_than_the_recorded_one_fails(tiny):
    _, recording, (_, ours) = tiny
    swapped = replace(ours, end=ours.other_end, other_end=ours.end)
    expected = {"adapter after the steps, relative", "adapter if the loss were the sequence mean, relative"}
    assert failing(recording, recording.cases[1], swapped) == expected


def test_another_placement_than_the_one_asked_for_fails(tiny):
    _, recording, (ours, _) = tiny
    case = replace(recording.cases[0], condition="attention_only")
    assert failing(recording, case, ours) == {"placement is not the one asked for"}


@pytest.mark.slow
def test_bfloat16_is_held_to_its_own_bars():
    """The float32 recording replayed in bfloat16: within the wide bars, and not within the narrow ones."""
    found = compare(load_recording(FIXTURE / "recording.json"), FIXTURE / "base", "bfloat16", one_device())
    assert [check for check in found if not check.passed] == []
    bars = {check.bar for check in found if check.name.startswith("log-probabilities")}
    assert bars == {BARS["bfloat16"].logprob, BARS["bfloat16"].mean_logprob}
    assert max(check.value for check in found if "largest" in check.name) > BARS["float32"].logprob


def test_a_difference_that_is_not_a_number_fails():
    assert not Check("case", "what", float("nan"), 1.0).passed
    assert not Check("case", "what", float("nan"), 1.0, above=True).passed


# --- Pieces -------------------------------------------------------------------------------------------------


def rows_of(*answer_lengths: int) -> list[RenderedRow]:
    return [
        RenderedRow(str(n), np.arange(3 + n, dtype=np.int32), (np.arange(3 + n) >= 3).astype(np.float32))
        for n in answer_lengths
    ]


def test_the_sequence_mean_is_a_sum_with_other_weights():
    rows = reduced(rows_of(2, 5), "sequence_mean")
    assert [float(shifted(row)[2].sum()) for row in rows] == pytest.approx([0.5, 0.5])
    assert reduced(rows_of(2, 5), "sum")[1].weights.sum() == 5


def test_answers_are_cut_to_the_shortest_one():
    rows = cut_answers(rows_of(4, 2, 7))
    assert [len(row.tokens) for row in rows] == [5, 5, 5]
    assert [row.prompt_length for row in rows] == [3, 3, 3]


def test_too_few_short_rows_are_an_error():
    with pytest.raises(UserError, match="only 2 rows have at most 8 tokens; 3 are needed"):
        choose_rows(rows_of(2, 3, 90), make_settings(n_rows=3, max_tokens=8))


def test_the_rates_are_the_studys_schedule():
    rates = learning_rates(Settings(steps=10, peak_lr=1e-3))
    assert len(rates) == 10
    assert rates[-1] == pytest.approx(1e-4)
    assert rates == sorted(rates, reverse=True)


def test_the_relative_difference_is_in_units_of_the_distance_moved():
    tree = {"a": np.array([3.0, 4.0])}
    assert relative({"a": np.array([3.0, 4.5])}, tree, {"a": np.zeros(2)}) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r | {"format": 2}, "format"),
        (lambda r: r | {"cases": [r["cases"][0] | {"name": "../x"}]}, "cases.0.name"),
        (lambda r: {key: value for key, value in r.items() if key != "settings"}, "settings"),
    ],
)
def test_a_file_that_is_no_recording_is_one_line(tmp_path, change, message):
    content = json.loads((FIXTURE / "recording.json").read_text())
    (tmp_path / "recording.json").write_text(json.dumps(change(content)))
    with pytest.raises(UserError, match=f"not a recording of this version: {message}"):
        load_recording(tmp_path / "recording.json")


def test_a_recording_is_never_overwritten(tiny):
    folder, recording, _ = tiny
    with pytest.raises(UserError, match="exists already; give another --out"):
        record(None, recording.cases[0].rows, recording.settings, folder / "recording.json", "tiny", 63)  # type: ignore[arg-type]


def test_the_recording_is_small_and_names_no_place(recording):
    files = [file for file in FIXTURE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1_000_000
    for file in files:
        if file.suffix == ".json":
            assert not {"http", "/tmp", "/home", "/root", "tml-"} & set(file.read_text().split('"'))
            assert "://" not in file.read_text()


@pytest.mark.parametrize(("value", "code"), [(0.0, 0), (0.2, 1)])
def test_compare_exits_with_1_where_something_differs(tiny, monkeypatch, capsys, value, code):
    folder, _, _ = tiny
    asked = []

    def compare(recording, model_dir, dtype):
        asked.append((model_dir, dtype))
        return [Check("case", "the loss", value, 0.1)]

    monkeypatch.setattr("jaxlora.parity.comparing.compare", compare)
    main = runpy.run_path("tools/tinker_parity.py")["main"]
    words = ["compare", str(folder / "recording.json"), "--base", str(folder / "base")]
    monkeypatch.setattr(sys, "argv", ["tinker_parity.py", *words])
    assert main() == code
    assert asked == [(folder / "base", "float32")]
    output = capsys.readouterr().out
    assert "the loss" in output
    assert ("FAIL" in output) == bool(code)


def test_a_base_that_is_not_there_is_asked_for_by_the_option_that_names_it(tiny, monkeypatch):
    folder, _, _ = tiny
    main = runpy.run_path("tools/tinker_parity.py")["main"]
    words = ["compare", str(folder / "recording.json"), "--base", "nowhere"]
    monkeypatch.setattr(sys, "argv", ["tinker_parity.py", *words])
    with pytest.raises(UserError, match="--base: no directory 'nowhere'"):
        main()


def test_the_table_shows_difference_bar_and_verdict(capsys):
    from rich.console import Console

    console = Console(width=120)
    console.print(table([Check("c", "what", 0.5, 0.1), Check("c", "other", 0.5, 0.1, above=True)], "title"))
    text = capsys.readouterr().out
    assert "5.00e-01" in text
    assert "at most 0.1" in text
    assert "above 0.1" in text
    assert "FAIL" in text
    assert "pass" in text
