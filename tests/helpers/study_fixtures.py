"""Build evaluations and study directories for tests: real record formats, made-up but consistent figures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from helpers.hf_models import make_checkpoint
from jaxlora.evals.gsm8k import Problem, aggregate, score
from jaxlora.runtime.files import append_jsonl, write_json_atomic, write_jsonl_atomic, write_text_atomic
from jaxlora.runtime.records import metric_record, summary_record
from jaxlora.runtime.remote import embedded_path
from jaxlora.study import figures
from jaxlora.study.comparison import Evaluation
from jaxlora.study.grid import Setting
from jaxlora.study.report import render_report, write_comparison
from jaxlora.study.results import load_study

RIGHT, FORMAT, WRONG, NO_BOX, TRUNCATED = "right", "format", "wrong", "no_box", "truncated"


def prediction(index: int, kind: str) -> dict:
    """One record of problem `index`, whose answer is 1000 + index, with an outcome of the given kind."""
    answer = 1000 + index
    text = {
        RIGHT: rf"Add them up. \boxed{{{answer}}}",
        FORMAT: rf"Add them up. \boxed{{\${answer:,}}}",
        WRONG: rf"Subtract them. \boxed{{{index}}}",
        NO_BOX: f"The answer is {answer}.",
        TRUNCATED: "Let me think. " * 20,
    }[kind]
    problem = Problem(
        index, f"gsm8k-{index:04d}", f"Problem <b>{index}</b>: what is 1000 + {index}?", str(answer)
    )
    return score(
        problem, text, 100, 512 if kind == TRUNCATED else 60, "length" if kind == TRUNCATED else "stop"
    )


def evaluation(condition: str | None, seed: int | None, kinds: list[str], prefix: str = "test") -> Evaluation:
    """The evaluation of one model whose answers are of the given kinds, problem by problem."""
    run_id = f"{prefix}-base" if condition is None else f"{prefix}-{condition}-seed-{seed}"
    setting = None if condition is None else Setting(condition)
    return Evaluation(run_id, setting, seed, tuple(prediction(i, kind) for i, kind in enumerate(kinds)))


# --- A study directory --------------------------------------------------------------------------------------

STEPS = (10, 20, 30, 40, 50)
SELECTED = 30
CONDITIONS = {"attention_only": 0.0, "all_layer": 0.004}  # and how far its validation NLL lies above
RATES = {1e-4: 0.52, 3e-4: 0.50, 1e-3: 0.51}
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & 'q'"
)


def build_study(root: Path, seeds: tuple[int, ...] = (0, 1, 2), prefix: str = "test") -> Path:
    """Write a finished miniature study below `root`: made-up figures in the real files of real runs."""
    _write_evaluation(root, None, None, prefix)
    for condition, shift in CONDITIONS.items():
        for seed in seeds:
            _write_run(root / f"{prefix}-{condition}-seed-{seed}", condition, seed, shift + 0.001 * seed)
            _write_evaluation(root, condition, seed, prefix)
        for rate, nll in RATES.items():
            folder = root / "lr-selection" / f"{prefix}-{condition}-lr-{rate:g}"
            _write_run(folder, condition, 7, nll - 0.5 + shift, rate)
    return root


def _kinds(condition: str | None, seed: int | None) -> list[str]:
    """60 problems; the base loses format and boxes, adapters differ by a few problems and by seed."""
    if condition is None:
        return [RIGHT] * 30 + [FORMAT] * 12 + [NO_BOX] * 6 + [TRUNCATED] * 2 + [WRONG] * 10
    kinds = [RIGHT] * 52 + [WRONG] * 6 + [NO_BOX, TRUNCATED]
    for offset in range(3 + (seed or 0)):
        kinds[(7 * offset if condition == "all_layer" else 9 * offset + 3) % 50] = (
            FORMAT if offset == 1 else WRONG
        )
    return kinds


def _write_run(folder: Path, condition: str, seed: int, shift: float, rate: float = 3e-4) -> None:
    identity = {"run_id": folder.name, "condition": condition, "seed": seed}
    for step in range(1, STEPS[-1] + 1):
        speed = 900 + 40 * (step % 7) - (300 if condition == "all_layer" else 0)
        measured = {"loss": 1 / step + 0.3, "learning_rate": rate, "token_count": 300 + step}
        row = metric_record(
            **identity, step=step, split="train", **measured, seconds=36.0, tokens_per_second=float(speed)
        )
        append_jsonl(folder / "metrics.jsonl", row)
        if step in STEPS:
            nll = 0.5 + shift + 1e-5 * (step - SELECTED) ** 2
            row = metric_record(
                **identity,
                checkpoint=f"step-{step}",
                step=step,
                split="validation",
                loss=nll,
                token_count=1234,
            )
            append_jsonl(folder / "metrics.jsonl", row)
    manifest = {
        "run_id": folder.name,
        "code": {"git_sha": "0123abcd", "dirty": False},
        "packages": {"jax": "0.10.2", "flax": "0.12.8"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "config": {
            "model": {"path": "Qwen/Qwen3-8B"},
            "lora": {"condition": condition},
            "optim": {"peak_lr": rate},
            "seed": seed,
        },
        "dataset": {"train": {"path": "train.jsonl", "sha256": "ab" * 32, "row_ids": ["a", "b", "c"]}},
    }
    write_json_atomic(folder / "manifest.json", manifest)
    summary = summary_record(
        **identity, checkpoint=f"step-{SELECTED}", dataset="rows", status="completed", token_count=16275,
        primary_metric={"name": "validation_mean_nll", "value": 0.5 + shift},
    )  # fmt: skip
    write_json_atomic(folder / "summary.json", summary)
    size = 16 if condition == "all_layer" else 8
    tensors = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((2, size), np.float32)
    }
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


def _write_evaluation(root: Path, condition: str | None, seed: int | None, prefix: str) -> None:
    run = evaluation(condition, seed, _kinds(condition, seed), prefix)
    folder = root / run.run_id / "evaluation"
    records = [dict(record) for record in run.records]
    records[5] |= {"generated_text": HOSTILE + records[5]["generated_text"]}
    write_jsonl_atomic(folder / "predictions.jsonl", records)
    counts = aggregate(records)
    checkpoint = f"step-{SELECTED}" if condition else None
    identity = {"run_id": run.run_id, "checkpoint": checkpoint, "condition": condition, "seed": seed}
    row = metric_record(
        **identity, split="test", eval_metric=counts["accuracy"], token_count=counts["prompt_tokens"]
    )
    append_jsonl(folder / "metrics.jsonl", row)
    summary = summary_record(
        **identity, dataset="openai/gsm8k", status="completed",
        primary_metric={"name": "accuracy", "value": counts["accuracy"]},
    )  # fmt: skip
    write_json_atomic(folder / "summary.json", summary | counts)


def make_report(root: Path) -> Path:
    """Compare, draw and write as the last stages of a study do; the path of `report.html`."""
    study, folder = load_study(root, "test"), root / "report"
    comparison = write_comparison(study, folder)
    planned, _ = figures.plan_figures(study, comparison)
    figures.draw_figures(planned, folder / "figures", root)
    for name, text in render_report(study, comparison, folder).items():
        write_text_atomic(folder / name, text)
    return folder / "report.html"


def empty_pictures(figures, folder: Path, root: Path) -> None:
    """In place of `draw_figures`: files of the right names with nothing in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for drawn, _ in figures:
        (folder / f"{drawn.name}.png").touch()


