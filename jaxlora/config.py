"""The schema of a run's configuration: every field with its type, default and meaning.

A configuration is a Python file whose `get_config()` returns a `RunConfig` (`jaxlora.cli` reads it and
applies `--config.FIELD=VALUE`). Types and allowed values are declared beside each field and checked by
pydantic before anything else happens. A mistake is reported in one line that names the field, the value given
and the values allowed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.text import holds_secret

# Strict about names and about infinities; lenient about "8" for 8, because overrides arrive as text.
_CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

_LARGEST = 2**31 - 1  # largest whole number: array sizes and positions are int32
Positive = Annotated[int, Field(gt=0, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Rank = Annotated[int, Field(gt=0, le=65_536)]
Epochs = Annotated[int, Field(gt=0, le=10_000)]
Length = Annotated[int, Field(gt=0, le=1 << 24)]  # of a text, in tokens
Axis = Annotated[int, Field(ge=-1, le=1 << 20)]
Rate = Annotated[float, Field(gt=0)]
Alpha = Annotated[float, Field(gt=0, le=1e30)]  # above it, float32 products overflow
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Condition = Literal["attention_only", "mlp_only", "all_layer"]  # the named placements


def _target_list(value: Any) -> Any:
    """Module names as one comma-separated string without spaces; also accepts a list or tuple of names."""
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        value = ",".join(value)
    return ",".join(name.strip() for name in value.split(",")) if isinstance(value, str) else value


_PLACEMENTS = "|".join(get_args(Condition))
_MODULE = r"[a-z][a-z0-9_]*_proj|lm_head"
Targets = Annotated[
    str,
    BeforeValidator(_target_list),
    Field(pattern=rf"^({_PLACEMENTS}|({_MODULE})(,({_MODULE}))*)$", max_length=500),
]
Remat = bool | Literal["elementwise"]
BaseDtype = Literal["bfloat16", "float8", "int8", "nf4"]
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
    base_dtype: BaseDtype | None = _doc(
        "dtype that the frozen base's projections are rounded to on loading; none: model.dtype", None
    )
    base_products: Literal["auto", "weights", "both"] = _doc(
        "with an 8-bit base: both operands of a product in 8 bits (both), or the weights dequantised to"
        " model.dtype first (weights); auto: by device",
        "auto",
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = _doc("attention backend; auto: by device", "auto")
    layers: Literal["auto", "scan", "unroll"] = _doc(
        "scan: one loop over stacked layers; unroll: each layer compiled separately", "auto"
    )
    remat: Remat = _doc(
        "recompute activations in the backward pass: true, all of them (a third slower); elementwise, all but"
        " the outputs of matrix products and attention (a third of the memory)",
        False,
    )


@dataclass(frozen=True, config=_CHECKED)
class LoraConfig:
    """Which projections get an adapter, and how large it is."""

    targets: Targets = _doc(
        "a named placement (attention_only, mlp_only, all_layer) or modules such as q_proj,v_proj",
        "all_layer",
    )
    rank: Rank = _doc("r, the inner dimension", 8)
    alpha: Alpha = _doc("the update is scaled by alpha / rank", 32.0)
    dropout: Decay = _doc("share of an adapter's input that is dropped in training, as in PEFT", 0.0)
    output_head: bool = _doc(
        "adapt the output head too; if it is tied, the embedding lookup is unaffected", False
    )
    start: str | None = _doc(
        "PEFT adapter to start from; its placement, rank and alpha apply; none: a fresh one", None
    )

    @property
    def modules(self) -> tuple[str, ...]:
        """The individually named modules; empty for a named placement."""
        return () if self.targets in get_args(Condition) else tuple(self.targets.split(","))

    @property
    def condition(self) -> str:
        """The placement as written in run names and records, such as `all_layer` or `q_proj+v_proj`."""
        return self.targets.replace(",", "+")


@dataclass(frozen=True, config=_CHECKED)
class OptimConfig:
    """Adam and its learning rate."""

    peak_lr: Rate = _doc("learning rate after warm-up", 3e-4)
    schedule: Literal["cosine", "linear", "constant"] = _doc(
        "after warm-up, cosine or linear decay to the minimum, or constant", "cosine"
    )
    warmup_fraction: Fraction = _doc("share of all steps spent warming up", 0.03)
    min_lr_fraction: Fraction = _doc("final learning rate as a share of the peak", 0.1)
    b1: Decay = _doc("decay of the first moment", 0.9)
    b2: Decay = _doc("decay of the second moment", 0.95)
    eps: Rate = _doc("added outside the square root, after bias correction", 1e-12)
    weight_decay: NotNegative = _doc("decoupled (AdamW), on all trained parameters; 0: none", 0.0)
    clip_norm: Rate | None = _doc("clip gradients to this global norm; none: no clipping", None)


@dataclass(frozen=True, config=_CHECKED)
class DataConfig:
    """Training and validation rows, in any of the known formats."""

    train_path: str = _doc("training rows: a file, hf://owner/name/path, or a Hub dataset", "train.jsonl")
    validation_path: str | None = _doc(
        "validation rows; none: data.validation_fraction of the training rows", None
    )
    validation_fraction: Share | None = _doc(
        "share of the training rows held out for validation; no prompt is in both parts", None
    )
    train_rows: Positive | None = _doc("use only the first rows; none: all", None)
    validation_rows: Positive | None = _doc("use only the first rows; none: all", None)
    split: str | None = _doc("split of a Hub dataset, such as train; none: paths are files", None)
    columns: tuple[str, ...] = _doc("the only columns to read, such as prompt=question", ())
    ignore_columns: tuple[str, ...] = _doc("columns to leave out", ())
    loss_on: Literal["last", "all"] = _doc("which assistant turns carry loss", "last")
    enable_thinking: bool = _doc("train on the reasoning of rows that have it", False)
    shuffle: bool = _doc("reshuffle in each epoch, by config.seed; false: file order", True)
    max_length: Length = _doc("longest row in tokens; longer rows are bad rows", 4096)
    cache: bool = _doc("cache the tokens of large files in ~/.cache/jaxlora/rows", True)
    on_bad_row: Literal["error", "skip"] = _doc("on an unusable row: stop, or skip and count it", "error")
    gate_report: str | None = _doc("contamination.json; none: beside the training rows", None)
    allow_ungated: bool = _doc("train even if the data gates are missing, stale or failed", False)


@dataclass(frozen=True, config=_CHECKED)
class TrainConfig:
    """What to train, steps, batches, validation and checkpoints."""

    what: Literal["lora", "full"] = _doc("adapters over a frozen base, or all weights", "lora")
    batch_rows: Positive = _doc("rows per optimizer step", 8)
    epochs: Epochs = _doc("passes over the rows", 2)
    max_steps: Positive | None = _doc("stop after this many optimizer steps; none: after all epochs", None)
    early_stopping: Positive | None = _doc(
        "stop after this many validations in a row without a lower NLL; none: never", None
    )
    layout: Literal["packed", "padded"] = _doc(
        "packed: rows end to end in one buffer; padded: one row per line", "packed"
    )
    buffer_sizes: Count = _doc(
        "at most this many buffer lengths, each compiled once; 0: 6, or on GPUs up to 16, depending on the"
        " length of the run",
        0,
    )
    buffer_multiple: Length = _doc("buffer lengths are multiples of this many tokens", 128)
    max_buffer_tokens: Length = _doc("above this, a step's rows are split over several buffers", 16384)
    validation_every: Positive = _doc(
        "validate and checkpoint every this many steps, and at epoch ends", 1000
    )
    validation_merge: Count = _doc("skip a validation within this many steps before an epoch's end", 250)
    validation_batch_rows: Positive = _doc("rows per validation batch", 16)
    checkpoint_every: Positive | None = _doc(
        "also checkpoint every this many steps, without validating; none: only after validations", None
    )
    grace_seconds: Rate = _doc("after SIGTERM, save and exit within this many seconds", 25.0)
    samples: Annotated[int, Field(ge=0, le=64)] = _doc(
        "at each validation, write answers to this many first prompts to samples.jsonl", 0
    )
    startup_check: bool = _doc("before step 1, check that the fresh adapter and the decoder agree", True)


@dataclass(frozen=True, config=_CHECKED)
class MeshConfig:
    """Axes of the device mesh; one of them may be -1: all remaining devices.

    If none is given, the mesh is chosen automatically on TPU slices and GPUs (`jaxlora.estimate.mesh_here`);
    on other devices fsdp takes all of them. If only some are given, the others are 1 and fsdp takes the rest.
    """

    data: Axis = _doc("replicas of the base, each with its share of the tokens; 0: chosen automatically", 0)
    fsdp: Axis = _doc("ways to split the base's weights and the tokens; 0: chosen automatically", 0)
    tensor: Axis = _doc("ways to split heads and hidden units; 0: chosen automatically", 0)
    expert: Axis = _doc("ways to split experts and tokens; 0: chosen automatically", 0)


@dataclass(frozen=True, config=_CHECKED)
class EvalConfig:
    """Evaluation by greedy decoding: a benchmark in GSM8K's form, or any questions with a scoring rule."""

    benchmark: str | None = _doc(
        "questions and answers: a JSONL file or openai/gsm8k; training data is then gated against it", None
    )
    rule: str | None = _doc(
        "scoring rule for any file: boxed, last_number, exact or regex:PATTERN; none: GSM8K's form and score",
        None,
    )
    system: str | None = _doc("system prompt; none: the study's, or with a rule no system prompt", None)
    columns: tuple[str, ...] = _doc("with a rule: column names, as in question=task,answer=target", ())
    problems: Positive | None = _doc("use only the first problems; none: all", None)
    max_new_tokens: Length = _doc("longest answer in tokens", 512)
    batch_rows: Positive = _doc("answers decoded at once", 256)
    merge_adapter: bool = _doc("merge the adapter into the weights before decoding", True)
    after_training: bool = _doc("evaluate the base and the selected adapter when training ends", False)


