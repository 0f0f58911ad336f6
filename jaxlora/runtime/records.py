"""The records of a run: their fields, and how they are written and read back.

    append_jsonl(run_dir / "metrics.jsonl", metric_record(run_id=run_id, step=1, split="train", loss=1.14))
    write_json_atomic(run_dir / "summary.json", summary_record(run_id=run_id, status="completed"))
    manifest, summary = read_manifest(run), read_summary(run)
    for row in read_metrics(run): row["step"], row["loss"]

Training and evaluation write the same records. A field that does not apply is null, never missing. On
reading, fields that later code relies on are checked for type, with a one-line error; fields not listed here
are passed on unchanged, as nothing computes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Required, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_numbered_jsonl, read_object

METRIC_FIELDS = (
    "run_id",
    "checkpoint",  # the checkpoint measured, such as `step-3169`; null for a training step
    "condition",  # `attention_only`, `mlp_only`, `all_layer`, or null for the untouched base
    "seed",
    "step",  # optimizer steps done; the first step is 1
    "split",  # one of SPLITS
    "loss",  # mean negative log likelihood per weighted target token
    "learning_rate",
    "eval_metric",  # the benchmark score in [0, 1]; null for training and validation
    "token_count",
    "cost",
)
SUMMARY_FIELDS = (
    "run_id",
    "checkpoint",
    "condition",
    "seed",
    "dataset",
    "primary_metric",  # {"name": ..., "value": ...}
    "artifact_paths",  # {name: path relative to the run directory}
    "status",  # "completed"; a run that fails leaves `failure.json` instead of a summary
    "token_count",
)
Split = Literal["train", "validation", "test"]
SPLITS = get_args(Split)


def metric_record(**fields: Any) -> Record:
    """One row of `metrics.jsonl`: every field of METRIC_FIELDS, null if not given, then extra ones."""
    if fields.get("split") not in SPLITS:
        raise ValueError(f"split is {fields.get('split')!r}; it must be one of {', '.join(SPLITS)}")
    return _with_nulls(METRIC_FIELDS, fields)


def summary_record(**fields: Any) -> Record:
    """The content of `summary.json`: every field of SUMMARY_FIELDS, null if not given, then extra ones."""
    return _with_nulls(SUMMARY_FIELDS, fields)


def _with_nulls(names: tuple[str, ...], fields: Record) -> Record:
    return {name: fields.get(name) for name in names} | fields


# --- Reading ------------------------------------------------------------------------------------------------

_OPEN = ConfigDict(extra="allow", strict=True)
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Group = dict[str, Any]


class _Identity(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    run_id: Name | None
    condition: Name | None
    seed: Count | None
    checkpoint: Name | None
    step: Count | None
    cost: Number | None
    seconds: Number | None
    token_count: Count | None


class _Metric(_Identity, total=False):
    split: Required[Split]
    loss: Number | None
    learning_rate: Number | None
    eval_metric: Number | None
    tokens_per_second: Number | None
    model_flops_utilisation: Number | None


class _Validation(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    step: Count
    mean_nll: Number | None


class _Summary(_Identity, total=False):
    status: str | None
    validations: list[_Validation] | None
    sha256: dict[str, str] | None  # of the run's other files, by path relative to its folder
    selected_step: Count | None
    total: Count
    correct_strict: Count
    extraction_failures: Count
    prompt_tokens: Count
    train_token_count: Count
    validation_token_count: Count


class _Progress(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    step: Required[Count]
    validations: Required[list[Annotated[list[Number], Field(min_length=2, max_length=2)]]]
    metrics_bytes: Required[Count]
    metrics_sha256: str | None
    base_weights_sha256: str | None


class _Optim(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    peak_lr: Number | None


class _Named(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    path: Name | None
    fingerprint: Name | None
    condition: Name | None
    targets: Name | None
    rank: Count | None


class _Train(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    batch_rows: Count | None
    what: Name | None


class _Config(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    model: _Named | None
    lora: _Named | None
    optim: _Optim | None
    data: Group | None
    train: _Train | None
    sweep: Group | None
    prefix: Name
    name: Name | None
    seed: Count | None


class _Manifest(_Identity, total=False):
    config: _Config | None
    base: _Named | None
    gates: Group | None
    device: Any
    dataset: dict[str, Group] | None
    trained: Group | None
    mesh: Group | None
    packages: Group | None
    code: Group | None
    resumed_with: Any


class _Prediction(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    benchmark_index: Count
    question: str
    prompt_token_count: Count
    generated_token_count: Count


def read_manifest(run: Path) -> Record:
    """Read `manifest.json` from a run directory.

    Raises:
      UserError: it is missing or broken; the message names the field.
    """
    return _object(run / "manifest.json", _Manifest)


def read_summary(folder: Path) -> Record:
    """Read `summary.json` of a run or an evaluation; raises like `read_manifest`."""
    return _object(folder / "summary.json", _Summary)


def read_failure(run: Path) -> Record:
    """Read `failure.json` of a run; raises like `read_manifest`."""
    return _object(run / "failure.json", _Identity)


def read_metrics(run: Path) -> list[Record]:
    """Read the rows of `metrics.jsonl`; raises like `read_manifest`, naming the line."""
    file = run / "metrics.jsonl"
    rows = read_numbered_jsonl(file)
    for line, row in rows:
        check_record(f"{file}:{line}", row, _Metric)
        if row["split"] != "test" and row.get("step") is None:
            raise UserError(f"{file}:{line}: has no step")
    return [row for _, row in rows]


def contradiction(summary: Record, rows: Sequence[Record]) -> str | None:
    """Where a run's metrics contradict its summary, in words."""
    said = {entry["step"]: entry["mean_nll"] for entry in summary.get("validations") or ()}
    found = {row["step"]: row.get("loss") for row in rows if row["split"] == "validation"}
    if said and said != found:
        step = min(step for step in {*said, *found} if said.get(step) != found.get(step))
        return f"validation of step {step}: {found.get(step)} and {said.get(step)}"
    for split in ("train", "validation"):
        total = summary.get(f"{split}_token_count")
        counted = sum(row.get("token_count") or 0 for row in rows if row["split"] == split)
        if total is not None and total != counted:
            return f"{split} tokens: {counted:,} and {total:,}"
    return None


def progress_problem(progress: Record) -> str | None:
    """What is wrong with the progress record of a checkpoint, in words; None if it is usable."""
    try:
        check_record("progress.json", progress, _Progress)
    except UserError as error:
        return str(error)
    return None


def check_predictions(file: Path, records: list[Record]) -> None:
    """Refuse prediction records that cannot be compared with others."""
    for number, record in enumerate(records, start=1):
        check_record(f"{file}: record {number}", record, _Prediction)


def _object(file: Path, kind: Any) -> Record:
    value = read_object(file)
    check_record(str(file), value, kind)
    return value


_adapter = cache(TypeAdapter)


def check_record(place: str, value: Record, kind: Any) -> None:
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {name} is {first['input']!r:.80}: {first['msg']}") from None
