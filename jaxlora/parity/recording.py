"""Drive a trainer through a small fixed experiment and record all of its results.

    recording = record(TinkerBackend(base), rows, Settings(), Path("parity.json"), base, stop_token=151645)
    recording = load_recording(Path("parity.json"))

For each case: a fresh adapter, log-probabilities, ten Adam steps, log-probabilities again, greedy answers.
The adapters before and after are in `<stem>-adapters/<case>/` next to the file, identified by their SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from jaxlora.checkpoints.peft import SETTINGS, WEIGHTS
from jaxlora.config import Condition, Count, OptimConfig, Rate, TrainConfig
from jaxlora.data.render import RenderedRow
from jaxlora.parity.backend import AdamStep, Backend, Pass, Reduction, Trainer
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json, sha256_of, write_json_atomic, write_text_atomic
from jaxlora.runtime.progress import progress_bar
from jaxlora.train.schedule import learning_rate, plan_run

FORMAT = 1
Lengths = Literal["equal", "unequal"]
Which = Literal["start", "end"]
Token = Annotated[int, Field(ge=0, le=1 << 24)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Small = Annotated[int, Field(gt=0, le=4096)]
Content = TypeVar("Content")


@checked(frozen=True)
class Settings:
    """What to record. Adam's settings are the study's; the learning rate follows its schedule."""

    conditions: tuple[Condition, ...] = ("all_layer",)
    reduction: Reduction = "sum"
    rank: Small = 8
    seed: Count = 0
    n_rows: Small = 8
    batch_rows: Small = 4
    steps: Small = 10
    peak_lr: Rate = 1e-3
    max_new_tokens: Small = 16
    max_tokens: Small = 256


def make_settings(**values: Any) -> Settings:
    """Validated settings.

    Raises:
      UserError: an impossible value; names the setting.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@dataclass(frozen=True)
class Case:
    """The training of one adapter, as reported by a trainer."""

    name: str
    condition: Condition
    lengths: Lengths
    rows: list[RenderedRow]
    before: Pass
    steps: list[Pass]
    after: Pass
    answers: list[list[int]]
    adapters: dict[Which, str] = field(default_factory=dict)  # SHA-256 of the weights


@dataclass(frozen=True)
class Recording:
    """A recorded experiment; `folder` holds the adapters."""

    base: str
    trainer: dict[str, str]
    settings: Settings
    stop_token: int
    cases: list[Case]
    folder: Path

    def adapter(self, case: Case, which: Which) -> Path:
        """The PEFT folder of the case's adapter at its `start` or `end`, after checking its hash."""
        return recorded_adapter(self.folder / case.name / which, case.adapters[which])


def choose_rows(rows: Sequence[RenderedRow], settings: Settings) -> list[RenderedRow]:
    """The first rows that are short enough.

    Raises:
      UserError: there are too few of them.
    """
    short = [row for row in rows if row.n_tokens <= settings.max_tokens][: settings.n_rows]
    if len(short) < settings.n_rows:
        raise UserError(
            f"only {len(short)} rows have at most {settings.max_tokens} tokens; {settings.n_rows} are needed"
        )
    return short


def cut_answers(rows: Sequence[RenderedRow]) -> list[RenderedRow]:
    """The rows with every answer cut to the length of the shortest, so that sums of weights are equal."""
    shortest = min(len(row.tokens) - row.prompt_length for row in rows)
    ends = [row.prompt_length + shortest for row in rows]
    return [
        RenderedRow(row.row_id, row.tokens[:end], row.weights[:end])
        for row, end in zip(rows, ends, strict=True)
    ]


def learning_rates(settings: Settings) -> list[float]:
    """The study's learning-rate schedule over the recorded steps."""
    optim = OptimConfig(peak_lr=settings.peak_lr)
    plan = plan_run(optim, TrainConfig(batch_rows=1, epochs=1), settings.steps)
    return [learning_rate(step, optim, plan) for step in range(1, settings.steps + 1)]


def batch_of_step(rows: Sequence[RenderedRow], settings: Settings, step: int) -> list[RenderedRow]:
    """The rows of a step (counted from 1), cycling through all rows in order."""
    start = (step - 1) * settings.batch_rows
    return [rows[i % len(rows)] for i in range(start, start + settings.batch_rows)]


