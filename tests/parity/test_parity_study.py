"""A finished run beside the study's figures: made-up runs that agree, and made-up runs that do not."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.hf_models import make_checkpoint
from safetensors.numpy import save_file
from scipy import stats
from transformers import AutoTokenizer

from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import LoraConfig
from jaxlora.lora import init_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.parity import study_figures as study
from jaxlora.parity.published import published_subjects
from jaxlora.parity.study import (
    Point,
    agrees,
    compare_run,
    evaluation_points,
    prediction_half_width,
    together_half_width,
    verdict,
)
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import append_jsonl, read_json, write_json_atomic
from jaxlora.runtime.records import metric_record, summary_record
from jaxlora.runtime.remote import embedded_path


def test_the_figures_are_the_studys_own(shared):
    reference = read_json(shared / "reference" / "study.json")
    tokens, nll, scores = reference["dataset"]["tokens"], reference["validation_nll"], reference["gsm8k_eval"]
    assert tokens["train_per_run_two_epochs_shifted"] == study.TRAIN_TOKENS
    assert tokens["validation_per_run_seven_passes_shifted"] == study.VALIDATION_TOKENS
    assert tuple(nll["steps"]) == study.VALIDATION_STEPS
    for condition in study.CONDITIONS:
        adapter = reference["adapters"][condition]
        assert adapter["parameters"] == study.PARAMETERS[condition]
        assert adapter["safetensors_bytes"] == study.ADAPTER_BYTES[condition]
        for seed in study.SEEDS:
            values = nll[condition][str(seed)]
            assert tuple(values) == study.VALIDATION_NLL[condition][seed]
            assert study.VALIDATION_STEPS[int(np.argmin(values))] == study.SELECTED_STEP
            score = scores[condition][str(seed)]
            assert score["correct"] == study.CORRECT[condition][seed]
            assert score["extraction_failures"] == study.NO_BOX[condition][seed]
        rates = {float(rate): value for rate, value in reference["lr_selection"][condition].items()}
        assert rates == study.SELECTION_NLL[condition]
    base = scores["base"]
    assert (base["correct"], base["extraction_failures"]) == (study.BASE_CORRECT, study.BASE_NO_BOX)
    assert (base["total"], base["prompt_tokens"]) == (study.PROBLEMS, study.PROMPT_TOKENS)
    assert base["generated_tokens"] == study.BASE_GENERATED_TOKENS
    first = reference["lr_selection_first_steps_attention_only_lr_3e-4"]
    assert tuple(first["token_count"]) == study.FIRST_STEP_TOKENS
    assert tuple(first["loss_mean"]) == study.FIRST_STEP_LOSSES
    selection = reference["lr_selection"]
    assert (selection["train_rows"], selection["seed"]) == (study.SELECTION_ROWS, study.SELECTION_SEED)


def write_adapter(folder: Path, condition: str) -> None:
    """A file of exactly the study's number of parameters and bytes: Qwen3-8B's tensors under PEFT's names."""
    shapes = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096)}
    shapes = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    if condition == "all_layer":
        shapes |= {
            "mlp.gate_proj": (4096, 12288),
            "mlp.up_proj": (4096, 12288),
            "mlp.down_proj": (12288, 4096),
        }
    tensors = {}
    for layer in range(36):
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = np.zeros((8, inputs), np.float32)
            tensors[f"{prefix}.lora_B.weight"] = np.zeros((outputs, 8), np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")


def write_evaluation(
    folder: Path, condition: str | None, seed: int | None, correct: int, no_box: int
) -> None:
    counts = {"total": 1319, "correct_strict": correct, "correct_numeric": correct, "truncated": 0}
    counts |= {"extraction_failures": no_box, "prompt_tokens": 132306, "accuracy": correct / 1319}
    counts |= {"accuracy_numeric": correct / 1319, "extraction_failure_rate": no_box / 1319}
    counts |= {"truncation_rate": 0.0, "generated_tokens_per_second": 1.0}
    identity = {"run_id": f"test-{condition}", "condition": condition, "seed": seed}
    summary = summary_record(**identity, status="completed", **counts)
    write_json_atomic(folder / "summary.json", summary)


def write_run(folder: Path, condition: str = "attention_only", **changes) -> Path:
    """A run with the figures of the study's seed 0, but for the changes."""
    values = {
        "nll": study.VALIDATION_NLL[condition][0],
        "tokens": study.TRAIN_TOKENS,
        "correct": study.CORRECT[condition][0],
        "first_tokens": study.FIRST_STEP_TOKENS,
        "first_loss": study.FIRST_STEP_LOSSES[0],
        "status": "completed",
    } | changes
    identity = {"run_id": folder.name, "condition": condition, "seed": 0}
    config = {"data": {"train_rows": None}, "optim": {"peak_lr": 3e-4}, "lora": {"condition": condition}}
    write_json_atomic(folder / "manifest.json", {"config": config})
    for step, count in enumerate(values["first_tokens"], start=1):
        row = metric_record(
            **identity, step=step, split="train", loss=values["first_loss"], token_count=count
        )
        append_jsonl(folder / "metrics.jsonl", row)
    for step, nll in zip(study.VALIDATION_STEPS, values["nll"], strict=True):
        append_jsonl(
            folder / "metrics.jsonl", metric_record(**identity, step=step, split="validation", loss=nll)
        )
    summary = summary_record(
        **identity, status=values["status"], train_token_count=values["tokens"],
        validation_token_count=study.VALIDATION_TOKENS,
    )  # fmt: skip
    write_json_atomic(folder / "summary.json", summary)
    write_adapter(folder / "selected", condition)
    write_evaluation(folder / "evaluation", condition, 0, values["correct"], study.NO_BOX[condition][0])
    return folder


def differing(points: list[Point]) -> set[str]:
    return {point.name for point in points if point.judgement == "differs"}


@pytest.mark.parametrize("condition", study.CONDITIONS)
def test_a_run_like_the_studys_agrees_at_every_point(tmp_path, condition):
    points = compare_run(write_run(tmp_path / "run", condition))
    assert {point.judgement for point in points} <= {"equal", "in range"}
    assert agrees(points)
    assert verdict(points) == f"agrees: {len(points)} of {len(points)} points agree"
    names = {point.name for point in points}
    assert {"training tokens", "adapter file bytes", "selected step", "GSM8K: right answers"} <= names
    assert sum(name.startswith("validation NLL, step") for name in names) == 7


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"tokens": study.TRAIN_TOKENS + 1}, {"training tokens"}),
        ({"first_tokens": (2461, 2433, 3295, 2013, 2012, 2162, 2826, 3897)}, {"tokens of step 8"}),
        ({"first_loss": 1.2}, {"loss of step 1"}),
        ({"correct": 1150}, {"GSM8K: right answers"}),
        (
            {"nll": (0.3468, 0.3411, 0.3362, 0.3391, 0.3378, 0.3374, 0.3355)},
            {"selected step", "validation NLL, step 6338"},
        ),
    ],
)
def test_a_run_that_differs_says_where(tmp_path, changes, names):
    points = compare_run(write_run(tmp_path / "run", **changes))
    assert differing(points) == names
    assert not agrees(points)
    assert verdict(points).startswith("does not agree: ")
    assert all(name in verdict(points) for name in names)


