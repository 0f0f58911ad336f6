"""Promises of loss on all answers: the mask is the template's own, exact, or the row is refused."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest

from jaxlora.data.masks import weights_of
from jaxlora.data.messages import Example
from jaxlora.data.render import load_tokenizer, render_batch
from jaxlora.runtime.errors import UserError

# Written for these tests, after the manner of the models that they are named for.
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
SMOLLM2 = """{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{- message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
MARKS_ALL = """{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"""
SHORTENS = """{%- for m in messages %}{{ m.role + ':' }}
{%- if m.role == 'user' or loop.last %}{{ m.content }}{% else %}{{ m.content[:3] }}{% endif %};
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""
BREAKS = """{%- for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' if messages | length < 2 else 'model:' }}{% endif %}"""
TEMPLATES = {"llama3": LLAMA3, "smollm2": SMOLLM2}
THREE = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5 👩‍👩‍👧."},
    {"role": "user", "content": "And é + 3?"},
    {"role": "assistant", "content": "No\nnumber."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome"},
]


@pytest.fixture(scope="module")
def qwen(shared):
    return load_tokenizer(shared / "data/qwen3-tokenizer")


@pytest.fixture(scope="module")
def plain_tokenizer():
    return load_tokenizer("embedded:base")


@pytest.fixture(params=TEMPLATES)
def marked(request, plain_tokenizer):
    """A tokenizer whose template marks its answers with {% generation %}."""
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
    tokenizer.add_special_tokens({"bos_token": tokens[-1], "extra_special_tokens": tokens[:-1]})
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def unmarked(tokenizer):
    """The same template without the marks."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("{%- generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    assert "generation %" not in other.chat_template
    return other


def render(tokenizer, messages, **options):
    tools = options.pop("tools", None)
    (row,) = render_batch(tokenizer, [Example("a", messages, tools)], **({"loss_on": "all"} | options))
    return row


def runs(tokenizer, row):
    """The row's text, cut where the weights change: [(carries loss, text), ...]."""
    assert not isinstance(row, UserError), row
    edges = [0, *(np.flatnonzero(np.diff(row.weights)) + 1), len(row.tokens)]
    return [
        (bool(row.weights[a]), tokenizer.decode(row.tokens[a:b], clean_up_tokenization_spaces=False))
        for a, b in itertools.pairwise(edges)
    ]


class TestTheTemplatesOwnMask:
    def test_marks_give_the_mask_that_transformers_gives(self, marked):
        row = render(marked, THREE)
        theirs = marked.apply_chat_template(
            THREE, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=False
        )
        assert row.tokens.tolist() == theirs["input_ids"]
        assert row.weights.tolist() == theirs["assistant_masks"]
        assert 0 < row.weights.sum() < len(row.tokens)

    def test_prefix_differences_find_the_same(self, marked):
        row, other = render(marked, THREE), render(unmarked(marked), THREE)
        np.testing.assert_array_equal(row.tokens, other.tokens)
        np.testing.assert_array_equal(row.weights, other.weights)
        assert [text for learned, text in runs(marked, other) if learned] == [
            text + ("<|eot_id|>" if "eot_id" in marked.chat_template else "<|im_end|>\n")
            for text in ("It is 5 👩‍👩‍👧.", "No\nnumber.", "Welcome")
        ]

    def test_weights_take_turns_out_either_way(self, marked):
        messages = copy.deepcopy(THREE)
        messages[1]["weight"], messages[5]["train"] = 0, False
        for tokenizer in (marked, unmarked(marked)):
            learned = [text for learns, text in runs(tokenizer, render(tokenizer, messages)) if learns]
            assert len(learned) == 1
            assert learned[0].startswith("No\nnumber.<|")


class TestQwen3:
    def test_every_answer_with_its_end_of_turn_and_nothing_else(self, qwen):
        """Earlier turns are written without the empty thoughts with which the last one begins."""
        assert runs(qwen, render(qwen, THREE)) == [
            (False, "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"),
            (True, "It is 5 👩‍👩‍👧.<|im_end|>\n"),
            (False, "<|im_start|>user\nAnd é + 3?<|im_end|>\n<|im_start|>assistant\n"),
            (True, "No\nnumber.<|im_end|>\n"),
            (False, "<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
            (True, "Welcome<|im_end|>\n"),
        ]

    def test_one_turn_has_the_mask_of_the_last(self, qwen):
        for messages in (THREE[:2], [{"role": "system", "content": "x"}, *THREE[:2]]):
            row, last = render(qwen, messages), render(qwen, messages, loss_on="last")
            np.testing.assert_array_equal(row.tokens, last.tokens)
            np.testing.assert_array_equal(row.weights, last.weights)

    def test_the_text_is_the_same_whatever_carries_loss(self, qwen):
        row, last = render(qwen, THREE), render(qwen, THREE, loss_on="last")
        np.testing.assert_array_equal(row.tokens, last.tokens)
        assert last.weights.sum() < row.weights.sum()

    def test_a_chain_of_tool_calls(self, qwen):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
        messages = [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
            {"role": "assistant", "content": "Five."},
        ]
        tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
        found = runs(qwen, render(qwen, messages, tools=tools))
        assert [text for learned, text in found if learned] == [
            '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n',
            "Five.<|im_end|>\n",
        ]
        assert '"description": "Adds."' in found[0][1]
        assert "<tool_response>\n5\n</tool_response>" in found[2][1]

    def test_thoughts_carry_loss_where_they_are_rendered(self, qwen):
        messages = [*THREE[:3], {"role": "assistant", "reasoning_content": "hm", "content": "6"}]
        expected = "<think>\nhm\n</think>\n\n6<|im_end|>\n"
        for loss_on, answers in (("last", [expected]), ("all", ["It is 5 👩‍👩‍👧.<|im_end|>\n", expected])):
            row = render(qwen, messages, loss_on=loss_on, enable_thinking=True)
            assert [text for learned, text in runs(qwen, row) if learned] == answers
        tagged = [*THREE[:3], {"role": "assistant", "content": "<think>\nhm\n</think>\n\n6"}]
        assert render(qwen, tagged, enable_thinking=True).tokens.tolist() == row.tokens.tolist()

    def test_earlier_thoughts_which_the_template_drops_are_refused(self, qwen):
        messages = [THREE[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\n5"}, *THREE[2:4]]
        row = render(qwen, messages, enable_thinking=True)
        assert isinstance(row, UserError)
        assert "message 2 cannot be marked exactly" in str(row)

    def test_rows_without_thoughts_are_the_same_with_thinking_on(self, qwen):
        row, other = (
            render(qwen, THREE, loss_on="last", enable_thinking=thinking) for thinking in (False, True)
        )
        np.testing.assert_array_equal(row.tokens, other.tokens)
        np.testing.assert_array_equal(row.weights, other.weights)


class TestWhatCannotBeMarkedExactly:
    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            (
                SHORTENS,
                "message 2 cannot be marked exactly for loss_on=all: the template writes it differently",
            ),
            (BREAKS, "message 4 cannot be marked exactly for loss_on=all: the full render does not begin"),
            (MARKS_ALL, "marks 6 answers of 3"),
        ],
    )
    def test_templates(self, plain_tokenizer, template, reason):
        tokenizer = copy.deepcopy(plain_tokenizer)
        tokenizer.chat_template = template
        messages = [*THREE[:-1], THREE[-1] | {"weight": 1}]
        messages[5] = messages[5] | ({"weight": 0} if template == MARKS_ALL else {})
        row = render(tokenizer, messages)
        assert isinstance(row, UserError)
        assert reason in str(row)
        assert "\n" not in str(row)

    def test_a_token_on_both_sides_of_an_edge(self):
        offsets = np.array([[0, 3], [3, 7], [7, 9]])
        assert weights_of([(3, 7)], offsets).tolist() == [0, 1, 0]
        assert weights_of([(0, 3), (7, 9)], offsets).tolist() == [1, 0, 1]
        for span in ((4, 7), (3, 8), (2, 9)):
            with pytest.raises(UserError, match="both sides"):
                weights_of([span], offsets)
        with pytest.raises(UserError, match="all-zero"):
            weights_of([], offsets)

    def test_no_loss_at_all_is_a_bad_row(self, plain_tokenizer):
        messages = [THREE[0], THREE[1] | {"weight": 0}]
        for loss_on in ("last", "all"):
            assert "all-zero loss mask" in str(render(plain_tokenizer, messages, loss_on=loss_on))
