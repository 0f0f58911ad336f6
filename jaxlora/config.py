"""The one typed configuration of a run, and its command line.

A configuration is a Python file whose `get_config()` returns a `RunConfig`; every field can be overridden:

    python launch/train.py --config configs/tiny.py --config.lora.rank=16 --config.seed=1

Types and allowed values are declared beside each field and checked by pydantic before anything else
happens; a mistake becomes one line that names the field, what was given and what is allowed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.redaction import holds_secret

# Strict about names and about infinities; lenient about "8" for 8, because overrides arrive as text.
_CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

_LARGEST = 2**31 - 1  # of a whole number: array sizes and positions are int32
Positive = Annotated[int, Field(gt=0, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Rank = Annotated[int, Field(gt=0, le=65_536)]
Epochs = Annotated[int, Field(gt=0, le=10_000)]
Length = Annotated[int, Field(gt=0, le=1 << 24)]  # of text in tokens
Axis = Annotated[int, Field(ge=-1, le=1 << 20)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Condition = Literal["attention_only", "mlp_only", "all_layer"]
Remat = bool | Literal["elementwise"]
_NOT_EMPTY = Field(min_length=1)


def _doc(text: str, default: Any) -> Any:
    return Field(default=default, description=text)


@dataclass(frozen=True, config=_CHECKED)
class ModelSource:
    """The frozen base and how it is computed."""

    path: str = _doc(
        "Hugging Face directory, local or gs://bucket/folder, Hub name, or embedded:base", "Qwen/Qwen3-8B"
    )
    tokenizer: str | None = _doc("tokenizer directory or Hub name; none: the model's own", None)
    random_weights: bool = _doc("draw random weights for config.json instead of loading any", False)
    dtype: Literal["bfloat16", "float32"] = _doc("dtype of the frozen base and of activations", "bfloat16")
    attention: Literal["auto", "xla", "splash", "cudnn"] = _doc("attention backend; auto: by device", "auto")
    layers: Literal["auto", "scan", "unroll"] = _doc(
        "one loop over stacked layers, or each layer in turn", "auto"
    )
    remat: Remat = _doc(
        "recompute activations in the backward pass: true, all (a third slower); elementwise, those that are"
        " no product and no attention (a third of the memory)",
        False,
    )


@dataclass(frozen=True, config=_CHECKED)
class LoraConfig:
    """Which projections get an adapter, and its size."""

    condition: Condition = _doc("adapter placement", "all_layer")
    rank: Rank = _doc("r, the inner dimension", 8)
    alpha: Rate = _doc("the update is scaled by alpha / rank", 32.0)
    output_head: bool = _doc("adapt the output head as well (needs an untied head)", False)


@dataclass(frozen=True, config=_CHECKED)
class OptimConfig:
    """Adam and its learning rate."""

    peak_lr: Rate = _doc("learning rate after warm-up", 3e-4)
    schedule: Literal["cosine", "constant"] = _doc("cosine: warm-up, then cosine to the minimum", "cosine")
    warmup_fraction: Fraction = _doc("share of all steps spent warming up", 0.03)
    min_lr_fraction: Fraction = _doc("final learning rate as a share of the peak", 0.1)
    b1: Decay = _doc("decay of the first moment", 0.9)
    b2: Decay = _doc("decay of the second moment", 0.95)
    eps: Rate = _doc("added outside the square root, after bias correction", 1e-12)


@dataclass(frozen=True, config=_CHECKED)
class DataConfig:
    """Rendered rows (`messages`), one JSON object a line."""

    train_path: str = _doc("rendered training rows: a file or hf://owner/name/path", "rendered/train.jsonl")
    validation_path: str = _doc("rendered validation rows", "rendered/val.jsonl")
    train_rows: Positive | None = _doc("use only the first rows; none: all", None)
    validation_rows: Positive | None = _doc("use only the first rows; none: all", None)
    max_length: Length = _doc("longest row in tokens; longer rows are bad rows", 4096)
    on_bad_row: Literal["error", "skip"] = _doc(
        "stop at a row that cannot be used, or count and skip", "error"
    )
    gate_report: str | None = _doc("contamination.json; none: beside the training rows", None)
    allow_ungated: bool = _doc("train although the data gates are missing, stale or failed", False)


@dataclass(frozen=True, config=_CHECKED)
class TrainConfig:
    """Steps, batches, validation and checkpoints."""

    batch_rows: Positive = _doc("rows of one optimizer step", 8)
    epochs: Epochs = _doc("passes over the rows, in file order", 2)
    layout: Literal["packed", "padded"] = _doc("rows end to end in one buffer, or one row a line", "packed")
    buffer_sizes: Positive = _doc("at most this many buffer lengths, each compiled once", 6)
    buffer_multiple: Length = _doc("buffer lengths are multiples of this many tokens", 128)
    max_buffer_tokens: Length = _doc("a step's rows are split over several buffers above this", 16384)
    validation_every: Positive = _doc("validate and checkpoint each this many steps, and at epoch ends", 1000)
    validation_merge: Count = _doc("skip such a step up to this many steps before an epoch's end", 250)
    validation_batch_rows: Positive = _doc("rows of one validation batch", 16)
    checkpoint_every: Positive | None = _doc(
        "also checkpoint each this many steps, without validation; none: only after validations", None
    )
    grace_seconds: Rate = _doc("after SIGTERM, the process saves and ends within this many seconds", 25.0)
    startup_check: bool = _doc("before step 1, check that the fresh adapter and the decoder agree", True)


@dataclass(frozen=True, config=_CHECKED)
class MeshConfig:
    """Axes of the device mesh; one of them may be -1: all that is left.

    Where none is given, the mesh is chosen for a TPU slice (`jaxlora.estimate.with_mesh`), and elsewhere
    fsdp takes all devices. Where only some are, the others are 1, and fsdp takes what is left.
    """

    data: Axis = _doc("copies of the base, each with its share of tokens; 0: chosen", 0)
    fsdp: Axis = _doc("the base's weights and the tokens are split over these; 0: chosen", 0)
    tensor: Axis = _doc("heads and hidden units are split over these; 0: chosen", 0)


@dataclass(frozen=True, config=_CHECKED)
class EvalConfig:
    """GSM8K by greedy decoding."""

    benchmark: str = _doc("GSM8K test rows: JSONL file or Hub dataset", "openai/gsm8k")
    problems: Positive | None = _doc("use only the first problems; none: all", None)
    max_new_tokens: Length = _doc("longest answer in tokens", 512)
    batch_rows: Positive = _doc("answers decoded at once", 256)
    merge_adapter: bool = _doc("fold the adapter into the weights before decoding", True)
    after_training: bool = _doc("evaluate the base and the selected adapter when training ends", False)


@dataclass(frozen=True, config=_CHECKED)
class SelectionConfig:
    """Short trials that choose a learning rate for each condition (`launch/study.py`)."""

    learning_rates: tuple[Rate, ...] = _doc("rates to try; none: optim.peak_lr for all", (1e-4, 3e-4, 1e-3))
    train_rows: Positive = _doc("first training rows of a trial, seen once at a constant rate", 512)
    validation_rows: Positive = _doc("first validation rows of a trial", 128)
    validation_every: Positive = _doc("validate each this many steps, and at the end", 32)
    seed: Count = _doc("seed of every trial", 7)


@dataclass(frozen=True, config=_CHECKED)
class SweepConfig:
    """The runs of a study: every combination of these (`launch/study.py`)."""

    conditions: Annotated[tuple[Condition, ...], _NOT_EMPTY] = _doc(
        "adapter placements", ("attention_only", "all_layer")
    )
    seeds: Annotated[tuple[Count, ...], _NOT_EMPTY] = _doc("seeds of every combination", (0, 1, 2))
    ranks: tuple[Rank, ...] = _doc("ranks to compare; none: lora.rank", ())
    learning_rates: tuple[Rate, ...] = _doc("rates to compare; none: the one that the trials choose", ())
    batch_rows: tuple[Positive, ...] = _doc("rows a step to compare; none: train.batch_rows", ())
    fused: Positive | None = _doc(
        "runs trained at once in one program; none: on TPUs as many as should be fastest, else one", None
    )


@dataclass(frozen=True, config=_CHECKED)
class RunConfig:
    """One training run: one condition, one seed. A study makes its runs from one of these."""

    prefix: str = _doc("run ids are <prefix>-<condition>-seed-<seed>", "qwen3-8b")
    name: str | None = _doc("the run id itself; none: <prefix>-<condition>-seed-<seed>", None)
    seed: Count = _doc("of the adapter's initialisation and, with model.random_weights, of the base", 0)
    results_dir: str = _doc("where run directories are made", "results")
    overwrite: bool = _doc("delete an existing run directory of this id first", False)
    price: Rate | None = _doc("dollars of one chip for one hour, for the report's cost", None)
    model: ModelSource = dataclasses.field(default_factory=ModelSource)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)

    @property
    def run_id(self) -> str:
        return self.name or f"{self.prefix}-{self.lora.condition}-seed-{self.seed}"

    @property
    def run_dir(self) -> Path:
        return Path(self.results_dir) / self.run_id


def check_study(config: RunConfig) -> None:
    """Refuse what a study would ignore, because its sweep decides it, or what its runs cannot share.

    Raises:
      UserError: names the field, and the one that a study takes.
    """
    if config.name is not None:
        raise UserError("config.name: a study names its runs itself; give --config.prefix")
    if config.model.random_weights:
        raise UserError("config.model.random_weights: the runs of a study share one base; give a real one")
    own, plain, sweep = config.lora.condition, RunConfig(), config.sweep
    for one, many, given, default, swept in (
        ("seed", "sweep.seeds", config.seed, plain.seed, sweep.seeds),
        ("lora.condition", "sweep.conditions", own, plain.lora.condition, sweep.conditions),
    ):
        if given != default and swept != (given,):
            raise UserError(
                f"config.{one}: {given} is of one run, and a study trains {many} ({_plain(swept)});"
                f" give --config.{many}={given}"
            )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for manifests and comparisons."""
    return TypeAdapter(RunConfig).dump_python(config, mode="json")