def test_another_seeds_luck_is_near_and_still_agrees(tmp_path):
    values = np.array(list(study.VALIDATION_NLL["attention_only"].values()))
    nll = tuple(float(x) for x in values.max(axis=0) + 1e-5)
    points = compare_run(write_run(tmp_path / "run", nll=nll))
    near = {point.name for point in points if point.judgement == "near"}
    assert near == {f"validation NLL, step {step}" for step in study.VALIDATION_STEPS}
    assert agrees(points)
    assert "7 of them outside the study's range" in verdict(points)


def test_the_interval_is_the_textbooks_prediction_interval():
    """One group of n values: mean ± t(n-1) s sqrt(1 + 1/n); the study's scores give about ten answers."""
    values = [3.0, 5.0, 10.0]
    expected = stats.t.ppf(0.995, 2) * np.std(values, ddof=1) * np.sqrt(4 / 3)
    assert prediction_half_width([values]) == pytest.approx(expected)
    two = prediction_half_width([values, [v + 100 for v in values]])
    assert two == pytest.approx(expected * stats.t.ppf(0.995, 4) / stats.t.ppf(0.995, 2))
    scores = [list(by_seed.values()) for by_seed in study.CORRECT.values()]
    assert 9 < prediction_half_width(scores) < 10


def test_each_of_the_studys_seeds_agrees_with_the_other_two():
    """The rule is not narrower than the study itself: every left-out seed lies within it."""
    for by_seed in study.VALIDATION_NLL.values():
        for seed in study.SEEDS:
            others = [by_seed[other] for other in study.SEEDS if other != seed]
            columns = list(zip(*others, strict=True))
            half_width = together_half_width(columns)
            for value, column in zip(by_seed[seed], columns, strict=True):
                assert abs(value - np.mean(column)) <= half_width


