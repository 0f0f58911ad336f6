"""launch/evaluate.py scores what it is asked to score, and never something else in silence."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.hf_models import make_checkpoint
from peft import PeftModel
from transformers import AutoTokenizer

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import TOKENIZER_FILES, Base, fingerprint, tokenizer_sha256
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.cli import load_config
from jaxlora.data.gates import Benchmark, FilePair, check
from jaxlora.data.render import render_prompts
from jaxlora.evals import run as evaluation
from jaxlora.evals.gsm8k import load_problems, rescore
from jaxlora.evals.run import evaluation_inputs, load_prompts
from jaxlora.evals.subjects import adapter_folder, base_target
from jaxlora.lora import init_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.runtime import folders
from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.files import read_json, sha256_of, write_json_atomic
from jaxlora.runtime.folders import claimed
from jaxlora.runtime.remote import embedded_path
from jaxlora.train.job import prepare
from jaxlora.train.loop import train
from jaxlora.train.manifest import make_manifest

PROBLEMS, NEW_TOKENS = 4, 12
TOKENIZER = AutoTokenizer.from_pretrained(str(embedded_path("base")))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))


def make_base(folder: Path, seed: int) -> Path:
    make_checkpoint(folder, seed=seed, vocab_size=len(TOKENIZER), num_hidden_layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path("base") / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), seed=3)


@pytest.fixture(scope="module")
def gated_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(embedded_path("data") / name, folder / name)
    pair = FilePair(str(folder / "train.jsonl"), str(folder / "val.jsonl"))
    problems = load_problems("embedded:data/test.jsonl")
    benchmark = Benchmark("embedded:data/test.jsonl", [(p.example_id, p.question) for p in problems])
    write_json_atomic(folder / "contamination.json", check([pair], benchmark))
    return folder


def options(base: Path, results: Path, **fields: object) -> dict[str, str]:
    values = {
        "model.path": base, "results_dir": results, "eval.problems": PROBLEMS,
        "mesh.fsdp": 1, "mesh.data": -1, "eval.max_new_tokens": NEW_TOKENS, "eval.batch_rows": 2,
    }  # fmt: skip
    return {name: str(value) for name, value in (values | fields).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, gated_data) -> Path:
    """A finished run of two steps, with a learning rate that changes what the model says."""
    fields = {
        "data.train_path": gated_data / "train.jsonl", "data.validation_path": gated_data / "val.jsonl",
        "data.train_rows": 16, "data.validation_rows": 4, "train.epochs": 1, "optim.peak_lr": 0.05,
        "optim.schedule": "constant", "lora.condition": "attention_only", "seed": 2,
    }  # fmt: skip
    config = load_config("configs/tiny.py", options(base, tmp_path_factory.mktemp("results"), **fields))
    train(prepare(config))
    return config.run_dir


@pytest.fixture
def evaluate(monkeypatch, base, tmp_path):
    main = runpy.run_path("launch/evaluate.py")["main"]

    def call(*words: object, **fields: object) -> None:
        overrides = [f"--config.{k}={v}" for k, v in options(base, tmp_path / "results", **fields).items()]
        monkeypatch.setattr(
            sys, "argv", ["evaluate.py", "--config", "configs/tiny.py", *map(str, words), *overrides]
        )
        main()

    return call


def transformers_texts(model) -> list[str]:
    """Greedy answers of a PyTorch model to the first problems, one at a time."""
    texts = []
    for problem in load_problems("embedded:data/test.jsonl", PROBLEMS):
        ids = torch.tensor(render_prompts(TOKENIZER, [problem.question]))
        answer = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        texts.append(TOKENIZER.decode(answer[:-1] if answer[-1] == TOKENIZER.eos_token_id else answer))
    return texts


def written_texts(folder: Path) -> list[str]:
    return [
        json.loads(line)["generated_text"] for line in (folder / "predictions.jsonl").read_text().splitlines()
    ]


def torch_base(base: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def test_the_base_is_scored_and_answers_as_in_transformers(evaluate, base, tmp_path):
    evaluate("--base")
    out = tmp_path / "results" / "tiny-base" / "evaluation"
    summary = read_json(out / "summary.json")
    assert (summary["condition"], summary["seed"], summary["total"]) == (None, None, PROBLEMS)
    assert summary["status"] == "completed"
    assert written_texts(out) == transformers_texts(torch_base(base))
    assert summary["correct_strict"] == sum(
        record["correct"] for record in rescore(out / "predictions.jsonl")
    )


def test_a_run_is_scored_with_its_own_adapter_and_answers_as_in_peft(evaluate, base, run):
    evaluate("--run", run, "--overwrite", **{"lora.condition": "all_layer", "seed": 0, "prefix": "other"})
    summary = read_json(run / "evaluation" / "summary.json")
    assert (summary["run_id"], summary["condition"], summary["seed"]) == (run.name, "attention_only", 2)
    assert summary["checkpoint"] == "step-2"
    peft = PeftModel.from_pretrained(torch_base(base), run / "selected").eval()
    texts = written_texts(run / "evaluation")
    assert texts == transformers_texts(peft)
    assert texts != transformers_texts(torch_base(base))


def test_any_adapter_is_scored_as_its_own_metadata_says(evaluate, run, tmp_path):
    evaluate("--adapter", run / "selected", "--out", tmp_path / "scores")
    evaluate("--run", run, "--overwrite")
    assert written_texts(tmp_path / "scores") == written_texts(run / "evaluation")
    summary = read_json(tmp_path / "scores" / "summary.json")
    assert (summary["run_id"], summary["condition"], summary["seed"]) == (run.name, "attention_only", 2)


def test_a_run_answers_a_second_quiz_beside_its_first(evaluate, run, tmp_path):
    quiz = tmp_path / "quiz.csv"
    quiz.write_text("question,answer\nWhat is 3 + 4?,7\n")
    evaluate("--run", run, "--overwrite")
    before = read_json(run / "evaluation" / "summary.json")
    words = ("--run", run, "--questions", quiz, "--rule", "last_number")
    with pytest.raises(UserError, match="already holds an evaluation; give another --out"):
        evaluate(*words)
    evaluate(*words, "--out", tmp_path / "scores")
    assert read_json(tmp_path / "scores" / "summary.json")["total"] == 1
    assert read_json(run / "evaluation" / "summary.json") == before


def test_any_questions_are_asked_and_scored_as_the_options_say(evaluate, run, tmp_path):
    quiz = tmp_path / "quiz.csv"
    quiz.write_text("task,target\nWhat is 3 + 4?,7\nWhat is 2 + 2?,the answer is 4\n")
    words = ("--questions", quiz, "--system", "Be brief.", "--columns", "question=task,answer=target")
    evaluate("--adapter", run / "selected", "--out", tmp_path / "scores", *words, "--rule", "last_number")
    summary = read_json(tmp_path / "scores" / "summary.json")
    assert (summary["system_prompt"], summary["rule"], summary["total"]) == ("Be brief.", "last_number", 2)
    assert "Be brief." in summary["first_prompt"]
    records = [
        json.loads(line) for line in (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()
    ]
    assert [record["reference_answer"] for record in records] == ["7", "4"]
    assert rescore(tmp_path / "scores" / "predictions.jsonl") == records
    with pytest.raises(UserError, match=r"config.eval.rule: 'last' is not known"):
        evaluate("--base", *words, "--rule", "last")
    evaluate("--base", *words[:2], "--columns", "question=task,answer=target", "--rule", "exact")
    summary = read_json(tmp_path / "results" / "tiny-base" / "evaluation" / "summary.json")
    assert summary["system_prompt"] is None
    assert "system" not in summary["first_prompt"]


def test_an_adapter_without_a_seed_needs_none(evaluate, run, tmp_path):
    shutil.copytree(run / "selected", tmp_path / "step-3169")
    (tmp_path / "step-3169" / "jaxlora.json").unlink()
    evaluate("--adapter", tmp_path / "step-3169", "--out", tmp_path / "unknown")
    summary = read_json(tmp_path / "unknown" / "summary.json")
    assert (summary["seed"], summary["run_id"]) == (None, "tiny-attention_only-step-3169")
    evaluate("--adapter", tmp_path / "step-3169", "--out", tmp_path / "scores", "--seed", 5)
    summary = read_json(tmp_path / "scores" / "summary.json")
    assert (summary["condition"], summary["seed"], summary["checkpoint"]) == (
        "attention_only",
        5,
        "step-3169",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--condition", "all_layer"], "--condition: all_layer, but .* adapts attention_only"),
        (["--seed", "1"], "--seed: 1, but .* records seed 2"),
    ],
)
def test_what_the_user_says_of_an_adapter_must_be_true(evaluate, run, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        evaluate("--adapter", run / "selected", "--out", tmp_path / "scores", *words)
    assert not (tmp_path / "scores").exists()


def test_an_adapter_that_does_not_fit_never_becomes_the_base(evaluate, run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run / "selected", broken)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: missing"):
        evaluate("--adapter", broken, "--out", tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_a_run_refuses_another_base(evaluate, run, tmp_path):
    other = make_base(tmp_path / "other", seed=4)
    with pytest.raises(UserError, match="trained on a different base"):
        evaluate("--run", run, "--overwrite", **{"model.path": other})


def test_a_run_on_ungated_data_is_refused_unless_asked(evaluate, run, tmp_path):
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    manifest = read_json(copy / "manifest.json")
    write_json_atomic(copy / "manifest.json", manifest | {"gates": {"passed": False, "reason": "no report"}})
    with pytest.raises(UserError, match=r"on ungated data: no report.* own need no gates: give --rule"):
        evaluate("--run", copy)
    write_json_atomic(copy / "manifest.json", manifest | {"kind": "rl", "gates": None})
    with pytest.raises(UserError, match=r"rl\.problems are not compared .* --config.data.allow_ungated=true"):
        evaluate("--run", copy)
    evaluate("--run", copy, **{"data.allow_ungated": "true"})
    assert (copy / "evaluation" / "summary.json").is_file()


def test_an_evaluation_is_replaced_only_when_asked(evaluate, tmp_path):
    out = tmp_path / "results" / "tiny-base" / "evaluation"
    out.mkdir(parents=True)
    (out / "predictions.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="--overwrite to replace it"):
        evaluate("--base")
    assert (out / "predictions.jsonl").read_text() == "mine\n"
    evaluate("--base", "--overwrite")
    assert len(rescore(out / "predictions.jsonl")) == PROBLEMS


def test_a_dry_run_writes_nothing_and_counts_the_prompts(evaluate, run, tmp_path, capsys):
    evaluate("--base", "--dry-run")
    text = capsys.readouterr().out
    problems = load_problems("embedded:data/test.jsonl", PROBLEMS)
    tokens = sum(map(len, render_prompts(TOKENIZER, [problem.question for problem in problems])))
    assert f"{PROBLEMS} problems" in text
    assert f"{tokens:,} tokens in all" in text
    assert f"at most {NEW_TOKENS} new tokens" in text
    assert problems[0].question in text
    assert not (tmp_path / "results").exists()


def test_a_base_drawn_at_random_is_known_by_its_seed_and_not_by_the_files_beside_it(base, tmp_path):
    configs = [
        load_config("configs/tiny.py", options(base, tmp_path, **{"model.random_weights": "true", "seed": n}))
        for n in (0, 1)
    ]
    first, second = (base_target(config).subject.base_fingerprint for config in configs)
    assert first.startswith("random-0-")
    assert second.startswith("random-1-")
    assert make_manifest(prepare(configs[1]))["base"]["fingerprint"] == second


def test_another_chat_template_makes_an_evaluation_another_one(base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    settings = read_json(other / "tokenizer_config.json")
    template = settings["chat_template"] + "{{ ' ' }}"
    write_json_atomic(other / "tokenizer_config.json", settings | {"chat_template": template})
    inputs = []
    for folder in (base, other):
        target = base_target(load_config("configs/tiny.py", options(folder, tmp_path)))
        tokenizer = target.base.tokenizer()
        inputs.append(
            evaluation_inputs(target.config, target.subject, *load_prompts(target.config, tokenizer))
        )
    assert [name for name in inputs[0] if inputs[0][name] != inputs[1][name]] == ["prompts_sha256"]


def test_a_dry_run_refuses_a_mesh_that_the_devices_do_not_make(evaluate):
    with pytest.raises(UserError, match=r"config\.mesh: .*fsdp=3.* does not fit 8 devices"):
        evaluate("--base", "--dry-run", **{"mesh.fsdp": 3})


def test_the_dry_run_counts_the_studys_prompt_tokens(evaluate, shared, capsys):
    """132,306 tokens over the 1,319 test questions, with the real tokenizer; no weights are needed."""
    fields = {
        "model.path": "qwen3-8b", "model.random_weights": "true", "eval.problems": "none",
        "model.tokenizer": shared / "data" / "qwen3-tokenizer",
        "eval.benchmark": shared / "data" / "gsm8k" / "test.jsonl",
    }  # fmt: skip
    evaluate("--base", "--dry-run", **fields)
    assert "132,306 tokens in all" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--base", "--run", "x"], ["--base", "--adapter", "x"]])
def test_exactly_one_subject_is_named(evaluate, words):
    with pytest.raises(SystemExit) as stopped:
        evaluate(*words)
    assert stopped.value.code == 2


def test_what_belongs_to_an_adapter(evaluate, tmp_path):
    with pytest.raises(UserError, match="need --adapter"):
        evaluate("--base", "--seed", 3)
    with pytest.raises(UserError, match="--adapter needs --out"):
        evaluate("--adapter", tmp_path)


def test_an_adapter_on_the_hub_is_three_files_of_one_folder_and_its_tokenizer(base, tmp_path, monkeypatch):
    """The layout of the published adapters: OWNER/NAME, and a path of several folders below it."""
    inner = "checkpoints/best-checkpoints/attention_only/seed-0/step-3169"
    lora = load_config("configs/tiny.py", {"lora.condition": "attention_only"}).lora
    spec = ModelSpec(load_model_config(base), lora, "float32", scan=False)
    export_adapter(tmp_path / inner, spec, init_lora(spec, 0), "Qwen/Qwen3-8B")
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns, local_files_only=False):
        asked.append((repository, revision, allow_patterns, local_files_only))
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert adapter_folder(f"hf://owner/name/{inner}") == tmp_path / inner
    names = ("adapter_model.safetensors", "adapter_config.json", "jaxlora.json")
    wanted = [f"{inner}/{name}" for name in (*names, *TOKENIZER_FILES)]
    assert asked == [("owner/name", None, wanted, True), ("owner/name", None, wanted, False)]
    assert adapter_folder(f"hf://owner/name@v1/{inner}") == tmp_path / inner
    assert asked[-1][:2] == ("owner/name", "v1")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors there"):
        adapter_folder("hf://owner/name/elsewhere")
    with pytest.raises(UserError, match="write hf://OWNER/NAME/PATH"):
        adapter_folder("hf://owner")


# --- Stopping, lengths, tokenizers --------------------------------------------------------------------------


def test_every_end_is_recorded_and_named_before(evaluate, base, tmp_path, capsys):
    """The tokenizer's own end is not the template's: both stop, and so do those of the model's files."""
    other = shutil.copytree(base, tmp_path / "other")
    settings = read_json(other / "tokenizer_config.json")
    write_json_atomic(other / "tokenizer_config.json", settings | {"eos_token": "<|endoftext|>"})
    write_json_atomic(other / "generation_config.json", {"eos_token_id": [3, 17]})
    ids = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    evaluate("--base", "--dry-run", **{"model.path": other})
    text = capsys.readouterr().out
    for token in (*ids, 17):
        assert f"{token} ({TOKENIZER.decode([token])})" in text
    evaluate("--base", **{"model.path": other})
    summary = read_json(tmp_path / "results" / "tiny-base" / "evaluation" / "summary.json")
    own = {read_json(other / "config.json")["eos_token_id"]}
    assert set(summary["stop_token_ids"]) == {*ids, 3, 17} | own
    for record in map(json.loads, (tmp_path / "results/tiny-base/evaluation/predictions.jsonl").open()):
        if record["stop_reason"] == "stop":
            assert "<|im_end|>" not in record["generated_text"]