@dataclass(frozen=True, config=_CHECKED)
class SelectionConfig:
    """Short trials that select a learning rate for each condition (`launch/study.py`)."""

    learning_rates: tuple[Rate, ...] = _doc("rates to try; none: optim.peak_lr for all", (1e-4, 3e-4, 1e-3))
    train_rows: Positive = _doc("a trial trains once on this many first rows, at a constant rate", 512)
    validation_rows: Positive = _doc("a trial validates on this many first rows", 128)
    validation_every: Positive = _doc("validate every this many steps, and at the end", 32)
    seed: Count = _doc("seed of every trial", 7)


@dataclass(frozen=True, config=_CHECKED)
class SweepConfig:
    """The runs of a study: every combination of these (`launch/study.py`)."""

    conditions: Annotated[tuple[Condition, ...], _NOT_EMPTY] = _doc(
        "adapter placements", ("attention_only", "all_layer")
    )
    seeds: Annotated[tuple[Count, ...], _NOT_EMPTY] = _doc("seeds for every combination", (0, 1, 2))
    ranks: tuple[Rank, ...] = _doc("ranks to compare; none: lora.rank", ())
    learning_rates: tuple[Rate, ...] = _doc("rates to compare; none: the one selected by the trials", ())
    batch_rows: tuple[Positive, ...] = _doc("batch sizes in rows to compare; none: train.batch_rows", ())


