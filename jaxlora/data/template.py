"""The variables that a chat template receives besides the messages, and the token that begins a text.

    template = dated(tokenizer.get_chat_template())
    text = tokenizer.apply_chat_template(messages, None, template, tokenize=False, **variables(False))
    text = begun(tokenizer, text)

Llama 3's template writes today's date unless it is given one, so the same row would render to other tokens
tomorrow; here the date is fixed. Its tokenizer also begins every text with a BOS token, which the template
writes too; a rendered conversation has it exactly once, whatever the template does.
"""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jaxlora.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

DATE = datetime.datetime(2024, 7, 26)  # what Llama 3.1's template writes by default
_READS_DATE = re.compile(r"\b(date_string|strftime_now)\b")


def variables(enable_thinking: bool) -> dict[str, Any]:
    """The variables passed to every template; a template ignores those it does not know."""
    return {"enable_thinking": enable_thinking, "date_string": f"{DATE:%d %b %Y}"}


def dated(template: str) -> str:
    """The template with its own `strftime_now` that returns the fixed date, if it asks for today's.

    Transformers passes no functions to a template, so this is a macro in the template's own language.
    """
    if "strftime_now" not in template:
        return template
    codes = "".join(f" | replace('%{code}', '{DATE.strftime(f'%{code}')}')" for code in "aAbBdHIjmMpSyY")
    # The empty expression preserves the template's leading white space.
    return f"{{% macro strftime_now(form) %}}{{{{ form{codes} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def begun(tokenizer: Tokenizer, text: str) -> str:
    """A template's output with exactly one leading BOS, if the tokenizer begins its texts with one.

    Raises:
      UserError: the template begins with two.
    """
    bos = first_token(tokenizer)
    if bos is None:
        return text
    if text.startswith(bos + bos):
        raise UserError(f"the chat template begins with two {bos}; give one that writes it once")
    return text if text.startswith(bos) else bos + text


def facts(tokenizer: Tokenizer) -> dict[str, str]:
    """Whatever affects rendering besides the tokenizer's files; empty if nothing does."""
    found = {}
    if _READS_DATE.search(str(tokenizer.chat_template)):
        found["date"] = f"{DATE:%d %b %Y}"
    if (bos := first_token(tokenizer)) is not None:
        found["begins with"] = bos
    return found


_firsts: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def first_token(tokenizer: Tokenizer) -> str | None:
    """The BOS token, if the tokenizer begins every text with it, else None."""
    if tokenizer not in _firsts:
        ids = tokenizer("a")["input_ids"]
        begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        _firsts[tokenizer] = str(tokenizer.bos_token) if begins else None
    return _firsts[tokenizer]
