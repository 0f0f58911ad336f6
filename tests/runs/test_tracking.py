"""What a run shows elsewhere: texts in TensorBoard, answers at validations, and the trackers of others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import kills
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxlora.config import from_dict
from jaxlora.runtime.errors import UserError
from jaxlora.train.tracking import Tracker, check_tracking

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def showing(tmp_path_factory, compiled) -> kills.Lab:
    """A job that shows two answers at each validation."""
    return kills.Lab(tmp_path_factory.mktemp("showing"), compiled, "--config.train.samples=2")


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def texts(run: Path) -> dict[str, str]:
    """The last text of each name in TensorBoard."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    found = {}
    for name in board.Tags()["tensors"]:
        if name == "config" or name.startswith("samples/"):
            found[name] = board.Tensors(name)[-1].tensor_proto.string_val[0].decode()
    return found


def test_answers_are_those_of_transformers_and_peft(showing):
    run = showing.whole.path
    step = json.loads((run / "summary.json").read_text())["selected_step"]
    manifest = json.loads((run / "manifest.json").read_text())
    base = manifest["config"]["model"]["path"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "selected")
    records = [record for record in samples(run) if record["step"] == step]
    assert len(records) == 2
    for record in records:
        prompt = tokenizer(record["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=128,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=tokenizer.eos_token_id,
            )
        assert record["answer"] == tokenizer.decode(out[0, prompt.shape[1] :])
        assert record["prompt"].endswith("<think>\n\n</think>\n\n")
        assert "boxed" in record["expected"]


def test_tensorboard_has_the_configuration_the_answers_and_the_norm_per_token(showing):
    run = showing.whole.path
    found = texts(run)
    assert set(found) == {"config", "samples/0", "samples/1"}
    config = json.loads("\n".join(line.removeprefix("    ") for line in found["config"].splitlines()))
    assert config["train"]["samples"] == 2
    last = samples(run)[-1]
    assert last["answer"].splitlines()[0] in found["samples/1"]
    assert all(line.startswith("    ") for line in found["samples/1"].splitlines())
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    value = board.Tensors("train/grad_norm_per_token")[0].tensor_proto.float_val[0]
    assert value == pytest.approx(record["grad_norm"] / record["loss_tokens"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the middle of a validation", "published, older ones not deleted"])
def test_a_run_that_was_killed_shows_the_same(showing, moment):
    folder = showing.new_folder()
    showing.kill_at(folder, moment, nth=3)
    run = showing.finish(folder)
    ours, theirs = ((one / "samples.jsonl").read_bytes() for one in (run.path, showing.whole.path))
    assert ours == theirs
    assert texts(run.path)["samples/0"] == texts(showing.whole.path)["samples/0"]


def test_answers_change_nothing_else(showing, lab):
    same = [name for name in lab.expected if name.endswith(("adapter_model.safetensors", "metrics.jsonl"))]
    assert len(same) == 2
    for name in same:
        assert showing.expected[name] == lab.expected[name]


# --- Trackers -----------------------------------------------------------------------------------------------


def config_of(tmp_path: Path, name: str):
    values = {"tracking": name, "results_dir": str(tmp_path), "prefix": "curves", "lora": {"rank": 3}}
    return from_dict(values)


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config.tracking: trackio is not installed; pip install 'jaxlora"):
        check_tracking(config_of(tmp_path, "trackio"))


class TestAStandIn:
    @pytest.fixture
    def library(self, monkeypatch):
        calls: list = []
        library = SimpleNamespace(
            init=lambda **given: calls.append(given) or calls,
            log=lambda values, step: calls.append((step, values)),
            finish=lambda: calls.append("finish"),
            Settings=lambda **given: given,
            calls=calls,
        )
        monkeypatch.setitem(sys.modules, "wandb", library)
        return library

    def test_it_is_given_the_configuration_and_the_numbers(self, library, tmp_path):
        for _ in range(2):  # a run that goes on has the same id
            tracker = Tracker(config_of(tmp_path, "wandb"))
            tracker.write({"train/loss": 0.5}, 3)
            tracker.close()
            tracker.write({"train/loss": 0.4}, 4)  # after the end: nothing
        first, numbers, end, second, *_ = library.calls
        assert first == second
        assert first["config"]["lora"]["rank"] == 3
        assert (first["project"], first["name"]) == ("curves", "curves-all_layer-seed-0")
        assert first["settings"]["x_disable_meta"]
        assert first["settings"]["console"] == "off"
        assert (numbers, end) == ((3, {"train/loss": 0.5}), "finish")
        assert len(library.calls) == 6

    def test_what_fails_there_is_a_line_and_no_end(self, library, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        tracker = Tracker(config_of(tmp_path, "wandb"))

        def broken(values, step):
            raise OSError(f"no route to the host for {SECRET}")

        library.log = broken
        tracker.write({"train/loss": 0.5}, 3)
        tracker.write({"train/loss": 0.5}, 4)
        tracker.close()
        said = capsys.readouterr().err
        assert said.count("wandb no longer accepts metrics: no route to the host") == 1
        assert SECRET not in said

        library.init = lambda **given: broken({}, 0)
        with pytest.raises(UserError, match=r"config.tracking: wandb failed to start: no route") as error:
            Tracker(config_of(tmp_path, "wandb"))
        assert SECRET not in str(error.value)


REAL = """
import sys
from jaxlora.config import from_dict
from jaxlora.train.tracking import Tracker
config = from_dict({"tracking": sys.argv[1], "results_dir": sys.argv[2], "lora": {"rank": 3}})
config.run_dir.mkdir(parents=True, exist_ok=True)
for steps in (range(1, 4), range(4, 6)):
    tracker = Tracker(config)
    for step in steps:
        tracker.write({"train/loss": 1 / step}, step)
    tracker.close()
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_one_takes_a_run_without_a_network_and_writes_no_key(name, tmp_path, repository):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'jaxlora[{name}]'")
    environment = os.environ | {
        "PYTHONPATH": str(repository),
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": "hf_" + SECRET,
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HOME": str(tmp_path / "home"),
    }
    words = [sys.executable, "-c", REAL, name, str(tmp_path / "results"), SECRET]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    if name == "wandb":
        assert len([path for path in files if path.suffix == ".wandb"]) == 2
        return
    import sqlite3

    (database,) = [path for path in files if path.suffix == ".db"]
    rows = sqlite3.connect(database).execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([json.loads(text)["train/loss"] for _, text in rows], 1 / np.arange(1, 6))


def test_a_fraction_of_a_sample_is_refused():
    with pytest.raises(UserError, match=r"config.train.samples: -1 is not allowed"):
        from_dict({"train": {"samples": -1}})
    assert replace(from_dict({}).train, samples=3).samples == 3