GroupSize = Annotated[int, Field(ge=2, le=4096)]
Policy = Literal["importance_sampling", "ppo", "cispo", "dro"]  # as in jaxlora.train.objective


@dataclass(frozen=True, config=_CHECKED)
class RLConfig:
    """Reinforcement learning (`jaxlora rl`): problems, sampling, rewards, the objective."""

    problems: str = _doc("problems with answers: a file, or reasoning_gym:TASK", "embedded:data/train.jsonl")
    problem_rows: Positive | None = _doc("use only the first problems; none: all", None)
    eval_problems: str | None = _doc("held-out problems, answered greedily; none: no evaluation", None)
    eval_rows: Positive | None = _doc("use only the first held-out problems; none: all", None)
    system: str | None = _doc("system message; none: the row's; empty: no message", None)
    suffix: str | None = _doc("text after each question; none: nothing", None)
    reward: str = _doc("gsm8k_strict, gsm8k_numeric, math, ..., or module:function", "gsm8k_strict")
    format_weight: NotNegative = _doc("deducted from the reward of a malformed answer", 0.0)
    time_limit_s: Rate = _doc("time limit in seconds for grading one answer, which earns 0 beyond it", 1.0)
    steps: Positive = _doc("batches to sample and learn from", 100)
    prompts: Positive = _doc("prompts per batch", 32)
    group: GroupSize = _doc("answers per prompt; their mean reward is the baseline", 16)
    temperature: Rate = _doc("sampling temperature; also applied to the learner's log-probabilities", 1.0)
    top_p: Annotated[float, Field(gt=0, le=1)] = _doc(
        "must be 1: a filter would change only the sampler's distribution", 1.0
    )
    max_new_tokens: Length = _doc("longest answer in tokens, including its end token", 512)
    slots: Positive = _doc("answers decoded at once", 256)
    loss: Policy = _doc("the objective, summed over action tokens", "importance_sampling")
    clip_low: NotNegative = _doc("lower clip of the probability ratio, for ppo and cispo", 0.8)
    clip_high: Rate = _doc("upper clip of the probability ratio, for ppo and cispo", 1.2)
    beta: NotNegative = _doc("strength of the pull towards the sampler, for dro", 0.05)
    kl: NotNegative = _doc("weight of the KL divergence from the base; 0: none", 0.0)
    baseline: Literal["group", "leave_one_out"] = _doc(
        "what is subtracted from a reward: the mean of its group, or of the rest of its group", "group"
    )
    divide_by_std: bool = _doc("divide advantages by their group's standard deviation", False)
    divide_by_length: bool = _doc("divide advantages by the answer's length in tokens", False)
    mask_truncated: bool = _doc("leave out answers that were truncated at the token limit", False)
    share_prompts: bool = _doc(
        "on one device with train.layout=packed, the learner computes a prompt once for all its answers",
        True,
    )
    updates_per_batch: Positive = _doc("optimizer steps per batch, each on its part of the prompts", 1)
    refill: Count = _doc(
        "up to this many times per batch, replace groups of constant reward by other prompts", 0
    )
    overlap: bool = _doc("sample the next batch while learning from this one: one step off policy", False)
    eval_every: Positive = _doc("evaluate and checkpoint every this many batches, and at the end", 10)


