"""The benchmark counts real tokens only, runs on any device, and prints a table and one JSON line."""

from __future__ import annotations

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers.bad_input import assert_exit_2

from jaxlora.bench import waits
from jaxlora.runtime.devices import step_options
from jaxlora.runtime.errors import UserError
from jaxlora.train.step import wire

SMALL = ["--model", "embedded:base", "--num-layers", "1", "--dtype", "float32"]


@pytest.fixture
def bench(repository, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench_tool", repository / "tools" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        assert module.main() == 0
        printed = capsys.readouterr()
        assert f"benchmark {words[0]}" in " ".join(printed.err.split())
        assert "{'" not in printed.err
        return json.loads(printed.out)

    return run


def test_training_counts_real_tokens_and_compilations(bench, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"rows": [[5, 21], [7, 41], [3, 11], [9, 61]] * 3}))
    words = ["train", *SMALL, "--rows", str(rows), "--batch-rows", "2", "--buffer-sizes", "1"]
    result = bench(*words, "--no-validation")
    assert (result["steps"], result["compilations"]) == (6, 1)
    assert result["padding_efficiency"] == pytest.approx(130 / 256)  # 60 and 70 tokens in buffers of 128
    assert result["real_tokens_per_second"] > 0
    assert (result["device"], result["peak_tflops"]) == ("cpu", None)


def test_training_is_followed_by_a_validation_pass_over_all_rows(bench, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"rows": [[5, 21], [7, 41], [3, 11], [9, 61]]}))
    result = bench("train", *SMALL, "--rows", str(rows), "--batch-rows", "2", "--buffer-sizes", "1")
    assert result["validation_tokens_per_second"] > 0


def test_a_cold_start_is_timed_with_what_it_waits_for(bench, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"rows": [[5, 101], [7, 141], [3, 211], [9, 161]] * 3}))
    words = ["train", *SMALL, "--rows", str(rows), "--batch-rows", "2", "--no-validation"]
    result = bench(*words, "--cold", "--config.train.buffer_multiple=32")
    assert result["steps"] == 6
    assert result["longest_wait_seconds"] < result["waited_seconds"] + 0.1
    assert result["first_step_seconds"] > result["longest_wait_seconds"]
    assert "waits_above_1s" not in bench(*words)


def test_waits_are_what_steps_take_beyond_most_of_them():
    found = waits([20.0, 0.2, 0.2, 0.2, 0.2, 3.2, 0.2, 0.5])
    assert found["longest_wait_seconds"] == pytest.approx(3.0)
    assert found["waits_above_1s"] == 1
    assert found["waited_seconds"] == pytest.approx(3.3)


def test_decoding_gives_each_prompt_its_forced_length(bench, tmp_path):
    lengths = tmp_path / "lengths.json"
    lengths.write_text(json.dumps({"prompt_tokens": [5, 9, 7, 6], "adapter_generated_tokens": [3, 8, 1, 4]}))
    result = bench("decode", *SMALL, "--lengths", str(lengths), "--slots", "2")
    assert (result["prompt_tokens"], result["generated_tokens"], result["merged"]) == (27, 16, True)
    with pytest.raises(UserError, match="adapter_generated_tokens"):
        bench("decode", *SMALL, "--lengths", str(lengths), "--answers", "base")


def test_rewards_are_timed_without_compiling_and_every_answer_is_learned_from(bench, tmp_path, monkeypatch):
    """Groups of two, of which the drawn tokens would leave half without anything to teach; on one device."""
    monkeypatch.setattr("jaxlora.bench.wire_machine", lambda *given: wire(*given, jax.devices()[:1]))
    lengths = tmp_path / "lengths.json"
    prompts, answers = [30, 9, 61, 17, 44, 80], [41, 8, 5, 30, 22, 9, 60, 3, 12, 55, 7, 18]
    lengths.write_text(json.dumps({"prompt_tokens": prompts * 2, "adapter_generated_tokens": answers}))
    words = ["rl", *SMALL, "--lengths", str(lengths), "--prompts", "6", "--group", "2", "--slots", "4"]
    words += ["--buffer-tokens", "256", "--steps", "3", "--config.train.buffer_multiple=64"]
    words += ["--config.rl.kl=0.1", "--config.rl.updates_per_batch=2"]
    result = bench(*words)
    assert result["compilations_while_timed"] == 0
    assert result["answers_learned_from"] == 12
    assert result["sampled_tokens"] == 3 * sum(answers)
    assert result["tokens_learned_from"] == 3 * (sum(answers) + 2 * sum(prompts))
    # a prompt's last token is computed with each of its answers, whose last token is no input
    once, twice = (sum(answers) + n * (sum(prompts) - 6) for n in (1, 2))
    assert 3 * once <= result["tokens_computed"] < 3 * twice


