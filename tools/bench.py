"""Measure training, decoding and fused sweeps: real tokens a second, utilisation, compilations, memory.

    python tools/bench.py train  --model qwen3-8b --random-weights --condition all_layer --rows LENGTHS.json
    python tools/bench.py decode --model qwen3-8b --random-weights --lengths LENGTHS.json
    python tools/bench.py sweep  --members 2 3 --recompute none elementwise --rows LENGTHS.json --steps 12

Each has its own options: see `python tools/bench.py train --help`. Without a length file, built-in lengths
shaped like the study's are used. `--model` is a published Qwen3 name (the shape only; weights are random) or
a directory with config.json. Prints a table and one JSON line.

A rows file is JSON with "rows": [[prompt_tokens, total_tokens], ...]; a lengths file has "prompt_tokens" and
one or more lists named by --answers (default adapter_generated_tokens).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from jaxlora.config import Condition, Remat, RunConfig, from_dict
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.errors import UserError, add_number, run_main

CONDITIONS = get_args(Condition)
REMATS: dict[str, Remat] = {"none": False, "elementwise": "elementwise", "layers": True}


def main() -> int:
    options = parse()
    config = configuration(options)
    from jaxlora.runtime.devices import setup

    setup(config.results_dir, config.model.dtype)
    measure = {"train": run_train, "decode": run_decode, "sweep": run_sweep}[options.what]
    result = {"model": options.model, "condition": options.condition, "rank": options.rank}
    result |= measure(options, config, shape_of(config, options.num_layers))
    show(result)
    print(json.dumps(result))
    return 0


# --- The command line ---------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The options of one of the three benchmarks; each takes its own only."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    train = commands.add_parser("train", help="training steps, then a validation pass")
    decode = commands.add_parser("decode", help="decoding with forced answer lengths")
    sweep = commands.add_parser("sweep", help="groups of runs in one program, against lone runs")
    for command in (train, decode, sweep):
        _add_model_options(command)
    for command in (train, sweep):
        _add_step_options(command)

    train.add_argument("--condition", default="all_layer", choices=CONDITIONS)
    add_number(train, "--steps", help="only the first steps")
    train.add_argument("--no-validation", action="store_true", help="leave out the validation pass")

    decode.add_argument("--condition", default="all_layer", choices=CONDITIONS)
    decode.add_argument("--lengths", type=Path, help="JSON with prompt and answer lengths")
    decode.add_argument(
        "--answers", help="name of the answer lengths in --lengths [adapter_generated_tokens]"
    )
    add_number(decode, "--prompts", help="only the first prompts")
    add_number(decode, "--slots", default=384, help="rows decoded at once")
    decode.add_argument("--unmerged", action="store_true", help="decode with the adapter beside the weights")

    sweep.add_argument("--condition", default="all_layer", choices=[*CONDITIONS, "mix"])
    add_number(sweep, "--steps", default=24, help="only the first steps")
    add_number(sweep, "--members", nargs="+", default=[2], help="sizes of the groups to measure")
    sweep.add_argument(
        "--recompute",
        nargs="+",
        default=["none"],
        choices=list(REMATS),
        help="what the backward pass of a group computes again; each is measured",
    )
    options = parser.parse_args()
    if options.what == "decode" and options.answers and not options.lengths:
        raise UserError("--answers: names a list of a lengths file; give --lengths FILE as well")
    return options


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen3-8b", help="published name or directory with config.json")
    parser.add_argument("--random-weights", action="store_true", help="accepted for clarity: always random")
    add_number(parser, "--num-layers", help="fewer layers than the model has, for a quick look")
    add_number(parser, "--rank", default=8)
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "splash", "cudnn"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=Path, help="JSON with row lengths")
    add_number(parser, "--batch-rows", default=8, help="rows of a step")
    add_number(parser, "--buffer-sizes", default=6, help="buffer lengths, each compiled once")
    parser.add_argument("--layers", default="auto", choices=["auto", "scan", "unroll"])
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")


def configuration(options: argparse.Namespace) -> RunConfig:
    """The options as a checked configuration; what a benchmark has no option for is the default."""
    condition = "all_layer" if options.condition == "mix" else options.condition
    values: dict[str, Any] = {
        "model": {
            "path": options.model,
            "random_weights": True,
            "dtype": options.dtype,
            "attention": options.attention,
        },
        "lora": {"condition": condition, "rank": options.rank},
    }
    if options.what == "decode":
        values["eval"] = {"batch_rows": options.slots, "merge_adapter": not options.unmerged}
    else:
        values["model"] |= {"layers": options.layers, "remat": options.remat}
        values["train"] = {"batch_rows": options.batch_rows, "buffer_sizes": options.buffer_sizes}
    return from_dict(values)


def shape_of(config: RunConfig, num_layers: int | None) -> ModelConfig:
    """The model's shape, cut to so many layers."""
    from jaxlora.train.job import locate_model

    try:
        shape = locate_model(config, with_weights=False)[1]
    except UserError as error:
        raise UserError(str(error).replace("config.model.path", "--model")) from None
    if num_layers is None:
        return shape
    if num_layers > shape.num_hidden_layers:
        raise UserError(
            f"--num-layers: {num_layers}, but the model has {shape.num_hidden_layers}; give fewer"
        )
    return replace(shape, num_hidden_layers=num_layers)


