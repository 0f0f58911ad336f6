"""Benchmark training, decoding and learning from rewards: real tokens per second, utilisation, memory.

    jaxlora bench train  --model qwen3-8b --random-weights --condition all_layer --rows LENGTHS.json
    jaxlora bench decode --model qwen3-8b --random-weights --lengths LENGTHS.json
    jaxlora bench rl     --model qwen3-8b --random-weights --rank 1 --lengths LENGTHS.json
    jaxlora bench experts --model qwen3-30b-a3b --rank 32 --tokens 8192
    jaxlora bench scaling --model qwen3-8b --steps 16

Each has its own options: see `jaxlora bench train --help`. Without a file of lengths, built-in lengths
similar to the study's are used. `--model` is a published name (only its shape is used; weights are random) or
a directory with config.json. Fields of a configuration can also be given, such as --config.mesh.data=2.
Prints a table and one line of JSON.

A rows file is JSON with "rows": [[prompt_tokens, total_tokens], ...]; a lengths file has "prompt_tokens" and
one or more lists of answer lengths, one of which --answers selects (default: adapter_generated_tokens).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from jaxlora.cli import HelpFormatter, with_overrides
from jaxlora.config import BaseDtype, Condition, RunConfig, from_dict, to_dict
from jaxlora.models.spec import How, ModelConfig
from jaxlora.runtime.errors import UserError, add_number

CONDITIONS = get_args(Condition)


def main() -> int:
    options, overrides = parse()
    if options.what == "scaling":
        from jaxlora.commands.bench_scaling import run_scaling

        return run_scaling(options)
    config = configuration(options, overrides)
    from jaxlora.runtime.devices import setup

    setup(config.results_dir, config.model.dtype)
    runs = {"train": run_train, "decode": run_decode, "rl": run_rl, "experts": run_experts}
    measure = runs[options.what]
    result = {"model": options.model, "condition": config.condition, "rank": options.rank}
    result |= {"base_dtype": options.base_dtype or options.dtype}
    result |= measure(options, config, shape_of(config, options.num_layers))
    show(result)
    print(json.dumps(result))
    return 0


# --- The command line ---------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, dict[str, str]]:
    """The options of one benchmark, which accepts only its own, and fields of the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    train = commands.add_parser("train", help="time training steps, then a validation pass")
    decode = commands.add_parser("decode", help="time decoding of answers of given lengths")
    rl = commands.add_parser("rl", help="time sampling, grading and learning on answers of given lengths")
    experts = commands.add_parser("experts", help="time the experts of one layer with each implementation")
    scaling = commands.add_parser(
        "scaling", help="time training and decoding on 1, 2, 4, ... GPUs of this host"
    )
    for command in (train, decode, rl, experts, scaling):
        _add_model_options(command)
    for command in (train, experts):
        command.add_argument(
            "--products",
            default="auto",
            help=f"implementation of the experts: {', '.join(get_args(How))}; bench experts also takes all",
        )
    add_number(experts, "--tokens", default=8192, help="tokens routed to experts [%(default)s]")

    _add_step_options(train)
    add_number(train, "--steps", help="time only this many steps [a whole epoch]")
    train.add_argument("--no-validation", action="store_true", help="skip the validation pass")
    train.add_argument(
        "--cold",
        action="store_true",
        help="include the first steps, taken while programs compile, as in a run",
    )
    _add_decode_options(decode)
    add_number(scaling, "--steps", default=16, help="training steps per measurement [%(default)s]")
    add_number(scaling, "--buffer-sizes", default=2, help="number of buffer lengths, each compiled once")
    add_number(scaling, "--slots", default=384, help="rows decoded at once, per GPU [%(default)s]")
    add_number(scaling, "--prompts", help="decode only this many prompts per GPU [all]")
    scaling.add_argument("--only", help="comma-separated names of measurements [all]")
    scaling.add_argument("--out", type=Path, help="file to append each measurement's line of JSON to")

    _add_lengths(rl)
    add_number(rl, "--slots", default=384, help="rows decoded at once [%(default)s]")
    add_number(rl, "--prompts", default=64, help="prompts per batch [%(default)s]")
    add_number(rl, "--group", default=16, help="answers per prompt [%(default)s]")
    add_number(rl, "--steps", default=1, help="batches to time [%(default)s]")
    add_number(rl, "--buffer-tokens", default=4096, help="tokens the learner processes at once [%(default)s]")
    rl.add_argument(
        "--share-prompts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in learning, compute a prompt once per group rather than once per answer [per group]",
    )
    options, rest = parser.parse_known_args()
    if odd := [word for word in rest if not (word.startswith("--config.") and "=" in word)]:
        parser.error(f"unrecognized arguments: {' '.join(odd)}")  # a field is --config.FIELD=VALUE
    known = (*get_args(How), *(("all",) if options.what == "experts" else ()))
    if options.what in ("train", "experts") and options.products not in known:
        raise UserError(f"--products: {options.products!r:.80} is not known; give {', '.join(known)}")
    if options.what in ("decode", "rl") and options.answers and not options.lengths:
        raise UserError("--answers: names a list of a lengths file; give --lengths FILE as well")
    if options.what == "scaling" and rest:
        raise UserError(f"{rest[0]}: scaling sets the fields itself; use bench train or bench decode")
    return options, dict(word.removeprefix("--config.").split("=", 1) for word in rest)


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=Path, help="JSON file of prompt and answer lengths")
    parser.add_argument(
        "--answers", help="list of answer lengths in --lengths to use [adapter_generated_tokens]"
    )