# --- Mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--rank", "0"],
        ["train", "--rank", "100000"],
        ["train", "--rank", "eight"],
        ["train", "--num-layers", "-1"],
        ["train", "--num-layers", "1000"],
        ["train", "--steps", "0"],
        ["train", "--batch-rows", "99999999999"],
        ["train", "--model", "no/such/model"],
        ["decode", "--slots", "0"],
        ["decode", "--prompts", "-3"],
        ["decode", "--answers", "base_generated_tokens"],
        ["decode", "--attention", "xla", "--prompts", "1.5"],
        ["decode", *SMALL, "--attention", "cudnn"],
        ["decode", *SMALL[:-2], "--attention", "splash"],
        ["train", "--batch-rows", "0"],
        ["train", "--rows", "no/such.json"],
    ],
    ids=" ".join,
)
def test_a_bad_number_is_one_line(repository, capsys, words):
    line = assert_exit_2("benchmark", repository / "tools/bench.py", words, capsys)
    assert "give" in line or words[-1] in line


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("train", {"note": "no rows"}),
        ("train", [[1, 2]]),
        ("train", {"rows": []}),
        ("train", {"rows": 7}),
        ("train", {"rows": [[1]]}),
        ("train", {"rows": [[2, 2]]}),
        ("train", {"rows": [[1, True]]}),
        ("train", {"rows": [[1, 1e30]]}),
        ("train", {"rows": ["ab"]}),
        ("decode", {"prompt_tokens": [5]}),
        ("decode", {"prompt_tokens": [5, 6], "adapter_generated_tokens": [3]}),
        ("decode", {"prompt_tokens": [5], "adapter_generated_tokens": [0]}),
        ("decode", {"prompt_tokens": ["5"], "adapter_generated_tokens": [3]}),
    ],
)
def test_a_file_of_other_lengths_is_one_line(repository, tmp_path, capsys, command, content):
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps(content))
    option = "--lengths" if command == "decode" else "--rows"
    words = [command, *SMALL, option, str(file)]
    line = assert_exit_2("benchmark", repository / "tools/bench.py", words, capsys)
    assert str(file) in line


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--lengths", "x.json"],
        ["train", "--members", "2"],
        ["train", "--condition", "mix"],
        ["decode", "--rows", "x.json"],
        ["decode", "--remat"],
        ["train", "--slots", "8"],
        ["decode", "--no-validation"],
        ["sweep"],
    ],
    ids=" ".join,
)
def test_an_option_of_another_benchmark_or_an_unknown_one_is_refused(bench, words):
    with pytest.raises(SystemExit) as stopped:
        bench(*words)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--hidden", "7"],
        ["--hidden", "32"],
        ["--texts", "0"],
        ["--steps", "-1"],
        ["--rate", "nan"],
        ["--layers", "5000"],
        ["--seed", "-1"],
    ],
    ids=" ".join,
)
def test_pretraining_refuses_a_bad_number_before_it_draws(repository, tmp_path, capsys, words):
    asked = ["--out", str(tmp_path / "base"), *words]
    line = assert_exit_2("pretraining", repository / "tools/pretrain_tiny.py", asked, capsys)
    assert words[0] in line
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("words", [["--pretraining", "-3"], ["--pretraining", "x"]], ids=" ".join)
def test_word_problems_refuse_a_bad_number_and_write_nothing(repository, tmp_path, capsys, words):
    asked = ["--out", str(tmp_path / "data"), *words]
    line = assert_exit_2("word problems", repository / "tools/make_word_problems.py", asked, capsys)
    assert line.startswith("error: --pretraining: ")
    assert not (tmp_path / "data").exists()


def test_the_compiler_knows_the_options_that_gpus_get(monkeypatch):
    assert step_options() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("NCCL_CTA_POLICY", "2")
    options = step_options(by_line=True)
    mapped = "xla_gpu_experimental_enable_nccl_symmetric_buffers"
    assert (step_options()[mapped], options[mapped]) == (False, True)
    monkeypatch.setenv("NCCL_CTA_POLICY", "0")  # a user's choice: then plain gathers are faster
    assert not step_options(by_line=True)[mapped]
    assert jax.jit(jnp.negative, compiler_options=options)(1.0) == -1  # an unknown one is an error