def from_dict(values: dict[str, Any]) -> RunConfig:
    """A checked configuration from nested plain values.

    Raises:
      UserError: an unknown field, a wrong type or an impossible value; one line.
    """
    try:
        config = TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    _check_combinations(config)
    return config


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> RunConfig:
    """Run `get_config()` of a Python file and apply overrides such as `{"lora.rank": "16"}`.

    Raises:
      UserError: the file is missing, has no `get_config`, or a value is not allowed.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config: no file {str(path)!r}; give a Python file such as configs/tiny.py")
    try:
        namespace = runpy.run_path(str(file))
    except ValidationError as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: cannot be run as Python: {type(error).__name__}: {error}") from None
    if not callable(namespace.get("get_config")):
        raise UserError(f"{path}: defines no get_config(); it must return a jaxlora.config.RunConfig")
    try:
        config = namespace["get_config"]()
    except ValidationError as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: get_config() failed: {type(error).__name__}: {error}") from None
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, not a RunConfig")
    values = to_dict(config)
    for name, text in (overrides or {}).items():
        _set(values, name, text)
    return from_dict(values)


def parse_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None):
    """Parse an entry point's own options together with `--config FILE` and `--config.FIELD=VALUE`.

    Returns `(config, options)`: a `RunConfig`, and argparse's namespace of the parser's own options.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "fields of the configuration, each settable as --config.FIELD=VALUE:\n" + field_table()
    parser.add_argument("--config", required=True, metavar="FILE", help="Python file with get_config()")
    options, rest = parser.parse_known_args(argv)
    overrides: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--config."):
            raise UserError(f"unknown option {word!r}; see --help")
        name, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
        overrides[name] = value
    return load_config(options.config, overrides), options


