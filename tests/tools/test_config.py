"""Mistakes in a configuration end in one line that names the field, before anything is loaded or written."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import forks

from jaxlora.cli import field_table, load_config
from jaxlora.config import _ELSEWHERE, RunConfig, check_study, fields, from_dict, to_dict
from jaxlora.runtime.errors import UserError

BAD = {
    "lora.rank": ("0", "a whole number from 1 to 65,536"),
    "lora.alpha": ("inf", "a number above 0 and at most 1e+30"),
    "lora.targets": ("everything", "attention_only | mlp_only | all_layer"),
    "optim.peak_lr": ("-1e-4", "a number above 0"),
    "optim.b2": ("1.0", "at least 0 and below 1"),
    "optim.eps": ("nan", "a number above 0"),
    "seed": ("one", "a whole number from 0 to 2,147,483,647"),
    "train.epochs": ("1.5", "a whole number from 1 to 10,000"),
    "data.train_rows": ("0", "a whole number from 1 to 2,147,483,647 or none"),
    "data.on_bad_row": ("ignore", "error | skip"),
    "model.dtype": ("float16", "bfloat16 | float32"),
    "overwrite": ("maybe", "true | false"),
    "sweep.ranks": ("100000", "a whole number from 1 to 65,536, several with commas, or none"),
    "results_dir": ("gs://bucket/results", "a local or a mounted one"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_value_that_is_not_allowed_is_named_with_what_is(repository, name):
    given, allowed = BAD[name]
    with pytest.raises(UserError) as error:
        load_config(repository / "configs/tiny.py", {name: given})
    text = str(error.value)
    assert f"config.{name}:" in text
    assert given in text
    assert allowed in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["sweep.seeds", "sweep.conditions"])
@pytest.mark.parametrize("given", ["a", "none"])
def test_what_is_said_to_be_allowed_is_allowed(repository, name, given):
    """A sweep has seeds and conditions: no message and no help offers to give none."""
    with pytest.raises(UserError, match=rf"config\.{name}: \"?{given}\"? is not allowed; give") as error:
        load_config(repository / "configs/tiny.py", {name: given})
    assert "or none" not in str(error.value)
    (line,) = [line for line in field_table().splitlines() if line.split()[0] == name]
    assert "or none" not in line


@pytest.mark.parametrize("field", ["sweep.learning_rates", "selection.learning_rates"])
def test_rates_that_give_one_run_id_are_refused(repository, field):
    with pytest.raises(UserError, match=rf"config\.{field}: 0\.001,0\.00100000001 repeats a value"):
        load_config(repository / "configs/tiny.py", {field: "1e-3,0.00100000001"})
    assert load_config(repository / "configs/tiny.py", {field: "1e-3,1.000001e-3"})


@pytest.mark.parametrize(
    ("field", "given", "cure"),
    [
        ("name", "mine", "set config.prefix"),
        ("seed", "3", "--config.sweep.seeds=3"),
        ("lora.targets", "mlp_only", "--config.sweep.conditions=mlp_only"),
        ("model.random_weights", "true", "share one base"),
        ("train.what", "full", "use launch/train.py"),
        ("lora.start", "adapter", "every condition"),
    ],
)
def test_a_study_refuses_what_it_would_ignore(repository, field, given, cure):
    config = load_config(repository / "configs/tiny.py", {field: given})
    with pytest.raises(UserError, match=rf"config\.{field}\b.*{cure}"):
        check_study(config)


def test_a_study_takes_what_its_sweep_says_too(repository):
    check_study(load_config(repository / "configs/tiny.py"))
    check_study(load_config(repository / "configs/tiny.py", {"seed": "3", "sweep.seeds": "3"}))


@pytest.mark.parametrize("name", ["lora.rnk", "rank", "lora", "lora.rank.x", "optim.learning_rate"])
def test_an_unknown_field_is_named(repository, name):
    with pytest.raises(UserError, match=rf"config\.{name}: unknown field"):
        load_config(repository / "configs/tiny.py", {name: "1"})


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("learning_rate", "optim.peak_lr"),
        ("optim.learning_rate", "optim.peak_lr"),
        ("lora_r", "lora.rank"),
        ("num_train_epochs", "train.epochs"),
        ("train.max_seq_length", "data.max_length"),
        ("model_name_or_path", "model.path"),
    ],
)
def test_a_name_that_others_use_is_translated(repository, name, ours):
    with pytest.raises(UserError, match=rf"config\.{name}: unknown field; did you mean {ours}\?$"):
        load_config(repository / "configs/tiny.py", {name: "1"})


def test_every_translation_is_a_field():
    assert {*_ELSEWHERE} <= {name for name, *_ in fields()}


def test_overrides_take_their_types(repository):
    overrides = {"lora.rank": "16", "optim.peak_lr": "1e-4", "overwrite": "true", "data.train_rows": "none"}
    config = load_config(repository / "configs/tiny.py", overrides)
    assert (config.lora.rank, config.optim.peak_lr) == (16, 1e-4)
    assert config.overwrite is True
    assert config.data.train_rows is None


def test_the_studys_values_are_the_defaults(repository):
    config = load_config(repository / "configs/main.py")
    assert (config.lora.rank, config.lora.alpha, config.train.batch_rows, config.train.epochs) == (
        8,
        32.0,
        8,
        2,
    )
    optim = config.optim
    assert (optim.b1, optim.b2, optim.eps, optim.peak_lr) == (0.9, 0.95, 1e-12, 3e-4)
    assert config.run_id == "qwen3-8b-all_layer-seed-0"


def test_smollm2_comes_from_the_hub_or_a_directory(repository):
    config = load_config(repository / "configs/smollm2.py")
    assert config.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    given = load_config(repository / "configs/smollm2.py", {"model.path": "a/folder"})
    assert given == dataclasses.replace(config, model=dataclasses.replace(config.model, path="a/folder"))


def test_a_configuration_survives_its_dictionary():
    config = dataclasses.replace(RunConfig(), seed=3)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "defines no get_config"),
        ("def get_config(): return 3", "returned int"),
        ("def get_config(): raise KeyError('a')", "KeyError"),
        ("def get_config(:", "SyntaxError"),
        (
            "from jaxlora.config import *\ndef get_config(): return RunConfig(lora=LoraConfig(rank=0))",
            r"config\.lora\.rank: 0 is not allowed",
        ),
    ],
)
def test_a_file_that_gives_no_configuration_says_so(tmp_path, content, message):
    file = tmp_path / "config.py"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(file)


def test_two_axes_cannot_both_take_what_is_left(repository):
    with pytest.raises(UserError, match=r"config\.mesh"):
        load_config(repository / "configs/tiny.py", {"mesh.data": "-1", "mesh.fsdp": "-1"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config.lora.rank=0"],
        ["--config.train.batch_rows=100000"],
        ["--config.data.train_path=missing.jsonl"],
        ["--config.model.path=missing-folder"],
        ["--unknown"],
    ],
)
def test_the_command_ends_with_one_line_and_code_2_and_writes_nothing(repository, tmp_path, arguments):
    command = [repository / "launch/train.py", "--config", repository / "configs/tiny.py"]
    done = forks.run([*command, *arguments], cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