def test_what_a_run_lacks_is_named_and_decides_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "evaluation")
    points = compare_run(run)
    assert agrees(points)
    assert "not compared: GSM8K: problems" in verdict(points)


@pytest.mark.parametrize("status", ["failed", None])
def test_an_unfinished_run_is_refused(tmp_path, status):
    with pytest.raises(UserError, match="compare it when it is finished"):
        compare_run(write_run(tmp_path / "run", status=status))


def test_a_condition_that_the_study_has_not_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    summary = read_json(run / "summary.json")
    write_json_atomic(run / "summary.json", summary | {"condition": "mlp_only"})
    with pytest.raises(UserError, match="the study has no condition 'mlp_only'"):
        compare_run(run)


def write_trial(folder: Path, rate: float, nll: float, losses=study.FIRST_STEP_LOSSES) -> Path:
    identity = {"run_id": folder.name, "condition": "attention_only", "seed": 7}
    config = {"data": {"train_rows": 512}, "optim": {"peak_lr": rate}}
    write_json_atomic(folder / "manifest.json", {"config": config})
    for step, (count, loss) in enumerate(zip(study.FIRST_STEP_TOKENS, losses, strict=True), start=1):
        row = metric_record(**identity, step=step, split="train", loss=loss, token_count=count)
        append_jsonl(folder / "metrics.jsonl", row)
    for step, value in ((32, nll + 0.01), (64, nll)):
        append_jsonl(
            folder / "metrics.jsonl", metric_record(**identity, step=step, split="validation", loss=value)
        )
    write_json_atomic(folder / "summary.json", summary_record(**identity, status="completed"))
    return folder


def test_a_trial_of_a_learning_rate_is_held_to_the_selection(tmp_path):
    points = compare_run(write_trial(tmp_path / "a", 3e-4, 0.3630))
    assert agrees(points)
    assert sum(point.name.startswith("loss of step") for point in points) == 8
    assert differing(compare_run(write_trial(tmp_path / "b", 1e-4, 0.3630))) == {"lowest validation NLL"}
    losses = (*study.FIRST_STEP_LOSSES[:7], 0.6)
    assert differing(compare_run(write_trial(tmp_path / "c", 3e-4, 0.3630, losses))) == {"loss of step 8"}
    with pytest.raises(UserError, match=r"no learning-rate trial at 0\.002"):
        compare_run(write_trial(tmp_path / "d", 2e-3, 0.3630))


@pytest.fixture
def tool(monkeypatch):
    main = runpy.run_path("tools/tinker_parity.py")["main"]

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tinker_parity.py", *map(str, words)])
        return main()

    return call


@pytest.mark.parametrize(("correct", "code"), [(1193, 0), (1150, 1)])
def test_study_prints_the_verdict_and_exits_with_it(tmp_path, tool, capsys, correct, code):
    assert tool("study", "--run", write_run(tmp_path / "run", correct=correct)) == code
    output = capsys.readouterr().out
    assert "1,193 to 1,196" in output
    assert output.strip().splitlines()[-1].startswith("agrees" if code == 0 else "does not agree")


