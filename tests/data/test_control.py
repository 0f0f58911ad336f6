"""Promises of the guard: no string that somebody else wrote becomes a control token."""

from __future__ import annotations

import copy
import json
import shutil
import time

import pytest
from tokenizers import AddedToken, normalizers

from jaxlora.data.control import guard_of
from jaxlora.data.messages import Example
from jaxlora.data.render import (
    largest_token_id,
    load_tokenizer,
    render_batch,
    render_chat,
    render_prompts,
)
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import embedded_path

NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "<|fim_prefix|>"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>"]
USER = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "That."}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def qwen(shared):
    return load_tokenizer(shared / "data/qwen3-tokenizer")


def call(name="f", **arguments):
    return ANSWER | {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def call_in_a_string(arguments):
    return ANSWER | {"tool_calls": [{"name": "f", "arguments": arguments}]}


def escaped(value):
    """JSON whose letters cannot be seen before it is parsed."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e")


def rows_with(text):
    """One conversation for each place where a string is rendered that the model does not write."""
    return {
        "user": [USER | {"content": f"a {text} b"}, ANSWER],
        "earlier user": [USER | {"content": text}, ANSWER, USER, ANSWER],
        "system": [{"role": "system", "content": text}, USER, ANSWER],
        "name of a call": [USER, call(name=text)],
        "argument": [USER, call(x=f"a{text}b")],
        "argument deep inside": [USER, call(x={"y": [1, {"z": text}]})],
        "name of an argument": [USER, call(**{text: 1})],
        "argument in a string": [USER, call_in_a_string(json.dumps({"x": text}))],
        "argument in an escaped string": [USER, call_in_a_string(escaped({"x": text}))],
        "result of a tool": [USER, call(), {"role": "tool", "content": text}, ANSWER],
        "name of a tool's result": [USER, call(), {"role": "tool", "content": "5", "name": text}, ANSWER],
        "thoughts": [USER, ANSWER | {"reasoning_content": text}],
    }


@pytest.mark.parametrize("place", rows_with("x"))
@pytest.mark.parametrize("token", [*SPECIAL, *NOT_SPECIAL])
def test_no_control_token_of_others_is_rendered(qwen, place, token):
    (row,) = render_batch(qwen, [("a", rows_with(token)[place])], enable_thinking=True)
    assert isinstance(row, UserError)
    assert f"control token {token!r}" in str(row) or "reasoning_content" in str(row)
    assert str(row).startswith("message ")


@pytest.mark.parametrize("place", rows_with("x"))
def test_the_same_rows_without_it_are_taken(qwen, place):
    (row,) = render_batch(qwen, [("a", rows_with("x")[place])], enable_thinking=True)
    assert not isinstance(row, UserError), row


@pytest.mark.parametrize("token", [*SPECIAL, *NOT_SPECIAL])
@pytest.mark.parametrize("place", ["name", "description", "parameters"])
def test_tool_definitions_are_guarded(qwen, place, token):
    tool = copy.deepcopy(TOOL)
    tool["function"][place] = {"properties": {token: {}}} if place == "parameters" else f"x{token}"
    (row,) = render_batch(qwen, [Example("a", [USER, ANSWER], [tool])])
    assert str(row) == f"tools holds the control token {token!r}; write it another way"


@pytest.mark.parametrize("token", SPECIAL)
def test_an_answer_may_not_end_itself(qwen, token):
    (row,) = render_batch(qwen, [("a", [USER, ANSWER | {"content": f"x{token}"}])])
    assert f"message 2 holds the control token {token!r}" in str(row)


def test_an_answer_may_hold_the_tokens_that_a_model_writes(qwen):
    (row,) = render_batch(qwen, [("a", [USER, ANSWER | {"content": "<tool_call>\n{}\n</tool_call>"}])])
    assert qwen.convert_tokens_to_ids("<tool_call>") in row.tokens


@pytest.mark.parametrize("token", [*SPECIAL, *NOT_SPECIAL])
def test_benchmark_questions_and_chats_are_guarded(qwen, token):
    with pytest.raises(UserError, match="question 2: message 2 holds the control token"):
        render_prompts(qwen, ["fine", f"not {token} fine"])
    for messages in ([USER | {"content": token}], [{"role": "system", "content": token}, USER]):
        with pytest.raises(UserError, match="message 1 holds the control token"):
            render_chat(qwen, messages)


def test_a_chat_is_the_prompt_of_its_training_row(qwen):
    chat = [{"role": "system", "content": "s"}, USER, ANSWER, USER]
    (row,) = render_batch(qwen, [("a", [*chat, ANSWER])])
    assert render_chat(qwen, chat) == row.tokens[: row.prompt_length].tolist()
    assert qwen.decode(render_chat(qwen, chat, enable_thinking=True)).endswith("<|im_start|>assistant\n")


def test_tokens_that_are_looked_for_in_the_normalised_text(tmp_path):
    tokenizer = copy.deepcopy(load_tokenizer("embedded:base"))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("[stop]", normalized=True), AddedToken("  ", normalized=False)])
    text = "a ［stop］ b"  # full-width brackets, which NFKC makes plain
    assert tokenizer.convert_tokens_to_ids("[stop]") in tokenizer(text)["input_ids"]
    assert guard_of(tokenizer).find(text) == "[stop]"
    assert guard_of(tokenizer).find("two  blanks") is None  # such a token controls nothing


def folder_with(tmp_path, change):
    """The shipped tokenizer with its tokenizer.json changed."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(embedded_path("base"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / "tokenizer.json").read_bytes())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_many_special_tokens_cost_no_time_a_row(tmp_path):
    def add(content):
        first = max(content["model"]["vocab"].values()) + 10
        content["added_tokens"] += [
            {
                "id": first + number,
                "content": f"<|{'x' * (number % 50)}{number}|>",
                "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
            for number in range(50_000)
        ]

    tokenizer = load_tokenizer(folder_with(tmp_path, add))
    guard_of(tokenizer)
    start = time.process_time()
    text = "<|" + "x" * 100_000
    assert guard_of(tokenizer).find(text) is None
    assert guard_of(tokenizer).find(text + "<|xx2|>") == "<|xx2|>"
    rows = render_batch(tokenizer, [(str(i), [USER, ANSWER]) for i in range(500)])
    assert not any(isinstance(row, UserError) for row in rows)
    assert time.process_time() - start < 5


def test_the_largest_id_counts_and_not_the_number_of_tokens(tmp_path):
    def add(content):
        content["model"]["vocab"]["unused"] = 70_000

    plain = load_tokenizer("embedded:base")
    tokenizer = load_tokenizer(folder_with(tmp_path, add))
    assert largest_token_id(plain) == len(plain) - 1
    assert len(tokenizer) < 70_000
    assert largest_token_id(tokenizer) == 70_000


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_a_panic_in_rust_is_one_line_of_its_row(tmp_path, part, loss_on):
    """A regular expression that runs out of retries is no `Exception` in Python."""
    pattern = {"pattern": {"Regex": "(x+x+)+y"}}
    parts = {
        "pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False} | pattern,
        "normalizer": {"type": "Replace", "content": "z"} | pattern,
    }
    folder = folder_with(tmp_path, lambda content: content.update({part: parts[part]}))
    tokenizer = load_tokenizer(folder)
    rows = [("a", [USER, ANSWER]), ("b", [USER | {"content": "x" * 100}, ANSWER]), ("c", [USER, ANSWER])]
    first, second, third = render_batch(tokenizer, rows, loss_on=loss_on)
    assert "panics" in str(second)
    assert "\n" not in str(second)
    assert first.tokens.tolist() == third.tokens.tolist()