@dataclass(frozen=True, config=_CHECKED)
class RegretConfig:
    """Conditions, including full fine-tuning, each swept over learning rates (`jaxlora.regret`).

    If `arms` names any, `launch/study.py` runs this instead of the study.
    """

    arms: tuple[str, ...] = _doc(
        "conditions: full, PLACEMENT:RANK such as all_layer:16 or mlp_only+lm_head:8, or"
        " PLACEMENT~OTHER:RANK, at the rank that gives as many parameters as OTHER at RANK; each may end in"
        " @ROWS to replace train.batch_rows",
        (),
    )
    marks: tuple[Positive, ...] = _doc(
        "steps, besides the last, at which the best rate is read and must lie inside the grid", ()
    )
    by: Literal["likelihood", "reward"] = _doc(
        "what the arms learn from: rows of data, or rewards (rl)", "likelihood"
    )
    rates: Positive = _doc("learning rates per arm, at factors of 2 around the published formula's", 5)
    factor: Annotated[float, Field(gt=1)] = _doc(
        "ratio of neighbouring rates; with by=likelihood always 2", 2.0
    )
    extend: Count = _doc("at most this many more rates, one by one, while the best lies on an edge", 4)
    repeats: Count = _doc("additional seeds for each arm at its best rate", 1)
    looks: Positive = _doc("held-out evaluations per doubling of the step", 2)
    lora_rate: Rate | None = _doc("middle of the grid of rates for adapters; none: the formula's", None)
    full_rate: Rate | None = _doc(
        "middle of the grid of rates for full fine-tuning; none: the formula's", None
    )