def _add_decode_options(parser: argparse.ArgumentParser) -> None:
    _add_lengths(parser)
    add_number(parser, "--prompts", help="decode only this many prompts [all]")
    add_number(parser, "--repeat", default=1, help="repeat all prompts this many times [%(default)s]")
    add_number(
        parser, "--slots", default=384, help="rows decoded at once, per data-parallel device [%(default)s]"
    )
    parser.add_argument("--unmerged", action="store_true", help="decode without merging the adapter")
    parser.add_argument(
        "--correlation",
        type=_correlation,
        help="reorder the prompts so that log lengths of prompts and answers have this correlation [0.5, as"
        " in real data, for built-in lengths; those of a file keep their order]",
    )
    parser.add_argument(
        "--earlier",
        type=_correlation,
        help="order prompts by the answer lengths of a simulated earlier evaluation, whose logs have this"
        " correlation with these [no earlier evaluation]",
    )
    parser.add_argument(
        "--padded", action="store_true", help="process prompts as padded rows instead of packing them"
    )


def _correlation(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a correlation; give a number from 0 to 1")
    return value


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="qwen3-8b", help="published name, or directory with config.json [%(default)s]"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="has no effect: weights are always random"
    )
    add_number(parser, "--num-layers", help="use only the first layers of the model, for a quick look")
    parser.add_argument("--condition", default="all_layer", choices=CONDITIONS)
    add_number(parser, "--rank", default=8)
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "splash", "cudnn"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--base-dtype", choices=get_args(BaseDtype), help="dtype of the frozen base [--dtype]"
    )
    parser.add_argument(
        "--base-products",
        default="auto",
        choices=["auto", "weights", "both"],
        help="see the field model.base_products",
    )


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=Path, help="JSON file of row lengths")
    add_number(parser, "--batch-rows", default=8, help="rows per step [%(default)s]")
    add_number(parser, "--buffer-sizes", default=6, help="number of buffer lengths, each compiled once")
    parser.add_argument("--layers", default="auto", choices=["auto", "scan", "unroll"])
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")
    add_number(
        parser,
        "--dropout",
        float,
        zero=True,
        default=0.0,
        help="dropout on the adapters' inputs [%(default)s]",
    )


