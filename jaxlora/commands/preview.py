"""Show rows as the model will see them: format, loss mask, control tokens and token counts.

    jaxlora preview --config tiny
    jaxlora preview --config main --rows 3 --config.data.train_path=rendered/train.jsonl

Grey: no loss. Green, or between ⟦ and ⟧ without colour: text that carries loss, including its end-of-turn
token and newline. Characters that a terminal would act on are shown as escapes.
"""

from __future__ import annotations

import argparse
import itertools
import re

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jaxlora.cli import parse_config
from jaxlora.data.render import RenderedRow, Tokenizer, load_tokenizer
from jaxlora.data.rows import RowOptions, load_rendered_rows
from jaxlora.runtime.errors import UserError

MASKED, LEARNED, CONTROL = "grey62", "green", "bold magenta"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default 3)")
    parser.add_argument(
        "--validation", action="store_true", help="show validation rows instead of training rows"
    )
    config, options = parse_config(parser)
    if options.rows < 1:
        raise UserError(f"--rows is {options.rows}; it must be at least 1")
    data = config.data
    path = data.validation_path if options.validation else data.train_path
    if path is None:
        raise UserError("config.data.validation_path: none is given; leave out --validation")
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, chat=False)
    rows, report = load_rendered_rows(
        path,
        tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        limit=options.rows,
        options=RowOptions.of(data),
    )
    console = Console(highlight=False)
    marks = ("⟦", "⟧") if console.no_color or console.color_system is None else ("", "")
    for row in rows:
        console.print(f"[bold]row {escape(printable(row.row_id))}[/bold]: {describe_counts(row)}")
        console.print(coloured(row, tokenizer, marks), soft_wrap=True)
    answer = "answer: loss".join(marks)
    legend = Text.assemble(
        ("prompt: no loss", MASKED), "  ", (answer, LEARNED), "  ", ("control token", CONTROL)
    )
    console.print(legend)
    console.print(printable(report.describe()), markup=False)


def describe_counts(row: RenderedRow) -> str:
    """Token counts of a row, the shifted count last."""
    prompt = row.prompt_length
    answer = len(row.tokens) - prompt
    return f"{prompt} prompt + {answer} answer tokens; {row.n_tokens} after the shift by one"


def coloured(row: RenderedRow, tokenizer: Tokenizer, marks: tuple[str, str] = ("", "")) -> Text:
    """The row's text with its loss mask as colour, between `marks` where it carries loss; newlines as ↵."""
    control = [*tokenizer.all_special_tokens, "\n"]
    splitter = re.compile("(" + "|".join(map(re.escape, control)) + ")")
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(row.weights)) + 1), len(row.tokens)]
    for start, end in itertools.pairwise(edges):
        learned = row.weights[start] > 0
        style = LEARNED if learned else MASKED
        text.append(marks[0] if learned else "", style=style)
        shown = str(tokenizer.decode(row.tokens[start:end], clean_up_tokenization_spaces=False))
        for piece in splitter.split(shown):
            if piece == "\n":
                text.append("↵\n", style=style)
            else:
                text.append(printable(piece), style=CONTROL if piece in control else style)
        text.append(marks[1] if learned else "", style=style)
    return text


def printable(text: str) -> str:
    """The text with escapes for characters that would be acted on, not printed, such as terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
