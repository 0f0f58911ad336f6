"""The tokenizer of the embedded base: trained with sentencepiece, stored as a Hugging Face tokenizer.

It uses byte-pair encoding with single digits and byte fallback for anything unknown, so that every text
survives a round trip. Nearly every word of the corpus is one token. Loading the Hugging Face files does not
require sentencepiece.

    >>> load_tokenizer("embedded:base").tokenize("Tom has 24 apples.")
    ['Tom', '▁has', '▁', '2', '4', '▁apples', '.']
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxlora.data.render import SYSTEM_PROMPT, Message
from jaxlora.embedded.corpus import pretraining_documents

VOCABULARY = 1024  # 256 bytes, 7 symbols, and room for the words of the corpus
DOCUMENTS = 20_000  # of the corpus, for training
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece represents a space by this character

# The Qwen3 chat template without tools. An assistant turn after the last question carries a think block,
# empty if there was no reasoning; earlier turns lose theirs.
CHAT_TEMPLATE = r"""
{%- set last = namespace(user=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set reasoning = '' %}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > last.user and (loop.last or reasoning) %}
            {%- set content = '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') %}
        {%- endif %}
    {%- elif message.role not in ['system', 'user'] %}
        {{- raise_exception('unknown role ' + message.role + ': use system, user or assistant') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
""".strip()


def _lines(documents: Iterable[str | list[Message]]) -> Iterator[str]:
    """The lines of all documents, with the study's system prompt and the role names added to each chat."""
    for document in documents:
        if isinstance(document, str):
            texts = [document]
        else:
            texts = [message["content"] for message in document]
            texts += [SYSTEM_PROMPT, "system", "user", "assistant"]
        for text in texts:
            yield from (line for line in text.split("\n") if line)


def train_sentencepiece() -> bytes:
    """Train byte-pair encoding with `VOCABULARY` pieces on the first documents of the corpus."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(pretraining_documents(seed=0, count=DOCUMENTS)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        user_defined_symbols=[*SPECIAL, *THINK, "\n"],
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def convert(model: bytes) -> Tokenizer:
    """The Hugging Face tokenizer with the same ids as a model from `train_sentencepiece`."""
    source = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {source.id_to_piece(i): i for i in range(source.get_piece_size())}
    # sentencepiece merges the pair that forms the piece with the best score, whichever way the piece is
    # split.
    ranked = sorted(ids, key=lambda piece: -source.get_score(ids[piece]))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex("[0-9]"), "isolated"),
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="never"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINK])
    return tokenizer


def tokenizer_files() -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` (with the chat template), trained from scratch."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": (convert(train_sentencepiece()).to_str(pretty=True) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
