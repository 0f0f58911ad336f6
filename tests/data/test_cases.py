"""The small inputs of the reference material that are rows behave as its table says."""

from __future__ import annotations

import json
import re

import pytest

from jaxlora.data.containers import read_rows
from jaxlora.data.render import load_tokenizer
from jaxlora.data.rows import RowOptions, load_rendered_rows
from jaxlora.runtime.errors import UserError

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>\n'
ANSWER = "It is \\boxed{5}.<|im_end|>\n"
USED = {  # file: what carries loss in its last row, by loss_on=last
    "plain.jsonl": ANSWER,
    "plain.jsonl.gz": ANSWER,
    "plain.jsonl.zst": ANSWER,
    "plain.parquet": ANSWER,
    "bom.jsonl": ANSWER,
    "blank_last.jsonl": ANSWER,
    "list.json": ANSWER,
    "no_system.jsonl": ANSWER,
    "crlf.jsonl": "c\r\nd<|im_end|>\n",
    "emoji_nfd.jsonl": "café é ok<|im_end|>\n",  # Qwen3's own tokenizer composes letters
    "multiturn.jsonl": "It is \\boxed{6}.<|im_end|>\n",
    "tools_column.jsonl": CALL,
    "prompt_completion.jsonl": "5<|im_end|>\n",
    "prompt_completion_msgs.jsonl": ANSWER,
    "sharegpt.jsonl": "5<|im_end|>\n",
    "alpaca.jsonl": "5<|im_end|>\n",
    "duplicates.jsonl": ANSWER,
    "leak_exact.jsonl": "It is \\boxed{18}.<|im_end|>\n",  # a matter of the gates
    "leak_second_turn.jsonl": "It is \\boxed{18}.<|im_end|>\n",
    "leak_with_instruction.jsonl": "It is \\boxed{18}.<|im_end|>\n",
    "val1.jsonl": "It is \\boxed{18}.<|im_end|>\n",
}
REFUSED = {
    "utf16.jsonl": "UTF-16",
    "openai_weight_last0.jsonl": ":1: all-zero loss mask: the last answer has weight 0",
    "control_in_user.jsonl": r":1: message 1 holds the control token '<\|im_end\|>'",
    "control_in_tool_args.jsonl": r":1: message 2 holds the control token '<\|im_end\|>'",
    "think_tag_in_user.jsonl": ":1: message 1 holds the control token '</think>'",
    "reasoning_content.jsonl": r":1: message 2 holds thoughts \(reasoning_content\).*data.enable_thinking",
}


@pytest.fixture(scope="module")
def qwen(shared):
    return load_tokenizer(shared / "data/qwen3-tokenizer")


@pytest.fixture(scope="module")
def cases(shared):
    if not (shared / "cases/rows").is_dir():
        pytest.skip("the small inputs (../shared/cases) are not on this machine")
    return shared / "cases/rows"


def load(path, tokenizer, **options):
    return load_rendered_rows(path, tokenizer, max_length=500, options=RowOptions(**options))


def learned(tokenizer, row):
    return tokenizer.decode(row.tokens[row.weights > 0], clean_up_tokenization_spaces=False)


def test_each_file_of_the_table_is_looked_at_here(cases):
    assert {path.name for path in cases.iterdir()} == USED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", USED)
def test_files_that_train(cases, qwen, name):
    rows, report = load(cases / name, qwen)
    assert learned(qwen, rows[-1]) == USED[name]
    assert report.used == report.lines == len(rows)


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused_in_one_line(cases, qwen, name):
    with pytest.raises(UserError, match=re.escape(name) + ".*" + REFUSED[name]) as error:
        load(cases / name, qwen)
    assert "\n" not in str(error.value)


def test_the_same_row_from_each_container(cases, qwen):
    (plain,), _ = load(cases / "plain.jsonl", qwen)
    for name in ("plain.jsonl.gz", "plain.jsonl.zst", "list.json"):
        (row,), _ = load(cases / name, qwen)
        assert row.tokens.tolist() == plain.tokens.tolist()
    (bare,), _ = load(cases / "no_system.jsonl", qwen)
    for name in ("plain.parquet", "bom.jsonl", "blank_last.jsonl", "prompt_completion_msgs.jsonl"):
        (row,), _ = load(cases / name, qwen)
        assert row.tokens.tolist() == bare.tokens.tolist()
    assert "system" not in qwen.decode(bare.tokens)


def test_all_answers(cases, qwen):
    (row,), _ = load(cases / "multiturn.jsonl", qwen, loss_on="all")
    assert learned(qwen, row) == ANSWER + "It is \\boxed{6}.<|im_end|>\n"
    (row,), _ = load(cases / "openai_weight_last0.jsonl", qwen, loss_on="all")
    assert learned(qwen, row) == "It is 5.<|im_end|>\n"


def test_thoughts(cases, qwen):
    (row,), _ = load(cases / "reasoning_content.jsonl", qwen, enable_thinking=True)
    assert learned(qwen, row) == "<think>\n2+3=5\n</think>\n\nIt is 5.<|im_end|>\n"
    assert qwen.decode(row.tokens).count("<think>") == 1


def test_text_is_kept_byte_for_byte(cases, qwen):
    line = json.loads((cases / "emoji_nfd.jsonl").read_bytes())
    ((_, _, record),) = read_rows(cases / "emoji_nfd.jsonl")
    assert record == line
    assert "e\u0301" in record["messages"][1]["content"]
    (row,), _ = load(cases / "emoji_nfd.jsonl", qwen)
    text = qwen.apply_chat_template(line["messages"], tokenize=False, enable_thinking=False)
    assert row.tokens.tolist() == qwen(text, add_special_tokens=False)["input_ids"]


def test_tools_are_in_the_prompt(cases, qwen):
    (row,), _ = load(cases / "tools_column.jsonl", qwen)
    prompt = qwen.decode(row.tokens[row.weights == 0])
    assert '"description": "Add two numbers"' in prompt


def test_copies_are_counted_and_said(cases, qwen):
    rows, report = load(cases / "duplicates.jsonl", qwen)
    assert (len(rows), report.duplicates) == (8, 7)
    assert "7 are copies of earlier rows" in report.describe()
