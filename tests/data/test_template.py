"""Promises of rendering with the templates of Llama 3, SmolLM2, Qwen2.5: one BOS, one date, exact masks."""

from __future__ import annotations

import copy
import datetime

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

from jaxlora.checkpoints.base import tokenizer_sha256
from jaxlora.data.messages import Example
from jaxlora.data.render import load_tokenizer, render_batch, render_chat, render_prompts
from jaxlora.runtime.errors import UserError

# Written for these tests, after the manner of the models that they are named for.
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
CHATML = """{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\\nDEFAULT<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
SMOLLM2 = CHATML.replace("DEFAULT", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QWEN2 = CHATML.replace("DEFAULT", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
TEMPLATES = {"Llama 3": LLAMA, "SmolLM2": SMOLLM2, "Qwen2.5": QWEN2}
BOS = "<|begin_of_text|>"
MESSAGES = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 4 more?"},
    {"role": "assistant", "content": "It is 9."},
]


def make(template: str):
    """A tokenizer with this template; Llama's begins every text with BOS by itself, and has no pad token."""
    tokenizer = load_tokenizer("embedded:base")
    tokenizer.chat_template = template
    if "eot_id" in template:
        names = [BOS, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"bos_token": BOS, "additional_special_tokens": names[1:]})
        tokenizer.eos_token, tokenizer.pad_token = "<|eot_id|>", None
        backend = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    else:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    return make(TEMPLATES[request.param])


def learnt(tokenizer, row) -> str:
    return tokenizer.decode(row.tokens[row.weights > 0])


def test_answers_carry_loss_with_each_template(tokenizer):
    end = "<|eot_id|>" if "eot_id" in tokenizer.chat_template else "<|im_end|>\n"
    for messages in (MESSAGES, [{"role": "system", "content": "Be brief."}, *MESSAGES]):
        (last,) = render_batch(tokenizer, [("a", copy.deepcopy(messages))])
        assert learnt(tokenizer, last) == f"It is 9.{end}"  # also where pad is the token that ends it
        (both,) = render_batch(tokenizer, [("a", copy.deepcopy(messages))], loss_on="all")
        assert learnt(tokenizer, both) == f"It is 5.{end}It is 9.{end}"
        assert np.array_equal(last.tokens, both.tokens)
        prompt = render_chat(tokenizer, messages[:-1])
        assert last.tokens[: len(prompt)].tolist() == prompt
        assert len(prompt) == last.prompt_length


WITHOUT_BOS = LLAMA.removeprefix("{{- bos_token }}\n")
MARKED = """{%- for m in messages %}{{ '<|start_header_id|>' + m.role }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"""


class TestBos:
    @pytest.mark.parametrize("template", [LLAMA, WITHOUT_BOS, MARKED], ids=["writes it", "not", "marks"])
    def test_there_is_one_and_it_is_first(self, template):
        tokenizer = make(template)
        plain = Example("plain", [], text="Once upon a time.")
        rows = render_batch(tokenizer, [("a", MESSAGES), plain])
        rows += render_batch(tokenizer, [("a", MESSAGES)], loss_on="all")
        found = [row.tokens.tolist() for row in rows]
        found += [render_chat(tokenizer, MESSAGES[:1]), *render_prompts(tokenizer, ["What is 2 + 3?"])]
        for tokens in found:
            assert tokens[0] == tokenizer.bos_token_id
            assert tokens.count(tokenizer.bos_token_id) == 1
        assert learnt(tokenizer, rows[2]) == "It is 5.<|eot_id|>It is 9.<|eot_id|>"

    def test_a_template_that_begins_with_two_is_refused(self):
        (row,) = render_batch(make("{{- bos_token }}" + LLAMA), [("a", MESSAGES)])
        assert isinstance(row, UserError)
        assert f"begins with two {BOS}" in str(row)

    def test_none_is_added_where_the_tokenizer_begins_without(self):
        for template in (SMOLLM2, QWEN2):
            tokenizer = make(template)
            text = tokenizer.decode(render_chat(tokenizer, MESSAGES[:1]))
            assert text.startswith("<|im_start|>system\nYou are")


class TestDate:
    @pytest.mark.parametrize("template", [LLAMA, "{{ strftime_now('%d %b %Y') }}" + WITHOUT_BOS])
    def test_it_is_fixed_whatever_day_it_is(self, template, monkeypatch):
        tokenizer = make(template)

        class Later(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 1, 2)

        monkeypatch.setattr(chat_template_utils, "datetime", Later)
        assert "02 Jan 2031" in tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        text = tokenizer.decode(render_chat(tokenizer, MESSAGES[:1]))
        assert "26 Jul 2024" in text
        assert "2031" not in text

    def test_it_is_part_of_the_renderings_identity(self, monkeypatch):
        from jaxlora.data import template as module

        names = dict.fromkeys(TEMPLATES)
        for name in names:
            names[name] = tokenizer_sha256(make(TEMPLATES[name]))
        monkeypatch.setattr(module, "DATE", datetime.datetime(2025, 1, 1))
        changed = [name for name in names if tokenizer_sha256(make(TEMPLATES[name])) != names[name]]
        assert changed == ["Llama 3"]

    def test_the_identity_of_other_renderings_is_what_it_was(self, repository):
        """Runs recorded it."""
        assert (
            tokenizer_sha256("embedded:base")
            == "67c8a50a5f925bca4347ee29c920c884ed810c7f8c95a20e4edd9ed9f9242792"
        )
