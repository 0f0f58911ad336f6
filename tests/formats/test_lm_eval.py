"""EleutherAI's lm-eval scores a merged model as we do: the recipe of `jaxlora/evals/README.md`, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers.adapters import trained_lora
from helpers.hf_models import make_checkpoint
from transformers import AutoTokenizer

import jaxlora
from jaxlora.checkpoints.base import load_base, save_model
from jaxlora.config import LoraConfig, MeshConfig
from jaxlora.lora import merge_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.runtime.remote import embedded_path
from jaxlora.sharding import make_mesh

QUIZ = [
    {"question": "What is 2 + 3?", "choices": ["5", "6", "7"], "label": 0},
    {"question": "Tom has 4 apples and eats 1. How many are left?", "choices": ["4", "3"], "label": 1},
    {"question": "What is 4 + 4?", "choices": ["eight", "nine apples", "8"], "label": 2},
]
TASK = """
task: quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture
def python() -> str:
    """The interpreter that has lm-eval: this one, or the one that `JAXLORA_LM_EVAL` names."""
    if named := os.environ.get("JAXLORA_LM_EVAL"):
        return named
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed; JAXLORA_LM_EVAL names a Python that has it")
    return sys.executable


@pytest.fixture
def merged(tmp_path) -> Path:
    """A tiny model with an adapter folded in, as `jaxlora export --merged` writes it."""
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_path("base")))
    make_checkpoint(base, vocab_size=len(tokenizer), num_hidden_layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path("base") / name, base / name)
    spec = ModelSpec(load_model_config(base), LoraConfig(), "float32", scan=False)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    frozen = load_base(base, spec, mesh)
    save_model(tmp_path / "merged", spec, merge_lora(spec, trained_lora(spec), frozen), base)
    return tmp_path / "merged"


@pytest.mark.slow
def test_log_likelihoods_and_score_are_ours(python, merged, tmp_path):
    data, tasks, out = tmp_path / "quiz.jsonl", tmp_path / "tasks", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUIZ))
    tasks.mkdir()
    (tasks / "quiz.yaml").write_text(TASK.format(data=data))
    words = ["--model", "hf", "--model_args", f"pretrained={merged},dtype=float32", "--tasks", "quiz"]
    words += ["--include_path", tasks, "--device", "cpu", "--output_path", out, "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [python, "-m", "lm_eval", "run", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]

    (file,) = out.rglob("samples_quiz_*.jsonl")
    found = {}
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        found[sample["doc"]["question"]] = [float(answer[0]) for answer in sample["filtered_resps"]]
    trainer = jaxlora.load(str(merged), "float32").untrained()
    tokenizer, right = trainer.engine.tokenizer, 0
    for row in QUIZ:
        context = f"Question: {row['question']}\nAnswer:"
        start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        ours = []
        for choice in row["choices"]:
            ids = tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"]
            weights = [float(i >= start) for i in range(len(ids))]
            (logprobs,) = trainer.logprobs([{"tokens": ids, "weights": weights}])
            ours.append(float(logprobs[start - 1 :].sum()))
        assert found[row["question"]] == pytest.approx(ours, abs=1e-4)
        right += max(range(len(ours)), key=ours.__getitem__) == row["label"]
    (results,) = out.rglob("results_*.json")
    score = json.loads(results.read_text())["results"]["quiz"]["acc,none"]
    assert score == pytest.approx(right / len(QUIZ))