def field_table() -> str:
    """One line a field: name, allowed values, default and meaning; for `--help`."""
    lines = []
    for name, kind, default, text in _fields(RunConfig, ""):
        lines.append(f"  {name:<30} {text} [{_allowed(kind)}; default {_plain(default)}]")
    return "\n".join(lines)


def _fields(cls: type, prefix: str):
    hints = get_type_hints(cls, include_extras=True)
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(hints[name]):
            yield from _fields(hints[name], f"{prefix}{name}.")
        else:
            yield prefix + name, hints[name], info.default, info.description or ""


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _allowed(kind: Any) -> str:
    """What a field takes, in words: `whole number > 0`, `a | b`, `text or none`."""
    if kind is type(None):
        return "none"
    if get_origin(kind) is Annotated:
        base, *extras = get_args(kind)
        words = [_allowed(base)]
        for extra in extras:
            for rule in getattr(extra, "metadata", []):
                if getattr(rule, "min_length", 0):
                    words[0] = words[0].removesuffix(", or none")
                for symbol, attribute in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le")):
                    if getattr(rule, attribute, _LARGEST) != _LARGEST:
                        words.append(f"{symbol} {getattr(rule, attribute)}")
        return " ".join(words)
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{_allowed(get_args(kind)[0])}, several with commas, or none"
    if args := get_args(kind):
        return " or ".join(_allowed(a) for a in args)
    names = {int: "whole number", float: "number", bool: "true | false", str: "text"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _set(values: dict[str, Any], name: str, text: str) -> None:
    *groups, leaf = name.split(".")
    place = values
    for group in groups:
        inner = place.get(group)
        if not isinstance(inner, dict):
            raise UserError(f"config.{name}: unknown field; {_closest(name)}")
        place = inner
    if leaf not in place or isinstance(place[leaf], dict):
        raise UserError(f"config.{name}: unknown field; {_closest(name)}")
    none = text.lower() == "none"
    if isinstance(place[leaf], list):
        place[leaf] = [] if none else text.split(",")
    else:
        place[leaf] = None if none else text


def _closest(name: str) -> str:
    import difflib

    names = [field for field, *_ in _fields(RunConfig, "")]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "see --help for all fields"


def _one_line(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))
    kinds = {field: kind for field, kind, *_ in _fields(RunConfig, "")}
    # A group built on its own, as in LoraConfig(rank=0), names its fields without the group.
    groups = {
        kind.__name__: field for field, kind in get_type_hints(RunConfig).items() if isinstance(kind, type)
    }
    if error.title in groups and error.title != "RunConfig":
        name = f"{groups[error.title]}.{name}"
    while name not in kinds and "." in name and name.rpartition(".")[0] in kinds:
        name = name.rpartition(".")[0]  # the branch of a union, such as `train_rows.int`
    if name not in kinds:
        return f"config.{name}: unknown field; {_closest(name)}"
    given = json.dumps(problem["input"], default=str) if problem["input"] not in ([], ()) else "none"
    allowed = _allowed(kinds[name])
    if problem["type"] == "less_than_equal" and "<=" not in allowed:
        allowed += f", at most {_LARGEST}"
    return f"config.{name}: {given} is not allowed; give {allowed}"