def test_an_abbreviated_option_is_not_taken_for_another_command(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool("study", "--pub")
    assert stopped.value.code == 2
    assert "--published is required" in capsys.readouterr().err


# --- The published adapters ---------------------------------------------------------------------------------


def test_the_published_adapters_are_six_and_the_base():
    subjects = published_subjects(study.ADAPTERS)
    assert subjects[0] == ("base", None, None, None)
    assert len(subjects) == 7
    assert subjects[4][1:] == (
        "all_layer", 0,
        "hf://sumitdotml/lora-and-friends/checkpoints/best-checkpoints/all_layer/seed-0/step-3169",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "seed", "correct", "judgement"),
    [(None, None, 1115, "equal"), (None, None, 1120, "near"), ("all_layer", 1, 1190, "equal"),
     ("all_layer", 1, 1186, "near"), ("all_layer", 1, 1170, "differs")],
)  # fmt: skip
def test_a_published_adapter_is_held_to_its_own_score(tmp_path, condition, seed, correct, judgement):
    write_evaluation(tmp_path, condition, seed, correct, 31 if condition is None else 4)
    points = {point.name: point for point in evaluation_points(tmp_path, condition, "x", seed)}
    assert points["x: right answers"].judgement == judgement
    assert points["x: answers without a box"].judgement == "equal"


def test_published_evaluates_the_base_and_every_adapter_once(tmp_path, tool, capsys, monkeypatch):
    """Local stand-ins in the published layout, without jaxlora.json: a tiny base, seven evaluations."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    base = tmp_path / "base"
    vocabulary = len(AutoTokenizer.from_pretrained(str(embedded_path("base"))))
    make_checkpoint(base, vocab_size=vocabulary, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path("base") / name, base / name)
    for condition in study.CONDITIONS:
        spec = ModelSpec(load_model_config(base), LoraConfig(targets=condition), "float32")
        for seed in study.SEEDS:
            folder = tmp_path / "adapters" / condition / f"seed-{seed}" / "step-3169"
            export_adapter(folder, spec, init_lora(spec, seed), "Qwen/Qwen3-8B")
            (folder / "jaxlora.json").unlink()
    words = [
        "study", "--published", "--config", "configs/tiny.py", "--adapters", tmp_path / "adapters",
        "--out", tmp_path / "out", f"--config.model.path={base}", "--config.eval.problems=2",
        "--config.eval.max_new_tokens=4", "--config.eval.batch_rows=2",
    ]  # fmt: skip
    assert tool(*words) == 1  # two problems are not 1,319
    output = capsys.readouterr().out
    assert "all_layer seed 2: right answers" in output
    assert "does not agree" in output
    summaries = {file.parent.name: read_json(file) for file in (tmp_path / "out").glob("*/summary.json")}
    assert len(summaries) == 7
    assert summaries["base"]["condition"] is None
    found = summaries["attention_only-seed-1"]
    assert (found["condition"], found["seed"], found["checkpoint"]) == ("attention_only", 1, "step-3169")
    texts = {
        folder.name: [json.loads(line)["generated_text"] for line in (folder / "predictions.jsonl").open()]
        for folder in (tmp_path / "out").iterdir()
    }
    assert texts["all_layer-seed-0"] == texts["base"]  # B is zero: the adapter changes nothing

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.json*")}
    assert tool(*words) == 1  # a second call reads what is there
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.json*")} == before


def test_an_adapter_that_is_missing_is_said_before_the_base_is_evaluated(tmp_path, tool, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("the base was evaluated first")

    monkeypatch.setattr("jaxlora.parity.published.load_target_base", fail)
    words = ["--adapters", tmp_path / "nope", "--out", tmp_path / "out"]
    with pytest.raises(UserError, match=r"nope/attention_only/seed-0/step-3169: no such folder"):
        tool("study", "--published", "--config", "configs/tiny.py", *words)


def test_an_adapter_in_the_wrong_folder_is_refused(tmp_path, tool):
    base = tmp_path / "base"
    make_checkpoint(base, vocab_size=1024, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path("base") / name, base / name)
    spec = ModelSpec(load_model_config(base), LoraConfig(targets="all_layer"), "float32")
    folder = tmp_path / "adapters" / "attention_only" / "seed-0" / "step-3169"
    export_adapter(folder, spec, init_lora(spec, 0), "Qwen/Qwen3-8B")
    write_evaluation(tmp_path / "out" / "base", None, None, 1115, 31)
    words = ["--config.eval.problems=2", f"--config.model.path={base}", "--out", tmp_path / "out"]
    with pytest.raises(UserError, match=r"--condition: attention_only, but .* adapts all_layer"):
        tool(
            "study", "--published", "--config", "configs/tiny.py", "--adapters", tmp_path / "adapters", *words
        )
