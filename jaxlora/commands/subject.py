"""What `chat` and `generate` sample from: a run's selected weights, an adapter on its base, or a base.

add_options(parser)                          # --run | --adapter | --base, and sampling options
options = parser.parse_args()
check(options)
trainer = open_subject(options)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlora.cli import CONFIG_HELP, load_config
from jaxlora.config import ModelSource
from jaxlora.runtime.errors import UserError, add_number

if TYPE_CHECKING:
    from jaxlora.engine import Engine, Trainer


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the model and how it samples."""
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "--run", type=Path, metavar="DIR", help="a finished run; its base is found automatically"
    )
    who.add_argument("--adapter", metavar="DIR", help="a PEFT folder, or hf://OWNER/NAME[@REVISION]/PATH")
    who.add_argument("--base", action="store_true", help="the untouched base of --config or --model")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--config", metavar="FILE", help=f"use the base of a configuration: {CONFIG_HELP}")
    base.add_argument(
        "--model", metavar="PATH", help="the base: a directory, Hub name, gs:// path or embedded:base"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_number(
        parser,
        "--temperature",
        float,
        zero=True,
        default=0.7,
        help="sampling temperature; 0: greedy [%(default)s]",
    )
    add_number(
        parser,
        "--top-p",
        float,
        most=1,
        default=1.0,
        help="probability mass of the most likely tokens to sample from [%(default)s]",
    )
    add_number(parser, "--seed", zero=True, default=0, help="seed for sampling [%(default)s]")
    add_number(
        parser, "--max-new-tokens", default=512, metavar="N", help="tokens per answer, at most [%(default)s]"
    )
    parser.add_argument(
        "--thinking", action="store_true", help="let the model think, if its chat template supports it"
    )


def check(options: argparse.Namespace) -> None:
    """Refuse conflicting options before anything slow is imported.

    Raises:
      UserError: names them.
    """
    if options.base and not (options.config or options.model):
        raise UserError("--base: no model is named; give --model PATH, or --config FILE")
    if options.run is not None and not (options.run / "manifest.json").is_file():
        raise UserError(f"--run {options.run}: holds no manifest.json; give the directory of a finished run")


def open_subject(options: argparse.Namespace) -> Trainer:
    """Load the model that the options name, for sampling only.

    Raises:
      UserError: it does not exist, is not finished, or belongs to another base.
    """
    from jaxlora.runtime import hosts
    from jaxlora.runtime.devices import setup

    setup("results", "bfloat16")  # the engine sets the precision of float32 products
    if hosts.n_processes() > 1:
        raise UserError("chat and generate run on one host only; start them on a single-host machine")
    given = source_given(options)
    if options.run is not None:
        trainer = _open_run(options.run, given)
    elif options.adapter is not None:
        trainer = _open_adapter(options.adapter, given)
    else:
        assert given is not None, "checked"
        trainer = _engine(given).untrained()
    if not trainer.spec.full:
        _ = trainer.engine.frozen  # load now, not at the first question
    return trainer


def source_given(options: argparse.Namespace) -> ModelSource | None:
    """The base named by `--config` or `--model`; None if neither is given."""
    if options.config:
        return load_config(options.config).model
    return _source(options.model) if options.model else None


def _source(path: str) -> ModelSource:
    """A base in the dtype that suits this machine."""
    from jaxlora.engine import default_dtype

    return ModelSource(path=path, dtype=default_dtype())


def _engine(source: ModelSource) -> Engine:
    from jaxlora.checkpoints.base import find_base
    from jaxlora.engine import engine_of

    return engine_of(find_base(source))


def _open_run(run: Path, given: ModelSource | None) -> Trainer:
    """The selected weights of a run, on the run's own base or a copy of it elsewhere."""
    from jaxlora.checkpoints.export import load_selected
    from jaxlora.engine import engine_of

    selected = load_selected(run, given.path if given else None, with_weights=True)
    return engine_of(selected.base).open(run)


def _open_adapter(address: str, given: ModelSource | None) -> Trainer:
    """An adapter on the base that it names or on the given one, with its own tokenizer, if any."""
    from jaxlora.evals.subjects import adapter_folder, with_own_base_dtype, with_own_tokenizer

    folder = adapter_folder(address)
    source = given or _source(_named_base(folder))
    return _engine(with_own_base_dtype(with_own_tokenizer(source, folder), folder)).open(folder)


def _named_base(folder: Path) -> str:
    """The base named by an adapter."""
    from jaxlora.checkpoints.peft import SETTINGS
    from jaxlora.runtime.files import read_object

    if not (folder / SETTINGS).is_file():
        raise UserError(f"--adapter {folder}: holds no {SETTINGS}; give the folder of a PEFT adapter")
    name = read_object(folder / SETTINGS).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"--adapter {folder}: names no base; give it with --model")
    return name