@dataclass(frozen=True, config=_CHECKED)
class RunConfig:
    """One training run: one placement, one seed. A study derives its runs from one such configuration."""

    prefix: str = _doc("run ids are <prefix>-<placement>-seed-<seed>", "qwen3-8b")
    name: str | None = _doc("the run id itself; none: <prefix>-<placement>-seed-<seed>", None)
    seed: Count = _doc("seed of the adapter's initialisation and, with model.random_weights, of the base", 0)
    results_dir: str = _doc("where run directories are created", "results")
    overwrite: bool = _doc("first delete an existing run directory with this id", False)
    tracking: Literal["wandb", "trackio"] | None = _doc(
        "also log the curves there (install the extra of that name)", None
    )
    price: Rate | None = _doc("dollars per chip-hour, for the report's cost", None)
    model: ModelSource = dataclasses.field(default_factory=ModelSource)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)
    rl: RLConfig = dataclasses.field(default_factory=RLConfig)
    regret: RegretConfig = dataclasses.field(default_factory=RegretConfig)

    @property
    def condition(self) -> str:
        """What is trained, as named in records: the adapter's placement, or `full`."""
        return "full" if self.train.what == "full" else self.lora.condition

    @property
    def benchmark(self) -> str:
        """The benchmark, for code that needs one.

        Raises:
          UserError: none is configured.
        """
        if self.eval.benchmark is None:
            raise UserError("config.eval.benchmark: none is named; give a JSONL file or openai/gsm8k")
        return self.eval.benchmark

    @property
    def validation_file(self) -> str:
        """The file of validation rows, for code that needs one; raises like `benchmark`."""
        if self.data.validation_path is None:
            raise UserError("config.data.validation_path: none is given; give a file of validation rows")
        return self.data.validation_path

    @property
    def run_id(self) -> str:
        return self.name or f"{self.prefix}-{self.condition}-seed-{self.seed}"

    @property
    def run_dir(self) -> Path:
        return Path(self.results_dir) / self.run_id


def check_study(config: RunConfig) -> None:
    """Refuse settings that a study would ignore because its sweep sets them, or that its runs cannot share.

    Raises:
      UserError: names the field, and the one that a study uses instead.
    """
    if config.name is not None:
        raise UserError("config.name is ignored by studies, which name their runs; set config.prefix")
    if config.model.random_weights:
        raise UserError("config.model.random_weights: the runs of a study share one base; give a real one")
    if config.train.what == "full":
        raise UserError("config.train.what: a study compares adapters; use launch/train.py for a full run")
    if config.lora.start is not None:
        raise UserError("config.lora.start: its placement would override every condition's; give none")
    if config.train.early_stopping is not None:
        raise UserError(
            "config.train.early_stopping: runs of a study all take the same number of steps; give none"
        )
    for field in ("rule", "system", "columns"):
        if getattr(config.eval, field):
            raise UserError(f"config.eval.{field}: a study is scored as GSM8K is; give none")
    _ = config.benchmark, config.validation_file  # a study needs both
    own, usual, sweep = config.lora.condition, RunConfig(), config.sweep
    for one, many, given, default, swept in (
        ("seed", "sweep.seeds", config.seed, usual.seed, sweep.seeds),
        ("lora.targets", "sweep.conditions", own, usual.lora.condition, sweep.conditions),
    ):
        if given != default and swept != (given,):
            raise UserError(
                f"config.{one} is ignored by studies; set config.{many} (now {plain(swept)}), as in"
                f" --config.{many}={given}"
            )


# Names of fields in earlier versions, whose runs and commands stay valid.
RENAMED = {"lora.condition": "lora.targets"}
_RETIRED = ("sweep.fused",)


def _with_todays_names(values: dict[str, Any]) -> dict[str, Any]:
    values = {name: dict(group) if isinstance(group, dict) else group for name, group in values.items()}
    for old, new in (*RENAMED.items(), *((name, None) for name in _RETIRED)):
        group, _, leaf = old.partition(".")
        if isinstance(values.get(group), dict) and leaf in values[group]:
            value = values[group].pop(leaf)
            if new is not None:
                values[group].setdefault(new.partition(".")[2], value)
    return values


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for manifests and comparisons."""
    return TypeAdapter(RunConfig).dump_python(config, mode="json")


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Build a checked configuration from nested plain values.

    Raises:
      UserError: an unknown field, a wrong type or an impossible value, in one line.
    """
    try:
        config = TypeAdapter(RunConfig).validate_python(_with_todays_names(values))
    except ValidationError as error:
        raise UserError(one_line(error)) from None
    _check_combinations(config)
    return config


