"""Bad configurations and bad shapes of models are one line that says what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers.bad_input import (
    SCALARS,
    TEXTS,
    assert_exit_2,
    attempt,
    bad_json,
    refused,
    run_script,
    tries,
)
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.cli import field_table, load_config
from jaxlora.config import RunConfig, from_dict, to_dict
from jaxlora.models.families import count_parameters, load_model_config, model_config_from_dict
from jaxlora.models.spec import ModelConfig

FIELDS = [line.split()[0] for line in field_table().splitlines()]
CONFIG, OVERRIDE, SHAPE = "configuration file", "configuration override", "config.json of a model"


class TestConfigurations:
    @tries(200)
    @given(
        name=st.one_of(st.sampled_from(FIELDS), st.sampled_from(FIELDS).map(lambda f: f[:-1]), TEXTS),
        text=st.one_of(TEXTS, SCALARS.map(lambda value: str(value)[:4000])),
    )
    def test_an_override_is_a_checked_value_or_one_line(self, repository, name, text):
        attempt(OVERRIDE, load_config, repository / "configs/tiny.py", {name: text})

    @tries(200)
    @given(bad_json(to_dict(RunConfig())))
    def test_a_recorded_configuration_is_checked_whole(self, content):
        """A manifest's configuration comes from a file; whatever is wrong with it is named."""
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return
        attempt(CONFIG, lambda: to_dict(from_dict(values)))

    @tries(100)
    @given(
        st.one_of(
            st.binary(max_size=60),
            st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")),
            st.sampled_from(
                [
                    b"def get_config(): raise SystemExit(7)",
                    b"raise SystemExit",
                    b"import no_such_module_anywhere",
                    b"def get_config(): return get_config()",
                    b"def get_config(a): return 1",
                    b"get_config = 5",
                    b"def get_config(): return None",
                    b"from jaxlora.config import *\ndef get_config(): return RunConfig(seed=-1)",
                    b"from jaxlora.config import *\nget_config = lambda: RunConfig(lora=7)",
                    b"(" * 5000,
                    b"x = " + b"9" * 5000,
                    b"\x00",
                    b"\xff\xfe",
                ]
            ),
        )
    )
    def test_a_configuration_file_gives_a_configuration_or_one_line(self, tmp_path, content):
        file = tmp_path / "config.py"
        file.write_bytes(content)
        refused(CONFIG, load_config, file)

    @pytest.mark.parametrize(
        "words",
        [
            ["--config", "no/such.py"],
            ["--config", "."],
            ["--config", "a\x00b"],
            ["--config", "x" * 5000],
            ["--config", "CONFIG", "--config.seed"],
            ["--config", "CONFIG", "--config.seed=-1"],
            ["--config", "CONFIG", "--config.seed=4294967296"],
            ["--config", "CONFIG", "--config.train.epochs=1000000000000"],
            ["--config", "CONFIG", "--config.lora.rank=1000000000"],
            ["--config", "CONFIG", "--config.eval.max_new_tokens=1000000000000"],
            ["--config", "CONFIG", "--config.data.max_length=" + "9" * 5000],
            ["--config", "CONFIG", "--config.mesh.fsdp=3000000000"],
            ["--config", "CONFIG", "--config.mesh.tensor=-2"],
            ["--config", "CONFIG", "--config.optim.peak_lr=nan"],
            ["--config", "CONFIG", "--config.optim.eps=inf"],
            ["--config", "CONFIG", "--config.prefix=../outside"],
            ["--config", "CONFIG", "--config.prefix=a\nb"],
            ["--config", "CONFIG", "--config.prefix=" + "p" * 300],
            ["--config", "CONFIG", "--config.results_dir="],
            ["--config", "CONFIG", "--config.results_dir=/dev/null/results", "--config.data.train_rows=8"],
            ["--config", "CONFIG", "--config.results_dir=a\x00b"],
            ["--config", "CONFIG", "--config.model.path=../.."],
            ["--config", "CONFIG", "--config.model.path=embedded:../../.."],
            ["--config", "CONFIG", "--config.data.train_path=/dev/zero"],
            ["--config", "CONFIG", "--config.data.train_path=/etc"],
            ["--config", "CONFIG", "--config.data.gate_report=/dev/zero"],
            ["--config", "CONFIG", "--config.lora=1"],
            ["--config", "CONFIG", "--config.__class__=1"],
            ["--config", "CONFIG", "--config.model.path.x=1"],
            ["--config", "CONFIG", "--token=hf_abcdefghijklmnopqrstuvwx"],
        ],
        ids=lambda words: " ".join(words)[-40:],
    )
    def test_training_refuses_before_anything_is_written(self, repository, tmp_path, capsys, words):
        results = f"--config.results_dir={tmp_path / 'results'}"
        words = [str(repository / "configs/tiny.py") if word == "CONFIG" else word for word in words]
        given = any("results_dir" in word for word in words)
        line = assert_exit_2(
            OVERRIDE,
            repository / "launch/train.py",
            [*words[:2], *[results] * (not given), *words[2:]],
            capsys,
        )
        assert "hf_abcdefghijklmnop" not in line
        assert not (tmp_path / "results").exists()

    def test_a_dry_run_accepts_what_is_right(self, repository, capsys):
        """The counterpart: the refusals above are not refusals of everything."""
        assert (
            run_script(
                OVERRIDE,
                repository / "launch/train.py",
                ["--config", str(repository / "configs/tiny.py"), "--dry-run"],
            )
            == 0
        )

    @pytest.mark.parametrize("field", ["model.path", "results_dir", "prefix", "data.train_path"])
    def test_a_key_in_the_configuration_is_refused_and_not_repeated(self, repository, monkeypatch, field):
        monkeypatch.setenv("HF_TOKEN", "canary-of-a-token")
        line = refused(
            OVERRIDE, load_config, repository / "configs/tiny.py", {field: "x-canary-of-a-token-y"}
        )
        assert field in line
        assert "canary" not in line