def configuration(options: argparse.Namespace, overrides: dict[str, str]) -> RunConfig:
    """The options as a checked configuration; other fields have their defaults or are overridden."""
    values: dict[str, Any] = {
        "model": {
            "path": options.model,
            "random_weights": True,
            "dtype": options.dtype,
            "base_dtype": options.base_dtype,
            "base_products": options.base_products,
            "attention": options.attention,
        },
        "lora": {"targets": options.condition, "rank": options.rank},
    }
    if options.what == "rl":
        values["rl"] = {"prompts": options.prompts, "group": options.group, "slots": options.slots}
        values["rl"]["share_prompts"] = options.share_prompts
        values["train"] = {"max_buffer_tokens": options.buffer_tokens}
    elif options.what == "decode":
        values["eval"] = {"batch_rows": options.slots, "merge_adapter": not options.unmerged}
    elif options.what == "train":
        values["lora"]["dropout"] = options.dropout
        values["model"] |= {"layers": options.layers, "remat": options.remat}
        values["train"] = {"batch_rows": options.batch_rows, "buffer_sizes": options.buffer_sizes}
    return from_dict(with_overrides(to_dict(from_dict(values)), overrides))


def shape_of(config: RunConfig, num_layers: int | None) -> ModelConfig:
    """The model's shape, truncated to its first layers if `num_layers` is given.

    Raises:
      UserError: there is no such model, or it has fewer layers.
    """
    from jaxlora.checkpoints.base import find_base

    try:
        shape = find_base(config.model, with_weights=False).config
    except UserError as error:
        raise UserError(str(error).replace("config.model.path", "--model")) from None
    if num_layers is None:
        return shape
    if num_layers > shape.num_hidden_layers:
        raise UserError(
            f"--num-layers: {num_layers}, but the model has {shape.num_hidden_layers}; give fewer"
        )
    return replace(shape, num_hidden_layers=num_layers)


# --- The benchmarks -----------------------------------------------------------------------------------------


def run_train(options: argparse.Namespace, config: RunConfig, shape: ModelConfig) -> dict[str, Any]:
    from jaxlora.bench import bench_train

    lengths = read_rows(options.rows) if options.rows else default_rows()
    validation = not options.no_validation
    return bench_train(config, shape, lengths, options.steps, validation, options.products, options.cold)


def run_experts(options: argparse.Namespace, config: RunConfig, shape: ModelConfig) -> dict[str, Any]:
    from jaxlora.bench import bench_experts
    from jaxlora.models.grouped import resolve

    hows = [how for how in get_args(How) if how != "auto"]
    chosen = hows if options.products == "all" else [resolve(options.products)]
    return bench_experts(config, shape, options.tokens, chosen)


def run_decode(options: argparse.Namespace, config: RunConfig, shape: ModelConfig) -> dict[str, Any]:
    from jaxlora.bench import bench_decode

    name = options.answers or "adapter_generated_tokens"
    prompts, answers = read_answers(options.lengths, name) if options.lengths else default_answers()
    wanted = 0.5 if options.correlation is None and not options.lengths else options.correlation
    n = options.prompts or len(prompts)
    prompts, answers = prompts[:n] * options.repeat, answers[:n] * options.repeat
    if wanted is not None:
        prompts = correlated(prompts, answers, wanted)
    earlier = None if options.earlier is None else seen_earlier(answers, options.earlier)
    return bench_decode(config, shape, prompts, answers, earlier, options.padded)


def run_rl(options: argparse.Namespace, config: RunConfig, shape: ModelConfig) -> dict[str, Any]:
    from itertools import cycle, islice

    from jaxlora.rl.bench import bench_rl

    name = options.answers or "adapter_generated_tokens"
    prompts, answers = read_answers(options.lengths, name) if options.lengths else default_answers()
    prompts = list(islice(cycle(prompts), options.prompts))
    answers = list(islice(cycle(answers), options.prompts * options.group))
    return bench_rl(config, shape, prompts, answers, options.steps)


