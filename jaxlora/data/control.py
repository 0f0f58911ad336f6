"""Find strings that would become control tokens; every string of a row is checked before rendering.

    guard = guard_of(tokenizer)
    guard.find("what does </think> mean?")                     # "</think>"
    guard.find("<think>hm</think>", special_only=True)         # None: an ordinary word of an answer

A tokenizer recognises its added tokens in any text, whoever wrote it. So a question that contains
`<|im_end|>` would end its turn, and one that contains `</think>` would end thoughts that were never begun.
The check uses the tokenizer's table of added tokens, because `all_special_tokens` lacks those not marked as
special, such as `<think>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken
from tokenizers import Tokenizer as Scanner
from tokenizers.models import WordLevel

from jaxlora.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

_ORDINARY = "\U0010ffff ordinary text"  # the scanner's token for everything that is not an added token
_BLANKS = " \t\r\n▁"  # some tokenizers add runs of these as tokens; they control nothing


@dataclass(frozen=True)
class Guard:
    """Finds the added tokens that a tokenizer would find in a text."""

    scanner: Scanner
    special: frozenset[str]
    longest_token: int  # the most characters that one token can stand for

    def find(self, text: str, special_only: bool = False) -> str | None:
        """The first control token in the text, as the tokenizer writes it, or None.

        The scanner is the `tokenizers` library's own automaton, loaded with the added tokens only. It finds
        exactly what the tokenizer finds, in time linear in the text, however many tokens there are.
        """
        with rust_panics("the tokenizer's normaliser fails on this text"):
            tokens = self.scanner.encode(text, add_special_tokens=False).tokens
        for token in tokens:
            if token != _ORDINARY and (token in self.special or not special_only):
                return token
        return None


@contextmanager
def rust_panics(what: str) -> Iterator[None]:
    """Turn a panic in the tokenizer's Rust code, a `BaseException` in Python, into a one-line error."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 offers no place to import this type from
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"{what}: it panics: {reason}; use another tokenizer") from None


_guards: WeakKeyDictionary[Any, Guard] = WeakKeyDictionary()


def guard_of(tokenizer: Tokenizer) -> Guard:
    """The guard of a tokenizer, built once."""
    guard = _guards.get(tokenizer)
    if guard is None:
        guard = _guards[tokenizer] = _make(tokenizer)
    return guard


def _make(tokenizer: Tokenizer) -> Guard:
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    for content in special - set(added):
        added[content] = AddedToken(content, normalized=False, special=True)
    scanner = Scanner(WordLevel({_ORDINARY: 0}, unk_token=_ORDINARY))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and any(token.normalized for token in added.values()):
        scanner.normalizer = backend.normalizer  # such tokens are matched in the normalised text
    scanner.add_tokens([token for content, token in added.items() if content.strip(_BLANKS)])
    longest = max(map(len, (*tokenizer.get_vocab(), *added)), default=1)
    return Guard(scanner, frozenset(special), longest)