_SWEPT = ("conditions", "seeds", "ranks", "learning_rates", "batch_rows")


def _check_texts(values: dict[str, Any], group: str = "config.") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _check_texts(value, f"{group}{name}.")
        elif isinstance(value, str):
            if not value or not value.isprintable() or len(value) > 1000:
                raise UserError(
                    f"{group}{name}: {value!r:.80} is not allowed; give up to 1000 printable characters"
                )
            if holds_secret(value):
                raise UserError(f"{group}{name}: holds a key or token; export it in the environment instead")


def _check_combinations(config: RunConfig) -> None:
    _check_texts(to_dict(config))
    for field, longest in (("prefix", 100), ("name", 200)):  # a run's name is the prefix and its settings
        given = getattr(config, field)
        if given is None:
            continue
        if any(c in given for c in "/\\") or given.startswith("."):
            raise UserError(f"config.{field}: {given!r} is not allowed; give a plain name without slashes")
        if len(given) > longest:
            raise UserError(f"config.{field}: {len(given)} characters are too many; give at most {longest}")
    if "://" in config.results_dir:
        raise UserError(
            f"config.results_dir: {config.results_dir!r} is not a folder; give a local or a mounted one"
            " (launch/tpu.sh copies results to a bucket)"
        )
    lists = {f"sweep.{name}": getattr(config.sweep, name) for name in _SWEPT}
    for field, values in (lists | {"selection.learning_rates": config.selection.learning_rates}).items():
        # As run ids write them: of a learning rate seven digits, so that 1e-3 and 0.00100000001 are one.
        if len({f"{value:e}" if isinstance(value, float) else value for value in values}) < len(values):
            raise UserError(
                f"config.{field}: {_plain(values)} names a value twice (run ids hold seven digits); give"
                " each once"
            )
    if [config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
        raise UserError(
            "config.mesh: more than one axis is -1; give sizes for all but one of data, fsdp, tensor"
        )
