"""Show rendered rows as the model will see them: loss mask coloured, control tokens visible, tokens counted.

python tools/preview.py --config configs/tiny.py
python tools/preview.py --config configs/main.py --rows 3 --config.data.train_path=rendered/train.jsonl

Grey: the prompt, no loss. Green: the answer, which carries loss, with its end-of-turn token and newline.
"""

from __future__ import annotations

import argparse
import re

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jaxlora.cli import parse_config
from jaxlora.data.render import RenderedRow, Tokenizer, load_tokenizer
from jaxlora.data.rows import load_rendered_rows
from jaxlora.runtime.errors import UserError, run_main

MASKED, LEARNED, CONTROL = "grey62", "green", "bold magenta"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default 3)")
    parser.add_argument("--validation", action="store_true", help="show validation rows, not training rows")
    config, options = parse_config(parser)
    if options.rows < 1:
        raise UserError(f"--rows is {options.rows}; it must be at least 1")
    data = config.data
    path = data.validation_path if options.validation else data.train_path
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    rows, report = load_rendered_rows(
        path, tokenizer, max_length=data.max_length, on_bad_row=data.on_bad_row, limit=options.rows
    )
    console = Console(highlight=False)
    for row in rows:
        console.print(f"[bold]row {escape(row.row_id)}[/bold]: {describe_counts(row)}")
        console.print(coloured(row, tokenizer), soft_wrap=True)
    legend = Text.assemble(
        ("prompt: no loss", MASKED), "  ", ("answer: loss", LEARNED), "  ", ("control token", CONTROL)
    )
    console.print(legend)
    console.print(report.describe(), markup=False)


def describe_counts(row: RenderedRow) -> str:
    """Token counts of a row, the shifted one last."""
    prompt = row.prompt_length
    answer = len(row.tokens) - prompt
    return f"{prompt} prompt + {answer} answer tokens; {row.n_tokens} after the shift by one"


def coloured(row: RenderedRow, tokenizer: Tokenizer) -> Text:
    """The row's text with its mask as colour; every line end is shown as ↵."""
    control = [*tokenizer.all_special_tokens, "\n"]
    splitter = re.compile("(" + "|".join(map(re.escape, control)) + ")")
    text = Text()
    cut = row.prompt_length
    for tokens, style in ((row.tokens[:cut], MASKED), (row.tokens[cut:], LEARNED)):
        for piece in splitter.split(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)):
            if piece == "\n":
                text.append("↵\n", style=style)
            else:
                text.append(piece, style=CONTROL if piece in control else style)
    return text


if __name__ == "__main__":
    run_main(main)