# --- Lengths ------------------------------------------------------------------------------------------------


def default_rows(n: int = 512) -> list[tuple[int, int]]:
    """Prompt and total lengths distributed like the study's: mean 340 tokens per row, a long tail."""
    import numpy as np

    rng = np.random.default_rng(0)
    prompts = rng.integers(60, 150, n)
    answers = np.clip(rng.lognormal(5.25, 0.65, n), 30, 1500).astype(int)
    return [(int(p), int(p + a)) for p, a in zip(prompts, answers, strict=True)]


def default_answers(n: int = 1319) -> tuple[list[int], list[int]]:
    """Prompt and answer lengths distributed like GSM8K's after fine-tuning."""
    import numpy as np

    rng = np.random.default_rng(1)
    prompts = rng.integers(60, 180, n)
    answers = np.clip(rng.lognormal(5.0, 0.45, n), 20, 512).astype(int)
    return prompts.tolist(), answers.tolist()


def correlated(prompts: list[int], answers: list[int], correlation: float) -> list[int]:
    """The prompt lengths reordered so that their logs have this correlation with those of the answers."""
    import numpy as np

    order = np.argsort(np.argsort(seen_earlier(answers, correlation, seed=3), kind="stable"), kind="stable")
    return np.sort(prompts)[order].tolist()


def seen_earlier(answers: list[int], correlation: float, seed: int = 2) -> list[float]:
    """Lengths whose logs have this correlation with those of the answers, like another model's answers."""
    import numpy as np

    logs = np.log(answers)
    noise = np.random.default_rng(seed).normal(logs.mean(), max(logs.std(), 1e-9), len(logs))
    mixed = correlation * (logs - logs.mean()) + (1 - correlation**2) ** 0.5 * (noise - logs.mean())
    return np.exp(logs.mean() + mixed).tolist()


def read_rows(path: Path) -> list[tuple[int, int]]:
    """Prompt and total lengths of a rows file.

    Raises:
      UserError: the file cannot be read, or does not hold pairs of lengths.
    """
    rows = _list_of(path, "rows")
    for i, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 2 and all(map(_is_length, row)) and row[0] < row[1]):
            raise UserError(
                f"{path}: rows[{i}] is {row!r:.40}; give [prompt, total] in tokens, with prompt < total"
            )
    return [(prompt, total) for prompt, total in rows]


def read_answers(path: Path, name: str) -> tuple[list[int], list[int]]:
    """The prompt lengths in a lengths file, and its list of answer lengths with this name.

    Raises:
      UserError: the file cannot be read, has no such list, or its lists differ in length.
    """
    prompts, answers = _list_of(path, "prompt_tokens"), _list_of(path, name)
    for field, lengths in (("prompt_tokens", prompts), (name, answers)):
        for i, length in enumerate(lengths):
            if not _is_length(length):
                raise UserError(f"{path}: {field}[{i}] is {length!r:.40}; give a whole number > 0")
    if len(prompts) != len(answers):
        raise UserError(
            f"{path}: {len(prompts)} prompt_tokens, but {len(answers)} {name}; give one per prompt"
        )
    return prompts, answers


def _list_of(path: Path, name: str) -> list[Any]:
    from jaxlora.runtime.files import read_object

    values = read_object(path)
    if not isinstance(values.get(name), list) or not values[name]:
        raise UserError(f"{path}: holds no list {name!r}; it has {', '.join(values) or 'nothing'}")
    return values[name]


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 24  # the limit of `data.max_length`; True is not a length


def show(result: dict) -> None:
    """Print the result as a table."""
    from rich.table import Table

    from jaxlora.runtime.progress import console

    table = Table(show_header=False, box=None)
    for name, value in result.items():
        text = f"{value:,.4g}" if isinstance(value, float) and value < 1e4 else value
        table.add_row(name.replace("_", " "), f"{text:,.0f}" if isinstance(text, float) else str(text))
    console.print(table)
