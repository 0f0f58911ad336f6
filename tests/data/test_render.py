"""Promises of the renderer: the template's own bytes, a loss mask on the answer only, one prompt for all."""

from __future__ import annotations

import copy
import json
import signal

import numpy as np
import pytest

from jaxlora.data.messages import Example
from jaxlora.data.render import (
    SYSTEM_PROMPT,
    chat_text,
    encode_texts,
    load_tokenizer,
    prompt_messages,
    render_batch,
    render_prompts,
    shifted,
)
from jaxlora.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded:base")


@pytest.fixture(scope="module")
def qwen(shared):
    return load_tokenizer(shared / "data/qwen3-tokenizer")


@pytest.fixture(scope="module")
def questions(shared):
    lines = (shared / "data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines]


def conversation(answer="It is 4.", question="What is 2 + 2?"):
    return [*prompt_messages(question), {"role": "assistant", "content": answer}]


def render_one(tokenizer, messages, row_id="id"):
    """The row of one conversation, or the `UserError` that says why there is none."""
    (result,) = render_batch(tokenizer, [(row_id, messages)])
    return result


TRICKY = [
    conversation(),
    conversation("\n\nleading newlines are the template's to strip\n"),
    conversation(" leading space"),
    conversation("crlf\r\nand é, 漢字, 🙂, \u2028 and \u00a0 no-break"),
    conversation("a" * 300, "  spaces around  "),
    [{"role": "user", "content": "no system turn"}, {"role": "assistant", "content": "fine"}],
    [*conversation(), {"role": "user", "content": "and 3 + 3?"}, {"role": "assistant", "content": "6"}],
]


class TestTokensAreTheTemplatesOwn:
    @pytest.mark.parametrize("messages", TRICKY)
    def test_training_tokens_are_the_templates_text_tokenised_in_one_go(self, tokenizer, messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
        row = render_one(tokenizer, messages)
        assert row.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize("messages", TRICKY)
    def test_with_the_real_tokenizer_they_are_what_it_gives_by_itself_and_read_back_to_the_text(
        self, qwen, messages
    ):
        ids = qwen.apply_chat_template(messages, tokenize=True, enable_thinking=False, return_dict=False)
        row = render_one(qwen, messages)
        assert row.tokens.tolist() == ids
        text = qwen.apply_chat_template(messages, tokenize=False, enable_thinking=False)
        assert qwen.decode(row.tokens, clean_up_tokenization_spaces=False) == text

    def test_the_text_is_written_out_here_once(self, qwen):
        row = render_one(qwen, conversation())
        assert qwen.decode(row.tokens) == (
            "<|im_start|>system\nYou are a careful math solver. Solve the problem step by step. Put the final"
            " answer in \\boxed{}.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nIt is 4.<|im_end|>\n"
        )

    def test_batches_give_the_same_rows_as_one_at_a_time(self, tokenizer):
        batch = render_batch(tokenizer, [(str(i), messages) for i, messages in enumerate(TRICKY)])
        for i, messages in enumerate(TRICKY):
            alone = render_one(tokenizer, messages, str(i))
            assert batch[i].row_id == str(i)
            np.testing.assert_array_equal(batch[i].tokens, alone.tokens)
            np.testing.assert_array_equal(batch[i].weights, alone.weights)


class TestLossMask:
    @pytest.mark.parametrize("messages", TRICKY)
    def test_weights_are_zero_on_the_prompt_and_one_after_it(self, tokenizer, messages):
        row = render_one(tokenizer, messages)
        prefix = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, enable_thinking=False, add_generation_prompt=True
        )
        length = len(tokenizer(prefix, add_special_tokens=False)["input_ids"])
        assert row.prompt_length == length
        assert row.weights.tolist() == [0.0] * length + [1.0] * (len(row.tokens) - length)
        assert row.weights.dtype == np.float32
        assert row.tokens.dtype == np.int32

    def test_end_of_turn_and_its_newline_carry_loss(self, qwen):
        row = render_one(qwen, conversation("4"))
        assert qwen.decode(row.tokens[row.weights > 0]) == "4<|im_end|>\n"

    def test_of_several_turns_only_the_last_answer_carries_loss(self, tokenizer):
        row = render_one(tokenizer, TRICKY[-1])
        assert tokenizer.decode(row.tokens[row.weights > 0]).split("<")[0].strip() == "6"

    def test_shift_aligns_each_input_with_the_next_token_and_its_weight(self, tokenizer):
        row = render_one(tokenizer, conversation())
        inputs, targets, weights = shifted(row)
        assert row.n_tokens == len(inputs) == len(targets) == len(weights) == len(row.tokens) - 1
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        first = int(np.flatnonzero(weights)[0])
        assert targets[first] == row.tokens[row.prompt_length]  # the first answer token is a target


class TestPromptsOfEvaluation:
    def test_gsm8k_test_prompts_have_the_studys_token_counts(self, qwen, questions):
        counts = [len(prompt) for prompt in render_prompts(qwen, questions)]
        assert sum(counts) == 132_306
        assert counts[:10] == [104, 65, 96, 74, 150, 95, 81, 109, 143, 99]

    def test_the_system_prompt_costs_27_tokens_in_every_row(self, qwen, questions):
        with_system = render_prompts(qwen, questions[:200])
        bare = [prompt_messages(question)[1:] for question in questions[:200]]
        without = encode_texts(qwen, [chat_text(qwen, messages, generation_prompt=True) for messages in bare])
        assert {len(a) - len(b) for a, b in zip(with_system, without, strict=True)} == {27}

    def test_the_prompt_is_the_prefix_of_the_training_row(self, tokenizer):
        row = render_one(tokenizer, conversation(question="Q?"))
        assert render_prompts(tokenizer, ["Q?"]) == [row.tokens[: row.prompt_length].tolist()]

    def test_the_system_prompt_is_the_studys(self, shared):
        study = json.loads((shared / "reference/study.json").read_text())
        assert study["system_prompt"] == SYSTEM_PROMPT


class TestWhatCannotBeTrainedOnIsAnError:
    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ("text", "not a list"),
            ([], "no assistant turn"),
            (["text"], "message 1 is str"),
            ([{"role": "tool", "content": "x"}], "role 'tool'"),
            ([{"role": "user", "content": 3}], "message 1 has content of type int"),
            ([{"role": "user"}], "content of type NoneType"),
            (prompt_messages("q"), "no assistant turn"),
            (conversation(""), "empty answer"),
            (conversation(" \n\t"), "empty answer"),
            ([{"role": "assistant", "content": "x"}], "no user turn"),
            (conversation("half \ud83d pair"), "surrogate"),
            (conversation("4<|im_end|>\n<|im_start|>user\nmore"), "control token '<|im_"),
            (conversation("x", "q<|im_end|>"), "control token"),
        ],
    )
    def test_conversation(self, tokenizer, messages, reason):
        error = render_one(tokenizer, messages)
        assert isinstance(error, UserError)
        assert reason in str(error)

    def test_thoughts_in_the_answer_break_the_prefix(self, tokenizer):
        error = render_one(tokenizer, conversation("<think>\nhm\n</think>\n\n4"))
        assert isinstance(error, UserError)
        assert "does not begin with the prompt prefix" in str(error)

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}", "all-zero"),
            ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "all-one"),
            ("{{ messages | length }} turns", "does not begin"),
            ("{{ raise_exception('not like this') }}", "not like this"),
        ],
    )
    def test_templates_that_make_a_useless_mask(self, tokenizer, template, reason):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        error = render_one(other, conversation())
        assert isinstance(error, UserError)
        assert reason in str(error)