@pytest.mark.parametrize("words", [["--dry-run"], []])
def test_answers_beyond_the_models_positions_are_refused_before_weights_load(
    evaluate, base, tmp_path, words, monkeypatch
):
    monkeypatch.setattr(Base, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"config\.eval\.max_new_tokens: .* tokens, but the model has 16,384"):
        evaluate("--base", *words, **{"eval.max_new_tokens": 100_000})
    assert not (tmp_path / "results" / "tiny-base" / "evaluation").exists()


def other_template(folder: Path) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path("base") / name, folder / name)
    settings = read_json(folder / "tokenizer_config.json")
    write_json_atomic(
        folder / "tokenizer_config.json", settings | {"chat_template": settings["chat_template"] + "{{ '' }}"}
    )
    return folder


def finished_copy(run: Path, folder: Path, tokenizer: Path | str) -> Path:
    """The run as if this tokenizer had rendered its rows."""
    copy = shutil.copytree(run, folder / run.name, ignore=shutil.ignore_patterns("evaluation"))
    for name in TOKENIZER_FILES:
        (copy / "selected" / name).unlink(missing_ok=True)
    metadata = read_json(copy / "selected" / "jaxlora.json")
    metadata["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    write_json_atomic(copy / "selected" / "jaxlora.json", metadata)
    manifest = read_json(copy / "manifest.json")
    model = manifest["config"]["model"] | {"tokenizer": str(tokenizer)}
    manifest["config"] |= {"model": model}
    manifest["tokenizer"] = {"path": str(tokenizer), "sha256": tokenizer_sha256(tokenizer)}
    write_json_atomic(copy / "manifest.json", manifest)
    summary = read_json(copy / "summary.json")
    summary["sha256"] = {f"selected/{path.name}": sha256_of(path) for path in (copy / "selected").iterdir()}
    write_json_atomic(copy / "summary.json", summary)
    return copy


def test_a_run_is_evaluated_with_the_template_that_it_was_trained_with(evaluate, run, tmp_path, capsys):
    own = other_template(tmp_path / "own")
    copy = finished_copy(run, tmp_path, own)
    evaluate("--run", copy, "--dry-run")  # the configuration names none
    assert f"tokenizer {own}" in capsys.readouterr().out
    evaluate("--run", copy, "--dry-run", **{"model.tokenizer": own})
    for tokenizer in ("embedded:base", embedded_path("base")):
        with pytest.raises(
            UserError, match=r"a different tokenizer or chat template .*--config\.model\.tokenizer"
        ):
            evaluate("--run", copy, "--dry-run", **{"model.tokenizer": tokenizer})
    shutil.rmtree(own)
    with pytest.raises(UserError, match="no such directory"):
        evaluate("--run", copy, "--dry-run")
    shutil.copytree(
        other_template(tmp_path / "again"), copy / "selected", dirs_exist_ok=True
    )  # a run's own copy
    evaluate("--run", copy, "--dry-run")


def test_an_adapter_brings_its_tokenizer(evaluate, base, run, tmp_path, capsys):
    adapter = read_adapter(run / "selected", load_model_config(base))
    spec = ModelSpec(load_model_config(base), adapter.lora, "float32", scan=False)
    own = other_template(tmp_path / "own")
    export_adapter(tmp_path / "adapter", spec, adapter.tree, str(base), seed=2, tokenizer=own)
    words = ("--adapter", tmp_path / "adapter", "--out", tmp_path / "scores", "--dry-run")
    evaluate(*words)
    assert f"tokenizer {tmp_path / 'adapter'}" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"a different tokenizer or chat template .*--config\.model\.tokenizer"
    ):
        evaluate(*words, **{"model.tokenizer": base})
    evaluate(*words, **{"model.tokenizer": own})