def run_steps(
    trainer: Trainer, rows: Sequence[RenderedRow], settings: Settings, advance=lambda n: None
) -> list[Pass]:
    """Take all optimizer steps; return the result of each forward-backward pass."""
    passes = []
    for step, rate in enumerate(learning_rates(settings), start=1):
        passes.append(trainer.forward_backward(batch_of_step(rows, settings, step)))
        trainer.optim_step(AdamStep(rate))
        advance(1)
    return passes


def prompts_of(rows: Sequence[RenderedRow], settings: Settings) -> list[list[int]]:
    """The prompts answered at the end: those of the first batch."""
    return [row.tokens[: row.prompt_length].tolist() for row in rows[: settings.batch_rows]]


def record(
    backend: Backend, rows: Sequence[RenderedRow], settings: Settings, out: Path, base: str, stop_token: int
) -> Recording:
    """Run every case and write the recording to `out`.

    Args:
      rows: rendered rows; the first short ones are used.
      base: name of the base, for the reader.
      stop_token: the end-of-turn token of greedy answers.

    Raises:
      UserError: `out` exists, there are too few rows, or the trainer fails.
    """
    folder = new_folder(out)
    chosen = choose_rows(rows, settings)
    cases = []
    names = [(condition, lengths) for condition in settings.conditions for lengths in get_args(Lengths)]
    with progress_bar("recording", len(names) * (settings.steps + 4), "calls") as advance:
        for condition, lengths in names:
            name = f"{condition}-{lengths}"
            used = cut_answers(chosen) if lengths == "equal" else chosen
            trainer = backend.create(condition, settings.rank, settings.seed)
            before = trainer.forward(used)
            trainer.fetch(trainer.save("start"), folder / name / "start")
            advance(2)
            steps = run_steps(trainer, used, settings, advance)
            after = trainer.forward(used)
            end = trainer.save("end")
            trainer.fetch(end, folder / name / "end")
            advance(1)
            answers = trainer.sample(end, prompts_of(used, settings), settings.max_new_tokens, stop_token)
            advance(1)
            hashes = {which: sha256_of(folder / name / which / WEIGHTS) for which in get_args(Which)}
            cases.append(Case(name, condition, lengths, used, before, steps, after, answers, hashes))
    recording = Recording(base, backend.describe(), settings, stop_token, cases, folder)
    for settings_file in folder.glob(f"*/*/{SETTINGS}"):
        forget_path(settings_file, base)
    write_text_atomic(out, _to_json(recording))
    return recording


# --- The file -----------------------------------------------------------------------------------------------


@checked(frozen=True)
class PassRecord:
    """A pass as stored in a file: log-probabilities of its targets by row, and its summed loss."""

    logprobs: list[list[Finite]]
    loss: Finite

    @classmethod
    def of(cls, value: Pass) -> PassRecord:
        return cls([digits(row) for row in value.logprobs], value.loss)

    def to_pass(self) -> Pass:
        return Pass([np.asarray(row, np.float32) for row in self.logprobs], self.loss)


def digits(values: Iterable[float]) -> list[float]:
    """Numbers with the digits that float32 needs for an exact round trip."""
    return [float(str(np.float32(x))) for x in values]


@checked(frozen=True)
class _CaseFile:
    name: Annotated[str, Field(pattern=r"^[a-z_-]+$")]  # also the name of a folder
    condition: Condition
    lengths: Lengths
    tokens: list[list[Token]]
    prompt_lengths: list[Count]
    before: PassRecord
    steps: list[PassRecord]
    after: PassRecord
    answers: list[list[Token]]
    adapters: dict[Which, str]


@checked(frozen=True)
class _File:
    format: Literal[1]
    base: str
    trainer: dict[str, str]
    settings: Settings
    stop_token: Token
    cases: list[_CaseFile]


def load_recording(file: Path) -> Recording:
    """Read a recording.

    Raises:
      UserError: it is missing or not a recording; says where.
    """
    content = read_recording(file, _File, _fault)
    cases = [_case(case) for case in content.cases]
    folder = folder_of(file)
    return Recording(content.base, content.trainer, content.settings, content.stop_token, cases, folder)