# --- The three benchmarks -----------------------------------------------------------------------------------


def run_train(options: argparse.Namespace, config: RunConfig, shape: ModelConfig) -> dict[str, Any]:
    import jax

    from jaxlora.bench import bench_train
    from jaxlora.models.decoder import ModelSpec
    from jaxlora.runtime.devices import scan_layers

    lengths = read_rows(options.rows) if options.rows else default_rows()
    scan = scan_layers(config.model.layers, jax.default_backend())
    spec = ModelSpec(shape, config.lora, config.model.dtype, scan)
    return bench_train(config, spec, lengths, options.steps, not options.no_validation)


def run_decode(options: argparse.Namespace, config: RunConfig, shape: ModelConfig) -> dict[str, Any]:
    from jaxlora.bench import bench_decode
    from jaxlora.models.decoder import ModelSpec
    from jaxlora.runtime.devices import decode_backend

    name = options.answers or "adapter_generated_tokens"
    prompts, answers = read_answers(options.lengths, name) if options.lengths else default_answers()
    n = options.prompts or len(prompts)
    backend = decode_backend(options.dtype, options.attention)
    spec = ModelSpec(shape, config.lora, config.model.dtype, scan=False)
    return bench_decode(config, spec, prompts[:n], answers[:n], backend)


def run_sweep(options: argparse.Namespace, config: RunConfig, shape: ModelConfig) -> dict[str, Any]:
    from jaxlora.bench_sweep import Variant, bench_sweep

    lengths = read_rows(options.rows) if options.rows else default_rows()
    variants = [Variant(n, REMATS[name]) for n in options.members for name in options.recompute]
    return bench_sweep(config, shape, lengths, variants, options.steps, mix=options.condition == "mix")


# --- Lengths ------------------------------------------------------------------------------------------------


def default_rows(n: int = 512) -> list[tuple[int, int]]:
    """Prompt and total lengths shaped like the study's: mean 340 tokens a row, a long tail."""
    import numpy as np

    rng = np.random.default_rng(0)
    prompts = rng.integers(60, 150, n)
    answers = np.clip(rng.lognormal(5.25, 0.65, n), 30, 1500).astype(int)
    return [(int(p), int(p + a)) for p, a in zip(prompts, answers, strict=True)]


def default_answers(n: int = 1319) -> tuple[list[int], list[int]]:
    """Prompt and answer lengths shaped like GSM8K after fine-tuning."""
    import numpy as np

    rng = np.random.default_rng(1)
    return rng.integers(60, 180, n).tolist(), np.clip(rng.lognormal(5.0, 0.45, n), 20, 512).astype(
        int
    ).tolist()


def read_rows(path: Path) -> list[tuple[int, int]]:
    """Prompt and total lengths of a rows file.

    Raises:
      UserError: it cannot be read, or does not hold pairs of lengths.
    """
    rows = _list_of(path, "rows")
    for i, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 2 and all(map(_is_length, row)) and row[0] < row[1]):
            raise UserError(
                f"{path}: rows[{i}] is {row!r:.40}; give [prompt, total], in tokens, the prompt less"
            )
    return [(prompt, total) for prompt, total in rows]


def read_answers(path: Path, name: str) -> tuple[list[int], list[int]]:
    """Prompt lengths of a lengths file, and the answer lengths of this name.

    Raises:
      UserError: it cannot be read, has no such list, or they do not hold one length a prompt.
    """
    prompts, answers = _list_of(path, "prompt_tokens"), _list_of(path, name)
    for field, lengths in (("prompt_tokens", prompts), (name, answers)):
        for i, length in enumerate(lengths):
            if not _is_length(length):
                raise UserError(f"{path}: {field}[{i}] is {length!r:.40}; give a whole number > 0")
    if len(prompts) != len(answers):
        raise UserError(f"{path}: {len(prompts)} prompt_tokens, but {len(answers)} {name}; give one each")
    return prompts, answers


def _list_of(path: Path, name: str) -> list[Any]:
    from jaxlora.runtime.files import read_object

    values = read_object(path)
    if not isinstance(values.get(name), list) or not values[name]:
        raise UserError(f"{path}: holds no list {name!r}; it has {', '.join(values) or 'nothing'}")
    return values[name]


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 24  # as `data.max_length`; true is no length


def show(result: dict) -> None:
    """The result as a table on the terminal."""
    from rich.table import Table

    from jaxlora.runtime.progress import console

    table = Table(show_header=False, box=None)
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            continue  # the groups of a sweep, each shown when it was measured
        text = f"{value:,.4g}" if isinstance(value, float) and value < 1e4 else value
        table.add_row(name.replace("_", " "), f"{text:,.0f}" if isinstance(text, float) else str(text))
    console.print(table)


if __name__ == "__main__":
    run_main(main)