def fields(cls: Any = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield the name, type, default and meaning of every field, in order."""
    hints = get_type_hints(cls, include_extras=True)
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(hints[name]):
            yield from fields(hints[name], f"{prefix}{name}.")
        else:
            yield prefix + name, hints[name], info.default, info.description or ""


def plain(value: Any) -> str:
    """A value as written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def allowed(kind: Any) -> str:
    """The allowed values of a field in words: `a whole number from 1 to 65,536`, `a | b`, `text or none`."""
    if kind is type(None):
        return "none"
    if get_origin(kind) is Annotated:
        base, *extras = get_args(kind)
        words, bounds = [allowed(base)], []
        for extra in extras:
            if isinstance(extra, BeforeValidator):  # only `Targets` has one
                return f"{allowed(Condition)}, or modules with commas, such as q_proj,v_proj"
            for rule in getattr(extra, "metadata", []):
                if getattr(rule, "min_length", 0):
                    words[0] = words[0].removesuffix(", or none")
                for attribute, word in _BOUNDS.items():
                    if (bound := getattr(rule, attribute, None)) is not None:
                        bounds.append((attribute, word, bound))
        if base is int:
            low, high = (bound + (attribute == "gt") for attribute, _, bound in bounds)
            return f"{words[0]} from {low:,} to {high:,}"
        return f"{words[0]} {' and '.join(f'{word} {bound:g}' for _, word, bound in bounds)}".strip()
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{allowed(get_args(kind)[0])}, several with commas, or none"
    if args := get_args(kind):
        return " or ".join(allowed(a) for a in args)
    names = {int: "a whole number", float: "a number", bool: "true | false", str: "text"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


# Names of our fields in TRL, Transformers, PEFT, Unsloth and Tinker.
_ELSEWHERE = {
    "optim.peak_lr": ("learning_rate", "lr", "lora_lr"),
    "optim.schedule": ("lr_scheduler_type", "lr_schedule", "lr_scheduler"),
    "optim.warmup_fraction": ("warmup_ratio", "warmup_steps", "warmup"),
    "optim.clip_norm": ("max_grad_norm", "grad_clip", "gradient_clipping"),
    "optim.weight_decay": ("weight_decay", "wd"),
    "optim.b2": ("adam_beta2", "beta2"),
    "optim.eps": ("adam_epsilon", "adam_eps", "epsilon"),
    "lora.rank": ("r", "lora_r", "lora_rank", "rank"),
    "lora.alpha": ("lora_alpha", "alpha"),
    "lora.dropout": ("lora_dropout", "dropout"),
    "lora.targets": ("target_modules", "lora_target", "targets"),
    "train.epochs": ("num_train_epochs", "num_epochs", "epochs"),
    "train.max_steps": ("max_steps", "num_steps"),
    "train.early_stopping": ("early_stopping_patience", "early_stopping", "patience"),
    "train.batch_rows": ("per_device_train_batch_size", "train_batch_size", "batch_size"),
    "train.max_buffer_tokens": ("gradient_accumulation_steps", "micro_batch_size"),
    "train.layout": ("packing", "sample_packing"),
    "train.validation_every": ("eval_steps", "eval_every"),
    "train.checkpoint_every": ("save_steps", "save_every"),
    "data.max_length": ("max_seq_length", "max_seq_len", "max_length", "cutoff_len"),
    "data.train_path": ("dataset", "dataset_name", "train_file", "data_path"),
    "data.loss_on": ("assistant_only_loss", "train_on", "completion_only_loss"),
    "model.path": ("model_name_or_path", "model_name", "model_id"),
    "model.dtype": ("bf16", "fp32", "torch_dtype", "dtype"),
    "model.remat": ("gradient_checkpointing", "activation_checkpointing"),
    "results_dir": ("output_dir", "log_path"),
    "tracking": ("report_to", "wandb_project"),
}


def closest(name: str) -> str:
    """A suggestion for an unknown field name."""
    import difflib

    last = name.rpartition(".")[2].lower()
    if known := [field for field, others in _ELSEWHERE.items() if last in others]:
        return f"did you mean {known[0]}?"
    names = [field for field, *_ in fields()]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "see --help for all fields"


def one_line(error: ValidationError) -> str:
    """A validation error as one line: the field, the value given, the values allowed."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))
    kinds = {field: kind for field, kind, *_ in fields()}
    # A group built on its own, as in LoraConfig(rank=0), reports its fields without the group's name.
    groups = {
        kind.__name__: field for field, kind in get_type_hints(RunConfig).items() if isinstance(kind, type)
    }
    if error.title in groups and error.title != "RunConfig":
        name = f"{groups[error.title]}.{name}"
    while name not in kinds and "." in name and name.rpartition(".")[0] in kinds:
        name = name.rpartition(".")[0]  # the branch of a union, such as `train_rows.int`
    if name not in kinds:
        return f"config.{name}: unknown field; {closest(name)}"
    given = json.dumps(problem["input"], default=str) if problem["input"] not in ([], ()) else "none"
    text = allowed(kinds[name])
    return f"config.{name}: {given} is not allowed; give {text}"


_SWEPT = ("conditions", "seeds", "ranks", "learning_rates", "batch_rows")


_PROMPTS = ("config.eval.system", "config.rl.system", "config.rl.suffix")


def _check_texts(values: dict[str, Any], group: str = "config.") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _check_texts(value, f"{group}{name}.")
        elif isinstance(value, str):
            most = 1000
            if f"{group}{name}" in _PROMPTS:  # may be long and span several lines
                value, most = value.replace("\n", " ").replace("\t", " "), 20_000
            if f"{group}{name}" == "config.rl.system" and not value:
                continue  # empty: no system message (none: the row's own)
            if not value or not value.isprintable() or len(value) > most:
                raise UserError(
                    f"{group}{name}: {value!r:.80} is not allowed; give up to {most} printable characters"
                )
            if holds_secret(value):
                raise UserError(f"{group}{name}: holds a key or token; export it in the environment instead")


def check_base_dtype(model: ModelSource) -> None:
    """Refuse combinations of dtypes that a base does not support.

    Raises:
      UserError: names the field and what to give instead.
    """
    if model.base_dtype == "bfloat16" and model.dtype != "bfloat16":
        raise UserError("config.model.base_dtype: bfloat16 needs model.dtype=bfloat16 as well")
    if model.base_dtype == "nf4" and model.base_products == "both":
        raise UserError("config.model.base_products: nf4 is dequantised for products; give weights or auto")
    if model.base_products != "auto" and model.base_dtype in (None, "bfloat16"):
        raise UserError("config.model.base_products: has no effect without model.base_dtype; give both")


def _check_columns(given: EvalConfig) -> None:
    for pair in given.columns:
        name, _, column = pair.partition("=")
        if name not in ("question", "answer") or not column:
            raise UserError(
                f"config.eval.columns: {pair!r} is not a pair; give question=COLUMN,answer=COLUMN"
            )
    if given.columns and given.rule is None:
        raise UserError("config.eval.columns: needs eval.rule; give one, such as last_number")


def _check_combinations(config: RunConfig) -> None:
    _check_texts(to_dict(config))
    check_base_dtype(config.model)
    if config.model.base_dtype not in (None, "bfloat16") and config.train.what == "full":
        raise UserError(
            "config.model.base_dtype: with train.what=full all weights are trained, in float32; give none"
        )
    data = config.data
    if data.validation_path is not None and data.validation_fraction is not None:
        raise UserError(
            "config.data.validation_fraction: data.validation_path is also given; give only one (the"
            " other as none)"
        )
    if config.lora.dropout and config.train.what == "full":
        raise UserError("config.lora.dropout: with train.what=full no adapter is trained; give 0")
    if config.lora.dropout and (config.lora.output_head or "lm_head" in config.lora.modules):
        raise UserError(
            "config.lora.dropout: is not supported in the head's adapter; give 0, or leave the head out"
        )
    if config.eval.after_training and config.eval.benchmark is None:
        raise UserError("config.eval.benchmark: eval.after_training needs one; name a benchmark")
    if odd := [pair for pair in data.columns if "=" not in pair]:
        raise UserError(
            f"config.data.columns: {odd[0]!r} is not a pair; give NAME=COLUMN, such as prompt=question"
        )
    _check_columns(config.eval)
    for field, longest in (("prefix", 100), ("name", 200)):  # a run's name is the prefix plus its settings
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
        # Compare values as run ids write them: learning rates to seven digits, so 1e-3 equals 0.00100000001.
        if len({f"{value:e}" if isinstance(value, float) else value for value in values}) < len(values):
            raise UserError(
                f"config.{field}: {plain(values)} repeats a value (run ids keep seven digits); give each once"
            )
    mesh = config.mesh
    if [mesh.data, mesh.fsdp, mesh.tensor, mesh.expert].count(-1) > 1:
        raise UserError(
            "config.mesh: more than one axis is -1; give sizes for all but one of data, fsdp, tensor, expert"
        )