# --- The base of an adapter ---------------------------------------------------------------------------------


class TestBaseOfAnAdapter:
    @pytest.fixture
    def other(self, tmp_path) -> Path:
        return make_base(tmp_path / "other", seed=4)

    @pytest.fixture
    def adapter(self, base, tmp_path):
        """Make an adapter that names its base so, with or without its fingerprint."""

        def make(name: str, known: bool = False) -> Path:
            lora = load_config("configs/tiny.py", {"lora.targets": "attention_only"}).lora
            spec = ModelSpec(load_model_config(base), lora, "float32", scan=False)
            mark = fingerprint(base) if known else None
            folder = tmp_path / "adapter"
            export_adapter(folder, spec, init_lora(spec, 0), name, seed=0, base_fingerprint=mark)
            return folder

        return make

    def words(self, adapter: Path) -> tuple[object, ...]:
        return "--adapter", adapter, "--out", adapter.parent / "scores", "--dry-run"

    @pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "/gone/base", "base"])
    def test_a_recorded_fingerprint_decides_whatever_the_name(self, evaluate, adapter, other, name):
        words = self.words(adapter(name, known=True))
        evaluate(*words)
        with pytest.raises(
            UserError, match=r"trained on a different base than .*other'.*--any-base uses it anyway"
        ):
            evaluate(*words, **{"model.path": other})
        evaluate(*words, "--any-base", **{"model.path": other})

    def test_another_folder_that_is_here_is_compared(self, evaluate, adapter, base, other, tmp_path):
        words = self.words(adapter(str(base)))
        evaluate(*words)
        evaluate(*words, **{"model.path": shutil.copytree(base, tmp_path / "copy")})
        with pytest.raises(
            UserError, match=r"names the base .*, whose files differ from those of .*--any-base"
        ):
            evaluate(*words, **{"model.path": other})
        evaluate(*words, "--any-base", **{"model.path": other})

    @pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "/gone/base", "base", "gs://bucket/base"])
    def test_a_copy_of_the_base_is_taken_where_nothing_proves_otherwise(self, evaluate, adapter, name):
        evaluate(*self.words(adapter(name)))

    def test_two_names_of_the_hub_are_two_bases(self, evaluate, adapter, base, tmp_path, monkeypatch):
        cached = tmp_path / "models--Qwen--Qwen3-8B-Base" / "snapshots" / "0123"
        shutil.copytree(base, cached)
        words = self.words(adapter("Qwen/Qwen3-8B"))
        with pytest.raises(UserError, match=r"names the base 'Qwen/Qwen3-8B', not .*Base.*--any-base"):
            evaluate(*words, **{"model.path": cached})
        moved = tmp_path / "models--qwen--qwen3-8b" / "snapshots" / "0123"
        shutil.copytree(base, moved)
        evaluate(*words, **{"model.path": moved})

    def test_any_base_belongs_to_an_adapter(self, evaluate):
        with pytest.raises(UserError, match="--any-base need --adapter"):
            evaluate("--base", "--any-base")


