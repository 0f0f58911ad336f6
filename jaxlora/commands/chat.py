"""Talk to a model: a run's selected weights, an adapter on its base, or an untouched base.

    jaxlora chat --run results/tiny-all_layer-seed-0
    jaxlora chat --adapter adapter --system "Answer in one sentence."
    jaxlora chat --base --model Qwen/Qwen3-8B --temperature 0

Each line is a turn; /reset clears the conversation, /quit or the end of the input ends it. With piped input
only the answers go to standard output, so `echo "What is 2 + 3?" | jaxlora chat ...` works in scripts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jaxlora.cli import HelpFormatter
from jaxlora.commands import subject
from jaxlora.runtime.errors import UserError, one_line
from jaxlora.runtime.text import harmless

if TYPE_CHECKING:
    from jaxlora.engine import Sample, Trainer

HELP = "/reset forgets the conversation, /quit ends it"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    subject.add_options(parser)
    options = parser.parse_args()
    subject.check(options)
    trainer = subject.open_subject(options)
    if not trainer.engine.tokenizer.chat_template:
        raise UserError("chat: this base has no chat template; `jaxlora generate` continues plain texts")
    chat = Chat(trainer, options)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        _say(f"{trainer.engine.base.source.path}; {HELP}")
    for line in _lines(on_terminal):
        try:
            if not chat.take(line.strip()):
                break
        except UserError as error:
            if not on_terminal:  # the following answers would belong to a different conversation
                raise
            _say(f"error: {one_line(error)}")
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            _say("\nstopped; this turn is discarded")
    return 0


class Chat:
    """The conversation so far, and the model that answers."""

    def __init__(self, trainer: Trainer, options: argparse.Namespace):
        self.trainer, self.options = trainer, options
        self.turns = 0  # never reset: each turn has its own seed
        self.reset()

    def reset(self) -> None:
        """Clear everything but the system prompt."""
        system = self.options.system
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> bool:
        """Obey or answer one line; returns whether the chat continues.

        Raises:
          UserError: the line contains a control token or an unknown command, or the conversation is full.
        """
        if line == "/quit":
            return False
        if line == "/reset":
            self.reset()
            _say("the conversation is forgotten")
        elif line.startswith("/") and line[1:].isalpha():
            raise UserError(f"{line}: no such command; {HELP}")
        elif line:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        from jaxlora.data.control import guard_of
        from jaxlora.data.messages import check_text

        tokenizer = self.trainer.engine.tokenizer
        check_text(line, guard_of(tokenizer))
        turn = {"role": "user", "content": line}
        ids, room = self._prompt([*self.messages, turn])
        started = time.perf_counter()
        sample = self._sample(ids, room)
        seconds = time.perf_counter() - started
        self.turns += 1
        reason = "" if sample.stop_reason == "stop" else "; cut off at --max-new-tokens"
        reason += "; including compilation" if self.turns == 1 else ""
        _say(f"[{len(sample.tokens)} tokens, {len(sample.tokens) / seconds:.1f} tokens/s{reason}]")
        text = str(tokenizer.decode(sample.tokens, skip_special_tokens=True))
        if guard_of(tokenizer).find(text, special_only=True):
            _say("the answer spells out a control token; this turn is discarded")
            return
        self.messages += [turn, {"role": "assistant", "content": text}]

    def _prompt(self, messages: list[dict[str, Any]]) -> tuple[list[int], int]:
        """The prompt's tokens, and the number of tokens left for the answer."""
        from jaxlora.data.render import render_chat

        ids = render_chat(self.trainer.engine.tokenizer, messages, enable_thinking=self.options.thinking)
        most = self.trainer.spec.config.max_position_embeddings
        if len(ids) >= most:
            raise UserError(f"the conversation has {len(ids)} of {most} tokens; /reset starts a new one")
        return ids, min(self.options.max_new_tokens, most - len(ids))

    def _sample(self, ids: list[int], room: int) -> Sample:
        """The answer, printed as it is decoded."""
        shown = ""

        def show(_: int, text: str) -> None:
            nonlocal shown
            if text.startswith(shown):  # the end of the text may still change with the next tokens
                print(harmless(text[len(shown) :]), end="", flush=True)
                shown = text

        options = self.options
        settings = {"temperature": options.temperature, "top_p": options.top_p, "stream": show}
        (sample,) = self.trainer.sample([ids], room, seed=options.seed + self.turns, **settings)
        show(0, sample.text)
        print(flush=True)
        return sample


def _lines(on_terminal: bool) -> Iterator[str]:
    """The lines of standard input, with line editing on a terminal."""
    if not on_terminal:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
        yield from sys.stdin
        return
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _say(text: str) -> None:
    """Print text that is not part of the model's answers."""
    print(harmless(text), file=sys.stderr, flush=True)