def _fault(content: _File) -> str | None:
    """What is inconsistent in a recording, or None; every later computation relies on this check."""
    settings = content.settings
    if not content.cases:
        return "it holds no cases"
    for case in content.cases:
        lengths = [len(row) - 1 for row in case.tokens]
        if not 1 <= len(lengths) == len(case.prompt_lengths) <= settings.n_rows:
            return f"{case.name}: tokens and prompt_lengths do not have the same rows"
        if not all(0 < n <= length for n, length in zip(case.prompt_lengths, lengths, strict=True)):
            return f"{case.name}: a prompt is empty or leaves no answer"
        if len(case.steps) != settings.steps:
            return f"{case.name}: {len(case.steps)} steps, settings say {settings.steps}"
        batches = [
            [lengths[(step * settings.batch_rows + i) % len(lengths)] for i in range(settings.batch_rows)]
            for step in range(settings.steps)
        ]
        for one, expected in zip(
            (case.before, case.after, *case.steps), (lengths, lengths, *batches), strict=True
        ):
            if [len(row) for row in one.logprobs] != expected:
                return f"{case.name}: log-probabilities do not have the lengths of their rows"
        if len(case.answers) != min(settings.batch_rows, len(lengths)):
            return f"{case.name}: {len(case.answers)} answers to {settings.batch_rows} prompts"
        if set(case.adapters) != set(get_args(Which)):
            return f"{case.name}: the hash of an adapter is missing"
    return None


def _case(case: _CaseFile) -> Case:
    rows = []
    for i, (tokens, prompt_length) in enumerate(zip(case.tokens, case.prompt_lengths, strict=True)):
        weights = (np.arange(len(tokens)) >= prompt_length).astype(np.float32)
        rows.append(RenderedRow(str(i), np.asarray(tokens, np.int32), weights))
    before, after = case.before.to_pass(), case.after.to_pass()
    steps = [step.to_pass() for step in case.steps]
    return Case(
        case.name, case.condition, case.lengths, rows, before, steps, after, case.answers, dict(case.adapters)
    )


def _to_json(recording: Recording) -> str:
    """Compact JSON, one case per line."""
    cases = [
        {
            "name": case.name,
            "condition": case.condition,
            "lengths": case.lengths,
            "tokens": [row.tokens.tolist() for row in case.rows],
            "prompt_lengths": [row.prompt_length for row in case.rows],
            "before": asdict(PassRecord.of(case.before)),
            "steps": [asdict(PassRecord.of(step)) for step in case.steps],
            "after": asdict(PassRecord.of(case.after)),
            "answers": case.answers,
            "adapters": case.adapters,
        }
        for case in recording.cases
    ]
    head = {
        "format": FORMAT,
        "base": recording.base,
        "trainer": recording.trainer,
        "settings": asdict(recording.settings),
        "stop_token": recording.stop_token,
    }
    lines = [json.dumps(case, separators=(",", ":"), allow_nan=False) for case in cases]
    return json.dumps(head, indent=1)[:-2] + ',\n "cases": [\n' + ",\n".join(lines) + "\n]}\n"


# --- Shared by all kinds of recordings ----------------------------------------------------------------------


def folder_of(file: Path) -> Path:
    """The folder of a recording's adapters."""
    return file.with_name(f"{file.stem}-adapters")


def new_folder(out: Path) -> Path:
    """The folder for the adapters of a new recording.

    Raises:
      UserError: it or the recording already exists.
    """
    folder = folder_of(out)
    for place in (out, folder):
        if place.exists():
            raise UserError(f"{place}: exists already; give another --out")
    return folder


def read_recording(file: Path, kind: type[Content], fault_of: Callable[[Content], str | None]) -> Content:
    """The content of a file, checked as a whole.

    Args:
      fault_of: returns what is inconsistent in it, if anything.

    Raises:
      UserError: it is missing or not a recording; says where.
    """
    try:
        content = TypeAdapter(kind).validate_python(read_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: not a recording of this version: {place}: {first['msg']}") from None
    if fault := fault_of(content):
        raise UserError(f"{file}: not a complete recording: {fault}")
    return content


def recorded_adapter(folder: Path, sha256: str) -> Path:
    """The PEFT folder itself, after checking the hash of its weights.

    Raises:
      UserError: the weights are missing or differ from the recorded ones.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: missing; it belongs to the recording, keep them together")
    if sha256_of(folder / WEIGHTS) != sha256:
        raise UserError(f"{folder / WEIGHTS}: is not the file that was recorded (SHA-256 differs)")
    return folder


def forget_path(settings_file: Path, base: str) -> None:
    """Replace the path of the base, which a local service writes into the adapter's settings, by its name."""
    write_json_atomic(settings_file, read_json(settings_file) | {"base_model_name_or_path": base})