# --- One writer, whole or not at all ------------------------------------------------------------------------


def test_of_two_evaluations_at_once_the_second_is_refused(evaluate, tmp_path):
    evaluate("--base")
    out = tmp_path / "results" / "tiny-base" / "evaluation"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with claimed(out), pytest.raises(UserError, match="another process is writing it"):
        evaluate("--base", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    evaluate("--base", "--overwrite")
    assert {path.name for path in out.parent.iterdir()} == {"evaluation"}


def test_an_evaluation_that_stops_while_decoding_leaves_the_older_one(evaluate, tmp_path, monkeypatch):
    evaluate("--base")
    out = tmp_path / "results" / "tiny-base" / "evaluation"
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(*_, **__):
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate("--base", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in out.parent.iterdir()} == {"evaluation"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_process_killed_while_it_writes_leaves_the_older_evaluation(evaluate, tmp_path, call):
    evaluate("--base")
    out = tmp_path / "results" / "tiny-base" / "evaluation"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if not (child := os.fork()):  # it must not use JAX, whose threads a fork does not have
        setattr(folders.os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            with claimed(out):
                folders.replace_together(out, dict.fromkeys(before, b"other"))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {name: (out / name).read_bytes() for name in before} == before
    assert len(list(out.iterdir())) > len(before)  # what it left
    evaluate("--base", "--overwrite")
    summary = read_json(out / "summary.json")
    assert summary["predictions_sha256"] == sha256_of(out / "predictions.jsonl")
    assert {path.name for path in out.iterdir()} == set(before)
    assert {path.name for path in out.parent.iterdir()} == {"evaluation"}


def test_a_full_disk_is_one_line_and_the_older_evaluation_stays(evaluate, tmp_path, monkeypatch):
    evaluate("--base")
    out = tmp_path / "results" / "tiny-base" / "evaluation"
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(
        MachineError, match=r"evaluation: no space left on the disk; free some and start again"
    ):
        evaluate("--base", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in out.parent.iterdir()} == {"evaluation"}


def test_the_summary_has_the_hash_of_what_was_decoded_and_not_of_what_lies_there(
    evaluate, tmp_path, monkeypatch
):
    """Another writer that takes no lock cannot have its answers recorded as ours."""
    write = folders.replace_together

    def disturbed(folder, contents):
        write(folder, contents)
        (folder / "predictions.jsonl").write_text("{}\n")

    monkeypatch.setattr(evaluation, "replace_together", disturbed)
    evaluate("--base")
    out = tmp_path / "results" / "tiny-base" / "evaluation"
    assert read_json(out / "summary.json")["predictions_sha256"] != sha256_of(out / "predictions.jsonl")


def test_a_lock_that_is_a_link_touches_nothing(evaluate, tmp_path):
    (tmp_path / "precious").write_text("mine")
    place = tmp_path / "results" / "tiny-base"
    place.mkdir(parents=True)
    (place / ".evaluation.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.evaluation\.lock: is a link; remove it"):
        evaluate("--base")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_base_whose_bytes_have_changed_is_not_evaluated(evaluate, base, run, tmp_path):
    """Not even where headers and ends of its files, the fingerprint, are as they were."""
    copy = shutil.copytree(run, tmp_path / run.name, ignore=shutil.ignore_patterns("evaluation"))
    assert read_json(copy / "summary.json")["base_weights_sha256"]
    moved = shutil.copytree(base, tmp_path / "base")
    evaluate("--run", copy, **{"model.path": moved})
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 0b100
    (moved / "model.safetensors").write_bytes(content)
    assert fingerprint(moved) == fingerprint(base)
    with pytest.raises(UserError, match=r"its weights are not those of the run"):
        evaluate("--run", copy, "--overwrite", **{"model.path": moved})
