"""Policy gradients as computed by a Tinker service: record ten steps, replay them here, compare.

    record_policy(TinkerBackend(base), prompts, PolicySettings(), Path("policy.json"), base, stop_token=0)
    checks = compare_policy(load_policy(Path("policy.json")), model_dir)

The service samples groups of answers once. Each objective then starts from the adapter that sampled them and
takes ten steps on these same answers, so from the second step on, the ratios between learner and sampler move
away from 1. Advantages are centred by group. The replay starts from the same adapter, with the same answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from jax.sharding import Mesh
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from jaxlora.checkpoints.peft import SETTINGS, WEIGHTS
from jaxlora.config import Condition
from jaxlora.data.render import RenderedRow
from jaxlora.parity.backend import AdamStep, Backend, Drawn, Pass, Reduction, Trainer
from jaxlora.parity.comparing import BARS, Bars, Check, largest, mean, relative
from jaxlora.parity.ours import OurBackend, OurTrainer
from jaxlora.parity.recording import (
    Finite,
    PassRecord,
    Small,
    Token,
    digits,
    folder_of,
    forget_path,
    new_folder,
    read_recording,
    recorded_adapter,
)
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json, sha256_of, write_text_atomic

Objective = Literal["importance_sampling", "ppo"]
T = TypeVar("T")
OBJECTIVES: tuple[Objective, ...] = ("importance_sampling", "ppo")
START = "start"  # folder of the adapter that sampled the answers; the others are named after the objective


@checked(frozen=True)
class PolicySettings:
    """What to record. Answer j of a group has at most `shortest + j * longer` tokens, so lengths differ."""

    condition: Condition = "all_layer"
    reduction: Reduction = "sum"
    rank: Small = 8
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Small = 10
    group_size: Small = 4
    shortest: Small = 6
    longer: Small = 5
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4


@checked(frozen=True)
class Life:
    """One objective's ten steps: the result of each, and the SHA-256 of the final adapter."""

    steps: list[PassRecord]
    after: PassRecord
    adapter: str


@checked(frozen=True)
class PolicyRecording:
    """A recorded experiment; its adapters are in `<stem>-adapters` next to its file."""

    format: Literal[1]
    base: str
    trainer: dict[str, str]
    settings: PolicySettings
    prompts: list[list[Token]]
    answers: list[list[Token]]  # the groups of all prompts, in order
    sampler_logprobs: list[list[Finite]]
    advantages: list[Finite]
    start: str  # SHA-256 of the first adapter
    lives: dict[Objective, Life]


@dataclass(frozen=True)
class Loaded:
    """A recording with the folder of its adapters."""

    recording: PolicyRecording
    folder: Path

    def adapter(self, name: str) -> Path:
        """The PEFT folder `start`, or that of an objective, after checking its hash."""
        known = self.recording.start if name == START else self.recording.lives[name].adapter  # type: ignore
        return recorded_adapter(self.folder / name, known)


# --- Recording ----------------------------------------------------------------------------------------------


def record_policy(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    settings: PolicySettings,
    out: Path,
    base: str,
    stop_token: int,
) -> Loaded:
    """Sample answers, take the steps of each objective, and write the results to `out`.

    Raises:
      UserError: `out` exists, the trainer fails, or the two objectives do not start from the same adapter.
    """
    folder = new_folder(out)
    drawn = _draw(backend, prompts, settings, folder, stop_token)
    advantages = centred(drawn, settings.group_size)
    rows = rows_of(prompts, drawn, advantages, settings.group_size)
    start = sha256_of(folder / START / WEIGHTS)
    lives: dict[Objective, Life] = {}
    for objective in OBJECTIVES:
        trainer = backend.create(settings.condition, settings.rank, settings.seed)
        trainer.fetch(trainer.save("begin"), folder / "begin")
        if sha256_of(folder / "begin" / WEIGHTS) != start:
            raise UserError(
                f"the service draws a different adapter from seed {settings.seed} the second time"
            )
        for file in (folder / "begin").iterdir():
            file.unlink()
        (folder / "begin").rmdir()
        steps = run_policy(trainer, rows, settings, objective)
        after = trainer.forward(rows)
        trainer.fetch(trainer.save("end"), folder / objective)
        end = sha256_of(folder / objective / WEIGHTS)
        lives[objective] = Life([PassRecord.of(one) for one in steps], PassRecord.of(after), end)
    for settings_file in folder.glob(f"*/{SETTINGS}"):
        forget_path(settings_file, base)
    recording = PolicyRecording(
        format=1,
        base=base,
        trainer=backend.describe(),
        settings=settings,
        prompts=[list(map(int, prompt)) for prompt in prompts],
        answers=[one.tokens for one in drawn],
        sampler_logprobs=[digits(one.logprobs) for one in drawn],
        advantages=advantages,
        start=start,
        lives=lives,
    )
    write_text_atomic(out, json.dumps(asdict(recording), separators=(",", ":"), allow_nan=False) + "\n")
    return Loaded(recording, folder)