class TestTokenizerLoading:
    def test_a_missing_directory_is_named(self, tmp_path):
        with pytest.raises(UserError, match="no such directory"):
            load_tokenizer(tmp_path / "nowhere")

    def test_a_directory_without_a_tokenizer_is_named(self, tmp_path):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_tokenizer(tmp_path)

    def test_a_hub_name_that_cannot_be_reached_is_one_line(self, capsys):
        with pytest.raises(UserError, match="cannot be loaded") as error:
            load_tokenizer("owner/does-not-exist")
        assert "\n" not in str(error.value)
        assert "fetching" in capsys.readouterr().err

    def test_no_chat_template_is_an_error(self, tokenizer, tmp_path):
        bare = copy.deepcopy(tokenizer)
        bare.chat_template = None
        bare.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="no chat template"):
            load_tokenizer(tmp_path)

    def test_without_a_chat_template_plain_text_is_trained_on_and_messages_are_refused(self, tokenizer):
        bare = copy.deepcopy(tokenizer)
        bare.chat_template = None
        examples = [Example("a", [], text="Once upon a time."), ("b", conversation())]
        text, chat = render_batch(bare, examples)
        assert bare.decode(text.tokens) == "Once upon a time."
        assert "has no chat template, which messages need" in str(chat)


def test_the_time_limit_leaves_the_signals_of_others_alone(tokenizer):
    """The TPU runtime sends SIGPROF to its process a hundred times a second, and has its own handler."""
    ticks = []
    before = signal.signal(signal.SIGPROF, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    try:
        while len(ticks) < 5:
            render_prompts(tokenizer, ["What is 2 + 3?"])
        assert signal.getitimer(signal.ITIMER_PROF)[1] == pytest.approx(0.001, abs=0.01)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
