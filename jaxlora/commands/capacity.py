"""Estimate the rank that rows call for: a rule of thumb, from their bits and 2 bits per parameter.

    jaxlora capacity --rows rows.jsonl --model Qwen/Qwen3-0.6B
    jaxlora capacity --rows rows.jsonl --model llama-3.1-8b-folder --sample 0     # no weights are read

The information in the rows is at most the base's surprise: the sum of -log2 p over the tokens that carry
loss, measured on a sample of rows, or about 1 bit per token. An adapter was found to store about 2 bits per
parameter. Below the rank whose parameters hold all of it, an adapter may fall behind full fine-tuning on long
runs over such rows; learning what the rows have in common takes less. This does not measure what a task
needs: sweep ranks with `jaxlora study --config regret/rank`.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import TYPE_CHECKING

from jaxlora.cli import HelpFormatter
from jaxlora.runtime.errors import add_number

if TYPE_CHECKING:
    from jaxlora.data.render import RenderedRow

PLACEMENTS = ("all_layer", "mlp_only", "attention_only")
USUAL_BITS = 1.0  # per token that carries loss: 0.69 nats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--rows", required=True, metavar="FILE", help="training rows, in any supported format"
    )
    parser.add_argument("--model", required=True, help="Hub name, directory or embedded:base")
    add_number(
        parser, "--sample", zero=True, default=64, metavar="N",
        help="rows to measure the base on; 0: none, and no weights are read [%(default)s]",
    )  # fmt: skip
    add_number(
        parser, "--max-length", default=4096, metavar="N", help="skip rows longer than N tokens [%(default)s]"
    )
    options = parser.parse_args()

    import jaxlora
    from jaxlora.checkpoints.base import find_base
    from jaxlora.config import ModelSource
    from jaxlora.data.rows import load_rendered_rows
    from jaxlora.engine import default_dtype
    from jaxlora.runtime.devices import setup

    setup("results", default_dtype())
    base = find_base(ModelSource(path=options.model), with_weights=False)
    rows, report = load_rendered_rows(
        options.rows, base.tokenizer(chat=False), max_length=options.max_length, on_bad_row="skip"
    )
    print(report.describe())
    for reason, count in Counter(bad.reason for bad in report.skipped).most_common():
        print(f"skipped: {count:,} rows, {reason}")
    measured = None
    if options.sample:
        trainer = jaxlora.load(options.model).untrained()
        chosen = spread(rows, options.sample)
        measured = bits_a_token(chosen, trainer.logprobs(chosen))
        print(f"the base's surprise is {measured:.3f} bits per token that carries loss ({len(chosen)} rows)")
    for line in lines(rows, measured, base.config):
        print(line)
    return 0


def spread(rows: list[RenderedRow], count: int) -> list[RenderedRow]:
    """This many evenly spaced rows, as a file may be sorted."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else rows


def bits_a_token(rows, logprobs) -> float:
    """Mean -log2 p over the weighted tokens of these rows."""
    loss = sum(float(-(row.weights[1:] * found).sum()) for row, found in zip(rows, logprobs, strict=True))
    return loss / loss_tokens(rows) / math.log(2)


def loss_tokens(rows) -> float:
    """Number of weighted targets in the rows."""
    return sum(float(row.weights[1:].sum()) for row in rows)


def lines(rows, measured: float | None, model) -> list[str]:
    """The lines to print: the bits, and for each placement the rank that would hold them."""
    from jaxlora.config import LoraConfig
    from jaxlora.lora import count_trainable
    from jaxlora.models.decoder import ModelSpec
    from jaxlora.regret.capacity import rank_for

    tokens = loss_tokens(rows)
    bits = tokens * (USUAL_BITS if measured is None else measured)
    how = f"{USUAL_BITS:g} bit each, a usual value" if measured is None else f"{measured:.3f} bits each"
    found = [f"{tokens:,.0f} tokens carry loss, {how}: {bits / 1e6:.2f} Mbit"]
    for placement in PLACEMENTS:
        # With experts, the rank is a multiple of the experts per token, by which it is divided for each.
        step = (
            1 if model.experts is None or placement == "attention_only" else model.experts.num_experts_per_tok
        )
        held = count_trainable(ModelSpec(model, LoraConfig(targets=placement, rank=step)))
        steps = rank_for(bits, held)
        size = f"rank {step * steps:,} ({held * steps:,} parameters, 2 bits each)"
        found.append(f"{placement}: {size} would hold all of it")
    return [*found, "A rule of thumb, and an upper one: what rows have in common takes less."]