# --- A real study, in seconds -------------------------------------------------------------------------------

FIELDS = {
    "results_dir": "results",  # of the working directory, so that two studies have the same configuration
    "data.train_rows": 24,
    "data.validation_rows": 8,
    "train.epochs": 1,
    "train.validation_every": 2,
    "train.validation_merge": 0,
    "train.startup_check": "false",
    "selection.learning_rates": "1e-3,3e-3",
    "selection.train_rows": 16,
    "selection.validation_rows": 8,
    "selection.validation_every": 1,
    "sweep.seeds": "0",
    "eval.problems": 6,
    "eval.max_new_tokens": 8,
    "eval.batch_rows": 3,
}


def tiny_base(folder: Path) -> Path:
    """A random one-layer model with the embedded tokenizer."""
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True}
    make_checkpoint(folder, initializer_range=0.05, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path("base") / name, folder)
    return folder


def report_of(folder: Path) -> dict[str, str]:
    """The report's files without the sections of measured times."""
    report = folder / "results" / "tiny-report"
    html = (report / "report.html").read_text(encoding="utf-8")
    html, cut = re.subn(r'<section id="\w+" data-measured>.*?</section>', "", html, flags=re.DOTALL)
    markdown = (report / "report.md").read_text(encoding="utf-8")
    markdown, also_cut = re.subn(
        r"\n## Training time and throughput\n.*?(?=\n## )", "", markdown, flags=re.DOTALL
    )
    assert (cut, also_cut) == (1, 1)
    names = ("comparison.json", "selection.json")
    return {"html": html, "markdown": markdown} | {name: (report / name).read_text() for name in names}
