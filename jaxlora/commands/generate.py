"""Answer a file of prompts with a run's selected weights, an adapter on its base, or an untouched base.

    jaxlora generate PROMPTS --out ANSWERS.jsonl --run results/tiny-all_layer-seed-0
    jaxlora generate PROMPTS --out ANSWERS.jsonl --base --model Qwen/Qwen3-8B --temperature 0

PROMPTS is JSONL, a JSON list, CSV or Parquet, plain, .gz or .zst. Each row has `prompt` or `question`, a text
that becomes a user turn, or `messages`, which end with one. A base without a chat template continues the
unchanged text. An answer is a row with `prompt` (as given), `text`, `tokens`, `stop_reason` (stop or length),
`logprob` (summed over the tokens, under the distribution that they were drawn from) and the row's `id` or
`row_id`. The same seed gives the same answers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.cli import HelpFormatter
from jaxlora.commands import subject
from jaxlora.runtime.errors import UserError, add_number

if TYPE_CHECKING:
    from jaxlora.engine import Sample, Trainer

KEYS = ("prompt", "question", "messages")
NAMES = ("id", "row_id")  # fields of a row copied to its answer
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("prompts", metavar="PROMPTS", help="JSONL, a JSON list, CSV or Parquet, or hf://...")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="ANSWERS.jsonl", help="new file for the answers"
    )
    subject.add_options(parser)
    add_number(parser, "--batch", default=64, metavar="N", help="answers decoded at once [%(default)s]")
    options = parser.parse_args()
    subject.check(options)
    _check_free(options.out)
    rows = read_prompts(options.prompts)

    from jaxlora.runtime.files import write_jsonl_atomic
    from jaxlora.runtime.folders import claimed, enough_room

    with claimed(options.out), enough_room(options.out):
        trainer = subject.open_subject(options)
        started = time.perf_counter()
        samples = answer(trainer, options.prompts, rows, options)
        seconds = time.perf_counter() - started
        _check_free(options.out)
        write_jsonl_atomic(options.out, map(record, (row for _, row in rows), samples))
    tokens = sum(len(sample.tokens) for sample in samples)
    print(
        f"{options.out}: {len(samples):,} answers, {tokens:,} tokens, {tokens / seconds:,.1f} tokens/s",
        file=sys.stderr,
    )
    return 0


def read_prompts(path: str) -> list[tuple[int, Row]]:
    """Read the rows with their line numbers.

    Raises:
      UserError: the file cannot be read, has no rows, or a row has no prompt.
    """
    from jaxlora.data.containers import is_text, read_rows, strings_of
    from jaxlora.data.sources import locate

    rows: list[tuple[int, Row]] = []
    for line, _, given in read_rows(locate(path)):
        if isinstance(given, ValueError):
            raise UserError(f"{path}:{line}: {given}")
        rows.append((line, given))
    if not rows:
        raise UserError(f"{path}: holds no rows; give one prompt per row")
    for line, row in rows:
        found = [key for key in KEYS if key in row]
        if len(found) != 1:
            has = ", ".join(map(repr, row)) or "nothing"
            raise UserError(f"{path}:{line}: give one of {', '.join(KEYS)}; the row has {has:.200}")
        if odd := [name for name in NAMES if type(row.get(name)) not in (str, int, type(None))]:
            raise UserError(f"{path}:{line}: {odd[0]} must be text or a whole number")
        if not all(map(is_text, strings_of([row.get(name) for name in (*found, *NAMES)]))):
            raise UserError(f"{path}:{line}: holds half a surrogate pair, which is not text")
        value, kind = row[found[0]], list if found == ["messages"] else str
        if not isinstance(value, kind) or not value:
            raise UserError(f"{path}:{line}: {found[0]} must be {'a list' if kind is list else 'text'}")
    return rows


def answer(
    trainer: Trainer, path: str, rows: list[tuple[int, Row]], options: argparse.Namespace
) -> list[Sample]:
    """Answers in the order of the rows, with progress on standard error.

    Raises:
      UserError: a row cannot be rendered or is too long; the message names its line.
    """
    from jaxlora.runtime.progress import progress_bar

    most = trainer.spec.config.max_position_embeddings - options.max_new_tokens
    prompts = []
    for line, row in rows:
        try:
            ids = encode(trainer, row, options)
        except UserError as error:
            raise UserError(f"{path}:{line}: {error}") from None
        if not 0 < len(ids) <= most:
            raise UserError(
                f"{path}:{line}: the prompt has {len(ids)} tokens, but with {options.max_new_tokens} new ones"
                f" the model accepts 1 to {most}; shorten it, or lower --max-new-tokens"
            )
        prompts.append(ids)
    with progress_bar("answering", len(prompts), "prompts") as advance:
        return trainer.sample(
            prompts,
            options.max_new_tokens,
            options.temperature,
            options.top_p,
            options.seed,
            slots=options.batch,
            progress=advance,
        )


def encode(trainer: Trainer, row: Row, options: argparse.Namespace) -> list[int]:
    """Token ids of a row's prompt.

    Raises:
      UserError: it contains a control token, or the template refuses it.
    """
    from jaxlora.data.control import guard_of
    from jaxlora.data.messages import check_text
    from jaxlora.data.render import encode_texts, render_chat

    tokenizer = trainer.engine.tokenizer
    text = row.get("prompt", row.get("question"))
    if text is not None and not tokenizer.chat_template:
        if options.system:
            raise UserError("this base has no chat template, so --system cannot be used")
        check_text(text, guard_of(tokenizer))
        return encode_texts(tokenizer, [text])[0]
    messages = row["messages"] if text is None else [{"role": "user", "content": text}]
    check_turns(messages)
    if options.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": options.system}, *messages]
    return render_chat(tokenizer, messages, enable_thinking=options.thinking)


def check_turns(messages: list[Any]) -> None:
    """Refuse malformed messages, and those that do not end with a user or tool turn."""
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"message {number}: give an object with role and content")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {number}: content must be text")
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"messages end with role {messages[-1]['role']!r:.40}; the last must be the user's")


def record(row: Row, sample: Sample) -> Row:
    """A row of the answers file."""
    names = {name: row[name] for name in NAMES if name in row}
    return names | {
        "prompt": next(row[key] for key in KEYS if key in row),
        "text": sample.text,
        "tokens": sample.tokens,
        "stop_reason": sample.stop_reason,
        "logprob": sum(sample.logprobs),
    }


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; give a new file")