# --- config.json --------------------------------------------------------------------------------------------

QWEN = {
    "model_type": "qwen3",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": [1, 2],
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
}
INFINITE = [
    {"head_dim": None, "hidden_size": math.inf},
    {"head_dim": None, "num_attention_heads": math.nan},
    {"num_key_value_heads": 0},
    {"vocab_size": 10**30},
    {"rope_theta": math.inf, "rope_parameters": None},
    {"rope_parameters": {"rope_theta": "a" * 10**6}},
    {"model_type": "m" * 10**6},
    {"eos_token_id": {}},
    {"eos_token_id": [[[]]]},
    {"num_hidden_layers": True},
    {"head_dim": 17},
]


class TestConfigJson:
    @tries(250)
    @given(bad_json(QWEN))
    def test_is_a_usable_shape_or_one_line(self, tmp_path, content):
        (tmp_path / "config.json").write_bytes(content)

        def use(folder: Path) -> None:
            config = load_model_config(folder)
            assert isinstance(config, ModelConfig)
            assert count_parameters(config) > 0

        attempt(SHAPE, use, tmp_path)

    @pytest.mark.parametrize("change", INFINITE, ids=lambda change: str(change)[:40])
    def test_impossible_sizes_are_refused(self, change):
        refused(SHAPE, model_config_from_dict, QWEN | change)

    def test_the_shape_that_is_changed_above_is_right(self):
        assert model_config_from_dict(QWEN).eos_token_ids == (1, 2)

    def test_a_file_that_is_too_large_is_not_read(self, tmp_path):
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(10**12)  # takes no space on the disk
        refused(SHAPE, load_model_config, tmp_path)

    @pytest.mark.parametrize("place", ["/dev/zero", "."])
    def test_a_device_or_a_folder_is_not_read(self, tmp_path, place):
        (tmp_path / "config.json").symlink_to(place)
        refused(SHAPE, load_model_config, tmp_path)

    def test_code_that_it_names_is_never_run(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(QWEN))
        (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        load_model_config(tmp_path)
        assert not (tmp_path / "ran").exists()
