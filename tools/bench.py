"""Measure training, decoding and fused sweeps: real tokens a second, utilisation, compilations, memory.

    python tools/bench.py train  --model qwen3-8b --random-weights --condition all_layer --rows LENGTHS.json
    python tools/bench.py decode --model qwen3-8b --random-weights --lengths LENGTHS.json
    python tools/bench.py sweep  --members 2 3 --recompute none elementwise --rows LENGTHS.json --steps 12

Without a length file, built-in lengths shaped like the study's are used. `--model` is a published Qwen3 name
(the shape only; weights are random) or a directory with config.json. Prints a table and one JSON line.

A rows file is JSON with "rows": [[prompt_tokens, total_tokens], ...]; a lengths file has "prompt_tokens" and
one or more lists named by --answers (default adapter_generated_tokens).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jaxlora.errors import UserError, run_main


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "decode", "sweep"])
    parser.add_argument("--model", default="qwen3-8b", help="published name or directory with config.json")
    parser.add_argument("--random-weights", action="store_true", help="accepted for clarity: always random")
    parser.add_argument("--num-layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument(
        "--condition", default="all_layer", choices=["attention_only", "mlp_only", "all_layer", "mix"]
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=Path, help="JSON with row lengths, for train")
    parser.add_argument("--lengths", type=Path, help="JSON with prompt and answer lengths, for decode")
    parser.add_argument("--answers", default="adapter_generated_tokens", help="name of the answer lengths")
    parser.add_argument("--prompts", type=int, help="only the first prompts, for decode")
    parser.add_argument("--steps", type=int, help="only the first steps, for train")
    parser.add_argument("--batch-rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--buffer-sizes", type=int, default=6, help="buffer lengths, each compiled once")
    parser.add_argument("--slots", type=int, default=384, help="rows decoded at once")
    parser.add_argument("--no-validation", action="store_true", help="leave out the validation pass of train")
    parser.add_argument("--unmerged", action="store_true", help="decode with the adapter beside the weights")
    parser.add_argument("--layers", default="auto", choices=["auto", "scan", "unroll"])
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "splash", "cudnn"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument(
        "--members", type=int, nargs="+", default=[2], help="sizes of the groups to measure, for sweep"
    )
    parser.add_argument(
        "--recompute",
        nargs="+",
        default=["none"],
        choices=["none", "elementwise", "layers"],
        help="what the backward pass of a group computes again, for sweep; each is measured",
    )
    options = parser.parse_args()
    mix = options.condition == "mix"
    if mix and options.what != "sweep":
        raise UserError("--condition: mix is for sweep only; give a placement")

    from jaxlora.config import EvalConfig, LoraConfig, ModelSource, RunConfig, TrainConfig

    config = RunConfig(
        model=ModelSource(
            path=options.model,
            random_weights=True,
            dtype=options.dtype,
            attention=options.attention,
            layers=options.layers,
            remat=options.remat,
        ),
        lora=LoraConfig(condition="all_layer" if mix else options.condition, rank=options.rank),
        train=TrainConfig(batch_rows=options.batch_rows, buffer_sizes=options.buffer_sizes),
        eval=EvalConfig(batch_rows=options.slots, merge_adapter=not options.unmerged),
    )
    from jaxlora.devices import scan_layers, setup

    setup(config)
    import dataclasses

    import jax

    from jaxlora.bench import bench_decode, bench_train
    from jaxlora.bench_sweep import Variant, bench_sweep
    from jaxlora.evals.run import decode_backend
    from jaxlora.models.qwen3 import ModelSpec
    from jaxlora.train.job import locate_model

    shape = locate_model(config, with_weights=False)[1]
    if options.num_layers:
        shape = dataclasses.replace(shape, num_hidden_layers=options.num_layers)
    lengths = [tuple(pair) for pair in _read(options.rows)["rows"]] if options.rows else default_rows()
    if options.what == "sweep":
        remats = {"none": False, "elementwise": "elementwise", "layers": True}
        variants = [Variant(n, remats[name]) for n in options.members for name in options.recompute]
        result = bench_sweep(config, shape, lengths, variants, options.steps or 24, mix=mix)
    elif options.what == "train":
        scan = scan_layers(config.model.layers, jax.default_backend())
        spec = ModelSpec(shape, config.lora, options.dtype, scan)
        result = bench_train(config, spec, lengths, options.steps, not options.no_validation)
    else:
        spec = ModelSpec(shape, config.lora, options.dtype, scan=False)
        prompts, answers = default_answers()
        if options.lengths:
            values = _read(options.lengths)
            if options.answers not in values:
                raise UserError(f"{options.lengths}: no {options.answers!r}; it has {', '.join(values)}")
            prompts, answers = values["prompt_tokens"], values[options.answers]
        n = options.prompts or len(prompts)
        backend = decode_backend(options.dtype) if options.attention == "auto" else options.attention
        result = bench_decode(config, spec, prompts[:n], answers[:n], backend)
    result = {"model": options.model, "condition": options.condition, "rank": options.rank} | result
    show(result)
    print(json.dumps(result))
    return 0


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


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def show(result: dict) -> None:
    """The result as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in result.items():
        text = f"{value:,.4g}" if isinstance(value, float) and value < 1e4 else value
        table.add_row(name.replace("_", " "), f"{text:,.0f}" if isinstance(text, float) else str(text))
    Console(file=sys.stderr).print(table)


if __name__ == "__main__":
    run_main(main)
