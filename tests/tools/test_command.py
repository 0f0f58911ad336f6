"""The command `jaxlora`: quick help that folds, doors by path, shipped configurations, and the wheel."""

from __future__ import annotations

import argparse
import contextlib
import email
import importlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import forks

from jaxlora.cli import load_config, parse_config, shipped_names
from jaxlora.commands import COMMANDS, OF_DATA
from jaxlora.runtime.errors import UserError

EVERY = [[], *([name] for name in COMMANDS), *(["data", name] for name in OF_DATA)]
DOORS = {
    "launch/train.py": "train",
    "launch/study.py": "study",
    "launch/evaluate.py": "evaluate",
    "tools/export.py": "export",
    "tools/preview.py": "preview",
    "tools/plan.py": "plan",
    "tools/bench.py": "bench",
    "tools/build_dataset.py": "build_dataset",
    "tools/check_dataset.py": "check_dataset",
    "tools/audit_dataset.py": "audit_dataset",
}
HELP = """
import contextlib, io, json, os, sys
from jaxlora import commands
shown = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["jaxlora", *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        commands.main()
    shown.append(out.getvalue())
slow = [name for name in ("jax", "transformers", "datasets", "matplotlib") if name in sys.modules]
print(json.dumps([shown, slow]))
"""


@pytest.fixture(scope="module", params=[60, 100])
def helps(request, repository):
    """The help of every command at a terminal of some width, and the slow modules that it needed."""
    import json

    environment = os.environ | {"COLUMNS": str(request.param), "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", HELP, json.dumps(EVERY)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    shown, slow = json.loads(done.stdout)
    return request.param, dict(zip(map(" ".join, EVERY), shown, strict=True)), slow


def test_help_imports_nothing_slow_and_names_the_command(helps):
    _, shown, slow = helps
    assert slow == []
    for words, text in shown.items():
        assert text.startswith(f"usage: jaxlora {words}".rstrip()), text
    assert all(f"\n  {name} " in shown[""] for name in COMMANDS)
    assert all(f"\n  {name} " in shown["data"] for name in OF_DATA)


def test_help_folds_at_the_terminals_width(helps):
    width, shown, _ = helps
    for words, text in shown.items():
        long = [line for line in text.splitlines() if len(line) > width and len(line.split()) > 1]
        assert long == [], words
        assert "results" in shown["train"]


def test_help_beside_a_configuration_shows_its_values():
    parser, table = argparse.ArgumentParser(), []
    for words in (
        ["--help"],
        ["--config", "tiny", "--help"],
        ["--config=tiny", "-h"],
        ["--config", "no", "-h"],
    ):
        parser = argparse.ArgumentParser()
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            parse_config(parser, words)
        table.append(" ".join(out.getvalue().split()))
    usual, tiny, same, broken = table
    assert "optim.peak_lr learning rate after warm-up [a number above 0; default 0.0003]" in usual
    assert "optim.peak_lr learning rate after warm-up [a number above 0; default 0.001]" in tiny
    assert "with the values of tiny" in tiny
    assert same == tiny
    assert broken == usual


@pytest.mark.parametrize("door", DOORS)
def test_a_script_is_a_door_to_the_command(repository, door):
    command = importlib.import_module(f"jaxlora.commands.{DOORS[door]}")
    assert runpy.run_path(str(repository / door))["main"] is command.main
    assert len((repository / door).read_text().splitlines()) < 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "jaxlora: name a command: train, study"),
        (["trian"], "jaxlora: no command 'trian'; did you mean train?"),
        (["data"], "jaxlora data: name a command: build, check, audit, bench"),
        (["data", "zzz"], "jaxlora data: no command 'zzz'; give one of build, check, audit, bench"),
        (
            ["train", "--config", "huge"],
            "--config: no file 'huge'; give a Python file, or one of lr_sweep, main",
        ),
        (["train", "--config", "tiny", "--fast"], "unknown option '--fast'"),
        (["chat", "--base"], "--base: no model is named"),
        (["chat", "--run", "nowhere"], "--run nowhere: holds no manifest.json"),
        (["chat", "--adapter", "nowhere"], "--adapter nowhere: holds no adapter_config.json"),
        (["chat", "--base", "--model", "nowhere"], "no directory 'nowhere'"),
        (["chat", "--base", "--model", "embedded:base", "--top-p", "2"], "--top-p: '2' is not allowed"),
        (["generate", "none.jsonl", "--out", "a", "--base", "--config", "tiny"], "none.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(repository, tmp_path, words, message):
    done = forks.run([repository / "jaxlora/__main__.py", *words], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


# --- Configurations -----------------------------------------------------------------------------------------


def test_shipped_configurations_are_found_by_name_anywhere_and_by_path(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [file.relative_to(repository / "configs") for file in (repository / "configs").rglob("*.py")]
    assert shipped_names() == sorted(file.with_suffix("").as_posix() for file in files)
    for name in shipped_names():
        assert load_config(name) == load_config(repository / "configs" / f"{name}.py")
    assert load_config("tiny", {"lora.rank": "3"}).lora.rank == 3


def test_a_file_of_ones_own_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "from jaxlora.config import RunConfig\ndef get_config(): return RunConfig(prefix='mine')\n"
    Path("tiny").write_text(code)
    assert load_config("tiny").prefix == "mine"
    with pytest.raises(UserError, match=r"no file '\.\./tiny'"):
        load_config("../tiny")


# --- The wheel ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    """What `pip wheel . --no-deps` builds, from a copy, because building leaves folders in the source."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, folder)
    shutil.copytree(repository / "jaxlora", folder / "jaxlora", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import setuptools.build_meta as b; b.build_wheel('out')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "out").glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_the_command(repository, wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    package = repository / "jaxlora"
    files = {
        file.relative_to(repository).as_posix()
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert files <= held
    assert {
        f"jaxlora/configs/{name}.py" for name in ("main", "tiny", "own", "smollm2", "lr_sweep", "rank_sweep")
    } <= held
    archive = zipfile.ZipFile(wheel)
    (points,) = [name for name in held if name.endswith("entry_points.txt")]
    assert "jaxlora = jaxlora.commands:run" in archive.read(points).decode()
    (metadata,) = [name for name in held if name.endswith("METADATA")]
    assert email.message_from_bytes(archive.read(metadata))["Name"] == "jaxlora"


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "jaxlora", "preview", "--config", "tiny", "--rows", "1"]
    (tmp_path / "work").mkdir()
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<|im_end|>" in done.stdout


def test_rows_of_ones_own_need_nothing_but_their_path(repository, tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(20)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    words = ["train", "--config", "own", "--config.data.train_path=mine.json", "--dry-run"]
    done = forks.run([repository / "jaxlora/__main__.py", *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "training 18 rows" in said
    assert "validation 2 rows" in said
    assert "Alpaca rows in JSON list" in said
    assert [*tmp_path.iterdir()] == [tmp_path / "mine.json"]
