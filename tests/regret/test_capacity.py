"""`jaxlora capacity`, and the rows of the post's data sets as they really are."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from helpers.rows import random_rows

import jaxlora
from jaxlora.cli import load_config, shipped_names
from jaxlora.commands import capacity
from jaxlora.config import LoraConfig
from jaxlora.data.batches import split_validation
from jaxlora.data.rows import RowOptions, load_rendered_rows
from jaxlora.lora import count_trainable
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import model_config_from_dict

CHAT = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]


@pytest.fixture(scope="module")
def tokenizer():
    return jaxlora.load("embedded:base").base.tokenizer()


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(monkeypatch, capsys, tmp_path, *words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["jaxlora capacity", *map(str, words)])
    assert capacity.main() == 0
    return capsys.readouterr().out


def test_the_rank_that_rows_ask_for(monkeypatch, capsys, tmp_path, tokenizer):
    rows = [{"messages": [CHAT[0], {"role": "assistant", "content": "It is 5. " * 200}]} for _ in range(40)]
    file = written(tmp_path / "rows.jsonl", [*rows, {"messages": CHAT[:1]}])
    own = ("--rows", file, "--model", "embedded:base", "--max-length", 8192)
    text = run(monkeypatch, capsys, tmp_path, *own, "--sample", 0)
    assert "skipped: 1 rows" in text
    tokens = int(re.search(r"([\d,]+) tokens carry loss, 1 bit each", text)[1].replace(",", ""))
    made, _ = load_rendered_rows(file, tokenizer, max_length=8192, on_bad_row="skip")
    assert tokens == sum(int(row.weights[1:].sum()) for row in made)
    rank, parameters = re.search(r"all_layer: rank ([\d,]+) \(([\d,]+) parameters", text).groups()
    one = int(parameters.replace(",", "")) // int(rank)
    assert int(rank) == max(1, math.ceil(tokens / 2 / one))
    assert "rule of thumb" in text
    text = run(monkeypatch, capsys, tmp_path, *own, "--sample", 2)
    engine = jaxlora.load("embedded:base")
    found = engine.untrained().logprobs(made[:1])[0]
    bits = float(-(made[0].weights[1:] * found).sum() / made[0].weights[1:].sum() / np.log(2))
    assert f"surprise is {bits:.3f} bits per token" in text


def test_a_sample_is_spread_over_a_sorted_file():
    assert capacity.spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert capacity.spread(list(range(3)), 4) == [0, 1, 2]


def test_ranks_of_experts_are_multiples_of_the_experts_of_a_token():
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    sizes = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = model_config_from_dict({"model_type": "qwen3_moe"} | sizes | heads | experts)
    rows = random_rows(2000)
    bits = capacity.loss_tokens(rows)
    text = "\n".join(capacity.lines(rows, None, model))
    for placement, step in (("all_layer", 2), ("mlp_only", 2), ("attention_only", 1)):
        found = re.search(rf"^{placement}: rank ([\d,]+) \(([\d,]+) parameters", text, re.M).groups()
        rank, parameters = (int(number.replace(",", "")) for number in found)
        fitting, smaller = (
            count_trainable(ModelSpec(model, LoraConfig(targets=placement, rank=r)))
            for r in (rank, rank - step)
        )
        assert rank > step
        assert rank % step == 0
        assert parameters == fitting
        assert 2 * smaller < bits <= 2 * fitting


def test_tulus_rows_are_read_and_those_without_an_answer_are_counted(tmp_path, tokenizer):
    rows = [
        {"id": "a", "messages": CHAT, "source": "ai2"},
        {"id": "b", "messages": [*CHAT, {"role": "user", "content": "Thanks"}], "source": "ai2"},
        {"id": "c", "messages": [{"role": "system", "content": "Be brief."}, *CHAT, *CHAT], "source": "ai2"},
    ]
    options = RowOptions(ignore_columns=("id", "source"))
    file = written(tmp_path / "tulu.jsonl", rows)
    made, report = load_rendered_rows(file, tokenizer, max_length=512, on_bad_row="skip", options=options)
    assert len(made) == 2
    (bad,) = report.skipped
    assert bad.line == 2


def test_openthoughts_rows_split_by_question_and_cut_thoughts_are_counted(tmp_path, tokenizer):
    def row(question, answer):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"difficulty": 5, "source": "s", "domain": "math", "conversations": turns}

    whole = "<think>\nTwo and three.\n</think>\n\nIt is 5."
    rows = [row(f"What is {n} + 3?", whole) for n in range(6) for _ in range(4)]
    rows[5] = row("What is 1 + 3?", "<think>\nTwo and three and")
    options = RowOptions(ignore_columns=("difficulty", "source", "domain"), enable_thinking=True)
    file = written(tmp_path / "thoughts.jsonl", rows)
    made, report = load_rendered_rows(file, tokenizer, max_length=512, on_bad_row="skip", options=options)
    assert [bad.line for bad in report.skipped] == [6]
    train, held_out = split_validation([one.prompt_id for one in made], 0.2, seed=0)
    assert {made[i].prompt_id for i in train}.isdisjoint({made[i].prompt_id for i in held_out})
    assert held_out


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("regret/")])
def test_shipped_experiments_are_what_they_say(name):
    config = load_config(name)
    assert config.regret.arms
    assert config.optim.schedule == "constant"
    assert (config.optim.b1, config.optim.b2, config.optim.weight_decay, config.optim.clip_norm) == (
        *(0.9, 0.95, 0.0, None),
    )
    assert config.lora.alpha == 32
    if name.endswith("short_runs"):
        assert config.regret.marks == (50, 100, 400, 1600)
        assert config.data.train_rows * (1 - config.data.validation_fraction) == pytest.approx(1600 * 32)