def _draw(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    settings: PolicySettings,
    folder: Path,
    stop_token: int,
) -> list[Drawn]:
    """The groups of all prompts, from a separate adapter, since one that has sampled can no longer train."""
    sampler = backend.create(settings.condition, settings.rank, settings.seed)
    checkpoint = sampler.save(START)
    sampler.fetch(checkpoint, folder / START)
    limits = [settings.shortest + i * settings.longer for i in range(settings.group_size)]
    drawn = [one for prompt in prompts for one in sampler.draw(checkpoint, prompt, limits, stop_token)]
    if any(len(one.tokens) != len(one.logprobs) or not one.tokens for one in drawn):
        raise UserError("the service returned answers without the log-probabilities of their tokens")
    return drawn


def centred(drawn: Sequence[Drawn], group_size: int) -> list[float]:
    """Advantages of an arbitrary reward that tells answers apart: the share of even tokens."""
    rewards = np.array([np.mean([token % 2 == 0 for token in one.tokens]) for one in drawn], np.float32)
    groups = rewards.reshape(-1, group_size)
    found = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    return digits(found)


def rows_of(
    prompts: Sequence[Sequence[int]], drawn: Sequence[Drawn], advantages: Sequence[float], group_size: int
) -> list[RenderedRow]:
    """Prompt and answer of every sample, with weight, advantage and the sampler's log p on the answer."""
    rows = []
    for i, (one, advantage) in enumerate(zip(drawn, advantages, strict=True)):
        prompt = list(prompts[i // group_size])
        given = np.zeros(len(prompt), np.float32)
        weights = np.concatenate([given, np.ones(len(one.tokens), np.float32)])
        extras = {
            "advantages": weights * np.float32(advantage),
            "sampler_logprobs": np.concatenate([given, np.asarray(one.logprobs, np.float32)]),
        }
        rows.append(RenderedRow(str(i), np.array([*prompt, *one.tokens], np.int32), weights, extras=extras))
    return rows


def recorded_rows(recording: PolicyRecording) -> list[RenderedRow]:
    """The rows on which a recording's steps were made."""
    drawn = [Drawn(*pair) for pair in zip(recording.answers, recording.sampler_logprobs, strict=True)]
    return rows_of(recording.prompts, drawn, recording.advantages, recording.settings.group_size)


def group_of(values: Sequence[T], settings: PolicySettings, step: int) -> Sequence[T]:
    """The part of all rows, or of per-row values, on which a step (counted from 0) is made."""
    first = step * settings.group_size % len(values)
    return values[first : first + settings.group_size]


def run_policy(
    trainer: Trainer, rows: Sequence[RenderedRow], settings: PolicySettings, objective: str
) -> list[Pass]:
    """Take all steps, one group each in rotation; return the result of each forward-backward pass."""
    passes = []
    for step in range(settings.steps):
        passes.append(trainer.forward_backward(group_of(rows, settings, step), objective))
        trainer.optim_step(AdamStep(settings.learning_rate))
    return passes


# --- Reading ------------------------------------------------------------------------------------------------


def is_policy(file: Path) -> bool:
    """Whether a recording is one of policy gradients; other faults are reported by its reader."""
    content = read_json(file)
    return isinstance(content, dict) and "lives" in content


def load_policy(file: Path) -> Loaded:
    """Read a recording.

    Raises:
      UserError: it is missing or not a recording; says where.
    """
    return Loaded(read_recording(file, PolicyRecording, _fault), folder_of(file))


def _fault(recording: PolicyRecording) -> str | None:
    """What is inconsistent, or None; every later computation relies on this check."""
    settings, size = recording.settings, recording.settings.group_size
    if not recording.prompts or len(recording.answers) != size * len(recording.prompts):
        return f"{len(recording.answers)} answers, not {size} to each of {len(recording.prompts)} prompts"
    if not all(recording.prompts) or not all(recording.answers):
        return "a prompt or an answer is empty"
    if list(map(len, recording.answers)) != list(map(len, recording.sampler_logprobs)):
        return "sampler_logprobs do not have the lengths of their answers"
    if len(recording.advantages) != len(recording.answers):
        return "advantages are not one an answer"
    if set(recording.lives) != set(OBJECTIVES):
        return "an objective is missing"
    lengths = [
        len(recording.prompts[i // size]) + len(answer) - 1 for i, answer in enumerate(recording.answers)
    ]
    for name, life in recording.lives.items():
        if len(life.steps) != settings.steps:
            return f"{name}: {len(life.steps)} steps, settings say {settings.steps}"
        expected = [lengths, *(group_of(lengths, settings, step) for step in range(settings.steps))]
        if [list(map(len, one.logprobs)) for one in (life.after, *life.steps)] != expected:
            return f"{name}: log-probabilities do not have the lengths of their rows"
    return None


# --- Comparing ----------------------------------------------------------------------------------------------


def compare_policy(
    loaded: Loaded, model_dir: Path, dtype: str = "float32", mesh: Mesh | None = None
) -> list[Check]:
    """Every difference between the recording and a replay on the base in `model_dir`.

    Raises:
      UserError: the base or an adapter cannot be read, or does not fit.
    """
    recording = loaded.recording
    backend = OurBackend(model_dir, dtype, recording.settings.reduction, mesh)
    rows = recorded_rows(recording)
    found = backend.load(loaded.adapter(START)).forward(rows)
    on_answers = [
        np.abs(own - row.extras["sampler_logprobs"][1:])[row.weights[1:] != 0]
        for own, row in zip(found.logprobs, rows, strict=True)
    ]
    worst = float(max(gap.max() for gap in on_answers))
    name = "the sampler's own log-probabilities, largest difference"
    checks = [Check(START, name, worst, BARS[dtype].logprob)]
    for objective in OBJECTIVES:
        checks += judge_life(loaded, rows, backend, objective, BARS[dtype])
    return checks


def judge_life(
    loaded: Loaded, rows: Sequence[RenderedRow], backend: OurBackend, objective: Objective, bars: Bars
) -> list[Check]:
    """Replay one objective's steps and judge every difference, and whether another loss would be noticed."""
    life, settings = loaded.recording.lives[objective], loaded.recording.settings
    trainer = backend.load(loaded.adapter(START))
    start, end = trainer.lora, backend.load(loaded.adapter(objective)).lora
    steps = run_policy(trainer, rows, settings, objective)
    after = trainer.forward(rows)
    theirs = [one.to_pass() for one in life.steps]

    def check(name: str, value: float, bar: float | None, above: bool = False) -> Check:
        return Check(objective, name, float(value), bar, above)

    def otherwise(reduction: Reduction, loss: str) -> float:
        against = OurTrainer(backend.load(loaded.adapter(START)).trainer, reduction)
        run_policy(against, rows, settings, loss)
        return relative(against.lora, end, start)

    other = next(name for name in OBJECTIVES if name != objective)
    plain: Reduction = "length_mean" if settings.reduction == "sum" else "sum"
    lost = max(
        abs(own.loss - one.loss) / _scale(rows, settings, step)
        for step, (own, one) in enumerate(zip(steps, theirs, strict=True))
    )
    return [
        check("log-probabilities in the steps, largest difference", largest(steps, theirs), bars.logprob),
        check("log-probabilities in the steps, mean difference", mean(steps, theirs), bars.mean_logprob),
        check("summed loss in the steps, over the sum of |advantages|", lost, bars.loss),
        check(
            "log-probabilities after the steps, largest difference",
            largest([after], [life.after.to_pass()]),
            bars.logprob,
        ),
        check("adapter after the steps, relative", relative(trainer.lora, end, start), bars.adapter),
        check(
            f"adapter if the loss were {other}, relative",
            otherwise(settings.reduction, other),
            bars.adapter,
            True,
        ),
        check(
            f"adapter if the loss were the {plain.replace('_', ' ')}, relative",
            otherwise(plain, objective),
            bars.adapter,
            above=True,
        ),
    ]


def _scale(rows: Sequence[RenderedRow], settings: PolicySettings, step: int) -> float:
    """The sum of |advantages| over a step's tokens, as a scale: a correct loss may itself be 0."""
    group = group_of(rows, settings, step)
    return sum(float(np.abs(row.extras["advantages"]).sum()) for row in group)
