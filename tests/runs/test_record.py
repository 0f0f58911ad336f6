"""What a run says of itself is so: it names the inputs that it read, and the files that it ended with."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers import kills
from helpers.trials import one_line

from jaxlora.data import rows as rows_module
from jaxlora.data.render import load_tokenizer
from jaxlora.data.rows import load_rendered_rows
from jaxlora.runtime.errors import UserError
from jaxlora.train.loop import Diverged


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, repository, compiled) -> kills.Lab:
    folder = tmp_path_factory.mktemp("record")
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(repository / "jaxlora" / "embedded" / "data" / name, folder)
    words = (
        f"--config.data.train_path={folder / 'train.jsonl'}",
        f"--config.data.validation_path={folder / 'val.jsonl'}",
        "--config.data.allow_ungated=true",
    )
    return kills.Lab(folder, compiled, *words)


@pytest.fixture
def copied(lab) -> Path:
    folder = lab.new_folder()
    shutil.copytree(lab.whole.path.parent, folder / "results")
    return folder


class TestInputs:
    def replace(self, file: Path) -> bytes:
        """Put other rows in a file's place, as an editor does; the bytes that it had."""
        before = file.read_bytes()
        other = file.with_suffix(".new")
        other.write_bytes(b"".join(reversed(before.splitlines(keepends=True))))
        other.replace(file)
        return before

    def test_rows_that_are_replaced_after_they_were_read_are_not_in_the_record(self, lab):
        file = lab.folder / "train.jsonl"
        run = lab.pause_at(lab.new_folder(), "rows read, no manifest")
        before = self.replace(file)
        try:
            assert run.go_on() == 0, run.log()
        finally:
            file.write_bytes(before)
        lab.compare(run)
        recorded = json.loads((run.path / "manifest.json").read_text())["dataset"]["train"]["sha256"]
        assert recorded == hashlib.sha256(before).hexdigest()

    @pytest.mark.parametrize("same_size", [True, False])
    def test_rows_that_are_replaced_while_they_are_read_are_refused(
        self, repository, tmp_path, monkeypatch, same_size
    ):
        file = tmp_path / "val.jsonl"
        lines = (repository / "jaxlora/embedded/data/val.jsonl").read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines))
        original = rows_module.iter_rendered

        def replace_then_read(*args):
            yield from original(*args)
            file.write_bytes(b"".join(reversed(lines) if same_size else lines[1:]))

        monkeypatch.setattr(rows_module, "iter_rendered", replace_then_read)
        with pytest.raises(UserError, match=r"val.jsonl: changed while it was being read"):
            load_rendered_rows(file, load_tokenizer("embedded:base"), max_length=256)

    def test_the_hash_is_of_the_whole_file_also_where_only_some_rows_are_taken(self, repository):
        file = repository / "jaxlora/embedded/data/val.jsonl"
        _, report = load_rendered_rows(file, load_tokenizer("embedded:base"), max_length=256, limit=2)
        assert (report.used, report.sha256) == (2, sha256(file))

    def test_rows_that_are_replaced_after_their_gate_are_refused(self, lab):
        file = lab.folder / "train.jsonl"
        run = lab.pause_at(lab.new_folder(), "gate looked at, rows not read")
        before = self.replace(file)
        try:
            assert run.go_on() == 2, run.log()
        finally:
            file.write_bytes(before)
        assert "train.jsonl: changed while it was being read" in one_line(run.log())

    def test_a_base_that_is_replaced_while_the_run_starts_is_refused(self, lab):
        folder = lab.new_folder()
        config = lab.folder / "model" / "config.json"
        run = lab.pause_at(folder, "manifest written, base not loaded")
        before = config.read_bytes()
        config.write_bytes(before + b"\n")
        try:
            assert run.go_on() == 2, run.log()
        finally:
            config.write_bytes(before)
        assert "config.model.path: its files changed while being read" in one_line(run.log())
        lab.finish(folder)

    def test_a_bit_of_the_base_that_flipped_between_two_starts_is_seen(self, lab):
        """In the middle of the weights, where the fingerprint does not look."""
        folder = lab.new_folder()
        lab.kill_at(folder, "published, older ones not deleted")
        file = lab.folder / "model" / "model.safetensors"
        before = file.read_bytes()
        if len(before) < 3 * 2**16:
            pytest.skip("the fingerprint sees all of so small a base")
        changed = bytearray(before)
        changed[len(before) // 2] ^= 1
        file.write_bytes(changed)
        try:
            run = lab.start(folder)
            assert run.wait() == 2, run.log()
        finally:
            file.write_bytes(before)
        assert "its weights are not those that this run started with" in one_line(run.log())
        lab.finish(folder)


class TestOutputs:
    def test_the_summary_holds_the_hash_of_every_file_that_is_read_later(self, lab):
        summary = json.loads((lab.whole.path / "summary.json").read_text())
        names = {path.name for path in (lab.whole.path / "selected").iterdir()}
        assert names >= {"adapter_model.safetensors", "adapter_config.json", "jaxlora.json"}
        assert {*summary["sha256"]} == {"metrics.jsonl", "manifest.json", *(f"selected/{n}" for n in names)}
        for name, value in summary["sha256"].items():
            assert value == sha256(lab.whole.path / name)

    @pytest.mark.parametrize("words", [(), ("--config.overwrite=true",), ("--config.train.grace_seconds=9",)])
    def test_a_run_that_is_opened_again_ends_in_the_same_bytes(self, lab, copied, words):
        """As a study does where the selected adapter was damaged."""
        path = copied / "results" / kills.RUN_ID
        before = {p: p.read_bytes() for p in path.iterdir() if p.suffix in (".json", ".jsonl", ".txt")}
        (path / "selected/adapter_model.safetensors").write_bytes(b"damaged")
        if words == ("--config.overwrite=true",):  # the run was begun by an overwriting command
            before[path / "manifest.json"] = text = before[path / "manifest.json"].replace(
                b'"overwrite": false', b'"overwrite": true'
            )
            (path / "manifest.json").write_bytes(text)
        (path / "summary.json").write_text('{"status": "unfinished"}')
        run = lab.finish(copied, *words)
        changed = [p.name for p, content in before.items() if p.read_bytes() != content]
        expected = {"--config.train.grace_seconds=9": ["manifest.json", "summary.json"]}
        if words == ("--config.overwrite=true",):
            assert json.loads((path / "summary.json").read_text())["sha256"]["manifest.json"] == sha256(
                path / "manifest.json"
            )
            changed.remove("summary.json")  # it held the hash of the manifest before
        assert sorted(changed) == expected.get(*words or ("",), []), run.log()

    def test_a_changed_number_in_the_metrics_sends_a_run_back_to_before_it(self, lab):
        folder = lab.new_folder()
        run = lab.kill_at(folder, "published, older ones not deleted", nth=3)
        newest = max(int(path.name) for path in (run.path / "checkpoints").iterdir() if path.name.isdigit())
        file = run.path / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        i = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == newest)
        changed = lines[i].replace(b'"loss": 6', b'"loss": 5')
        assert changed != lines[i]
        file.write_bytes(b"".join([*lines[:i], changed, *lines[i + 1 :]]))
        text = " ".join(lab.finish(folder).log().split())
        assert f"skipping the checkpoint of step {newest}" in text
        assert "metrics.jsonl are not what was written" in text


class TestDivergence:
    """The advice fits what there is."""

    def test_at_the_first_step_no_checkpoint_before_it_is_spoken_of(self, lab):
        run = lab.start(lab.new_folder(), "--config.optim.peak_lr=1e38", "--config.lora.alpha=1e6")
        assert run.wait() == 2, run.log()
        failure = json.loads((run.path / "failure.json").read_text())
        message = one_line(run.log())
        assert f"step {failure['step']}: loss" in message
        assert not [path for path in (run.path / "checkpoints").iterdir() if path.name.isdigit()]
        assert "Earlier checkpoints" not in message
        assert "Nothing was saved before it; try a lower --config.optim.peak_lr" in message

    def test_what_it_says(self):
        assert "Earlier checkpoints are intact" in str(Diverged(7, "loss nan", saved=True))
        for saved in (True, False):
            assert "try a lower --config.optim.peak_lr" in str(Diverged(1, "loss nan", saved))
