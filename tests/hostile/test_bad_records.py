"""Broken results of a study, runs and recordings are one line; a report stands on whole ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.bad_input import FORBIDDEN_NAME, VALUES, assert_exit_2, attempt, bad_json, refused, tries
from helpers.study_fixtures import build_study, empty_pictures, make_report
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.evals.subjects import run_config
from jaxlora.parity.recording import load_recording, make_settings
from jaxlora.parity.study import compare_run, table
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json
from jaxlora.runtime.records import read_manifest, read_metrics, read_summary
from jaxlora.study.results import load_study

STUDY, RUN, RECORDING = "study results", "run directory", "parity recording"
FIXTURE = Path(__file__).parents[1] / "fixtures" / "tinker"
NAMES = ("manifest.json", "summary.json", "metrics.jsonl", "failure.json")
EVALUATION = ("summary.json", "predictions.jsonl")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = build_study(tmp_path_factory.mktemp("study") / "results", seeds=(0,))
    (root / "test-all_layer-seed-0/failure.json").write_text('{"error": "none", "step": 3}')
    return root


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Reports without pictures and without bootstrap intervals: they read nothing that the rest does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlora.study.figures.draw_figures", empty_pictures)
        patch.setattr("jaxlora.study.comparison.bootstrap_interval", lambda *_: None)
        yield


def use(root: Path) -> None:
    make_report(root)


def test_the_study_that_is_changed_below_is_right(good):
    use(good)


class TestStudies:
    @tries(30)
    @given(data=st.data())
    @pytest.mark.parametrize("name", [*NAMES, *(f"evaluation/{name}" for name in EVALUATION)])
    def test_a_changed_file_is_used_or_named(self, good, name, data):
        file = good / "test-all_layer-seed-0" / name
        whole = file.read_bytes()
        lines = whole.splitlines(keepends=True)
        if name.endswith(".jsonl"):
            at = data.draw(st.integers(0, len(lines) - 1))
            lines[at] = data.draw(bad_json(json.loads(lines[at]))) + b"\n"
            content = b"".join(lines)
        else:
            content = data.draw(bad_json(json.loads(whole)))
        try:
            file.write_bytes(content)
            attempt(STUDY, use, good)
        finally:
            file.write_bytes(whole)

    @pytest.mark.parametrize("length", [0, 2**40, 2**63])
    def test_an_adapter_whose_header_lies_is_named(self, good, tmp_path, length):
        root = Path(shutil.copytree(good, tmp_path / "results"))
        file = root / "test-all_layer-seed-0/adapter/adapter_model.safetensors"
        file.write_bytes(length.to_bytes(8, "little"))
        assert "safetensors" in refused(STUDY, use, root)

    @pytest.mark.parametrize("place", ["no/such", "/dev/null", "a\0b"])
    def test_a_place_without_results_is_named(self, place):
        refused(STUDY, load_study, Path(place), "test")


class TestRuns:
    @tries(100)
    @given(data=st.data())
    @pytest.mark.parametrize("name", NAMES[:3])
    def test_a_changed_run_compares_with_the_study_or_is_named(self, good, name, data):
        run = good / "test-all_layer-seed-0"
        whole = (run / name).read_bytes()
        first, _, rest = whole.partition(b"\n") if name.endswith(".jsonl") else (whole, b"", b"")
        try:
            (run / name).write_bytes(data.draw(bad_json(json.loads(first))) + b"\n" + rest)
            attempt(RUN, lambda: table(compare_run(run), "t"))
        finally:
            (run / name).write_bytes(whole)

    @tries(100)
    @given(
        bad_json(
            {
                "config": {"prefix": "p", "lora": {"rank": 4}},
                "base": {"fingerprint": "f"},
                "gates": {"passed": True},
            }
        )
    )
    def test_a_changed_manifest_gives_a_configuration_or_one_line(self, repository, tmp_path, content):
        from jaxlora.cli import load_config

        (tmp_path / "manifest.json").write_bytes(content)
        attempt(RUN, run_config, load_config(repository / "configs/tiny.py"), tmp_path)

    @tries(100)
    @given(VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=50))
    def test_any_content(self, tmp_path, content):
        for name, read in (
            ("manifest.json", read_manifest),
            ("summary.json", read_summary),
            ("metrics.jsonl", read_metrics),
        ):
            (tmp_path / name).write_bytes(content)
            attempt(RUN, read, tmp_path)

    @pytest.mark.parametrize(
        "content",
        [b"{", b"[]", b'{"config": 7}', b'{"config": {"seed": "0"}}', b'{"gates": []}', b"[" * 10**5],
    )
    @pytest.mark.parametrize("tool", ["launch/evaluate.py", "tools/export.py"])
    def test_the_entry_points_end_with_code_2(self, repository, tmp_path, capsys, tool, content):
        (tmp_path / "manifest.json").write_bytes(content)
        (tmp_path / "summary.json").write_text('{"status": "completed"}')
        words = ["--run", str(tmp_path)]
        if tool.startswith("launch"):
            words += ["--config", str(repository / "configs/tiny.py")]
        else:
            words += ["--out", str(tmp_path / "out")]
        assert_exit_2(RUN, repository / tool, words, capsys)
        assert not (tmp_path / "out").exists()


class TestRecordings:
    @pytest.fixture(scope="class")
    def recording(self) -> dict:
        return read_json(FIXTURE / "recording.json")

    def test_the_recording_that_is_changed_below_is_right(self):
        load_recording(FIXTURE / "recording.json")

    @tries(80)
    @given(data=st.data())
    def test_a_changed_recording_is_whole_or_named(self, recording, tmp_path, data):
        content = data.draw(bad_json(recording | {"cases": recording["cases"][:1]}))
        (tmp_path / "recording.json").write_bytes(content)

        def use() -> None:
            for case in load_recording(tmp_path / "recording.json").cases:
                assert all(
                    row.n_tokens == len(lp) for row, lp in zip(case.rows, case.before.logprobs, strict=True)
                )
                assert set(case.adapters) == {"start", "end"}

        attempt(RECORDING, use)

    @pytest.mark.parametrize(
        "change",
        [
            lambda case: case["tokens"].pop(),
            lambda case: case["prompt_lengths"].pop(),
            lambda case: case["prompt_lengths"].__setitem__(0, 10**6),
            lambda case: case["prompt_lengths"].__setitem__(0, 0),
            lambda case: case["tokens"][0].__setitem__(0, -1),
            lambda case: case["tokens"][0].__setitem__(0, 2**31),
            lambda case: case["steps"].pop(),
            lambda case: case["steps"][3]["logprobs"].pop(),
            lambda case: case["before"]["logprobs"][0].pop(),
            lambda case: case["after"].__setitem__("loss", float("nan")),
            lambda case: case["answers"].pop(),
            lambda case: case["adapters"].pop("end"),
            lambda case: case.__setitem__("name", f"../{FORBIDDEN_NAME}"),
            lambda case: case.__setitem__("name", "/etc"),
        ],
    )
    def test_parts_that_do_not_fit_together_are_named(self, recording, tmp_path, change):
        copy = json.loads(json.dumps(recording))
        change(copy["cases"][0])
        (tmp_path / "recording.json").write_text(json.dumps(copy))
        refused(RECORDING, load_recording, tmp_path / "recording.json")

    @pytest.mark.parametrize(
        "settings", [{"steps": 10**9}, {"n_rows": 10**9}, {"max_new_tokens": 10**12}, {"rank": 0}]
    )
    def test_a_recording_cannot_ask_for_endless_work(self, recording, tmp_path, settings):
        copy = recording | {"settings": recording["settings"] | settings}
        (tmp_path / "recording.json").write_text(json.dumps(copy))
        refused(RECORDING, load_recording, tmp_path / "recording.json")
        with pytest.raises(UserError):
            make_settings(**settings)

    def test_tokens_that_the_base_does_not_know_are_refused(self, repository, recording, tmp_path, capsys):
        copy = json.loads(json.dumps(recording))
        copy["cases"][0]["tokens"][0][0] = 10**6
        (tmp_path / "recording.json").write_text(json.dumps(copy))
        words = ["compare", str(tmp_path / "recording.json"), "--base", str(FIXTURE / "base")]
        assert "token" in assert_exit_2(RECORDING, repository / "tools/tinker_parity.py", words, capsys)

    @pytest.mark.parametrize(
        "words",
        [["compare", "no/such.json"], ["compare", "/dev/zero"], ["study", "--run", "no/such"], ["nothing"]],
    )
    def test_the_tool_ends_with_code_2(self, repository, capsys, words):
        assert_exit_2(RECORDING, repository / "tools/tinker_parity.py", words, capsys)
