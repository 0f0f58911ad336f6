"""Replay a recording in this package, and report every difference with a tolerance and a verdict.

    checks = compare(load_recording(file), model_dir, "float32")
    all(check.passed for check in checks)

The replay starts from the recorded initial adapter, so only the computation is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from jaxlora.models.decoder import Tree
from jaxlora.models.families import load_model_config
from jaxlora.parity.backend import Pass, Reduction
from jaxlora.parity.ours import OurBackend, OurTrainer
from jaxlora.parity.recording import Case, Recording, prompts_of, run_steps
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import progress_bar


@dataclass(frozen=True)
class Bars:
    """The largest difference that passes, by kind."""

    logprob: float  # largest |difference| of a log-probability
    mean_logprob: float  # mean |difference| of the log-probabilities of one pass
    loss: float  # relative difference of a summed loss
    adapter: float  # |ours - theirs| / |theirs - start|, Euclidean, whole adapter
    tokens: float | None  # share of greedy tokens that differ; None: shown, but not decisive


BARS = {
    "float32": Bars(logprob=1e-4, mean_logprob=1e-5, loss=1e-5, adapter=1e-3, tokens=0.0),
    # bfloat16 has 8 significant bits. The bars are two to ten times the differences seen when a float32
    # recording of a tiny model is replayed in bfloat16, and below the effect of the other reduction on the
    # adapter. Once a near-tie falls the other way, all later greedy tokens differ, so their share says
    # little.
    "bfloat16": Bars(logprob=0.5, mean_logprob=0.03, loss=5e-3, adapter=0.15, tokens=None),
}


@dataclass(frozen=True)
class Check:
    """One measured difference. If `bar` is None, it is only informative."""

    case: str
    name: str
    value: float
    bar: float | None
    above: bool = False  # the value must lie above the bar, not below

    @property
    def passed(self) -> bool:
        if self.bar is None:
            return True
        if not np.isfinite(self.value):
            return False
        return self.value > self.bar if self.above else self.value <= self.bar


def compare(
    recording: Recording, model_dir: Path, dtype: str = "float32", mesh: Mesh | None = None
) -> list[Check]:
    """Every difference between the recording and a replay on the base in `model_dir`.

    Args:
      mesh: where the replay runs; None: on all devices.

    Raises:
      UserError: the base or an adapter cannot be read, or does not fit.
    """
    vocabulary = load_model_config(model_dir).vocab_size
    largest_token = max(int(row.tokens.max()) for case in recording.cases for row in case.rows)
    if largest_token >= vocabulary:
        raise UserError(
            f"{model_dir}: has {vocabulary} tokens, but the recording holds token {largest_token}"
        )
    backend = OurBackend(model_dir, dtype, recording.settings.reduction, mesh)
    checks: list[Check] = []
    with progress_bar("replaying", len(recording.cases), "cases") as advance:
        for case in recording.cases:
            checks += judge(recording, case, replay(recording, case, backend), BARS[dtype])
            advance(1)
    return checks


@dataclass(frozen=True)
class Replay:
    """This package's results for a case."""

    condition: str  # of the recorded adapter, from its tensors
    start: Tree
    service_end: Tree  # the service's final adapter
    before: Pass
    steps: list[Pass]
    after: Pass
    end: Tree  # our final adapter
    other_end: Tree | None  # with the other reduction, if that makes a difference
    loaded: Pass  # with the service's final adapter
    answers: list[list[int]]  # likewise


def replay(recording: Recording, case: Case, backend: OurBackend) -> Replay:
    """Repeat what the service did, from the same initial adapter.

    Raises:
      UserError: an adapter of the recording is missing, modified, or does not fit the base.
    """
    settings = recording.settings
    start_folder, end_folder = recording.adapter(case, "start"), recording.adapter(case, "end")
    trainer, loaded = backend.load(start_folder), backend.load(end_folder)
    start = trainer.lora
    before = trainer.forward(case.rows)
    steps = run_steps(trainer, case.rows, settings)
    other_end = None
    if case.lengths == "unequal":
        against = OurTrainer(backend.load(start_folder).trainer, other_reduction(recording))
        run_steps(against, case.rows, settings)
        other_end = against.lora
    prompts = prompts_of(case.rows, settings)
    answers = loaded.sample(loaded.save("end"), prompts, settings.max_new_tokens, recording.stop_token)
    placement = trainer.trainer.spec.lora
    assert placement is not None
    return Replay(
        condition=placement.condition,
        start=start,
        service_end=loaded.lora,
        before=before,
        steps=steps,
        after=trainer.forward(case.rows),
        end=trainer.lora,
        other_end=other_end,
        loaded=loaded.forward(case.rows),
        answers=answers,
    )


def judge(recording: Recording, case: Case, ours: Replay, bars: Bars) -> list[Check]:
    """Every difference in a case, with its bar."""

    def check(name: str, value: float, bar: float | None, above: bool = False) -> Check:
        return Check(case.name, name, float(value), bar, above)

    def passes(name: str, ours: Sequence[Pass], theirs: Sequence[Pass]) -> list[Check]:
        lines = [
            check(f"log-probabilities {name}, largest difference", largest(ours, theirs), bars.logprob),
            check(f"log-probabilities {name}, mean difference", mean(ours, theirs), bars.mean_logprob),
        ]
        return [*lines, check(f"summed loss {name}, relative", loss(ours, theirs), bars.loss)]

    moved = relative(ours.end, ours.service_end, ours.start)
    different = different_tokens(ours.answers, case.answers, recording.stop_token)
    checks = [
        check("placement is not the one asked for", ours.condition != case.condition, 0),
        check("B before training, largest entry", _largest_b(ours.start), 0),
        *passes("before training", [ours.before], [case.before]),
        *passes("in the steps", ours.steps, case.steps),
        *passes("after the steps", [ours.after], [case.after]),
        check("adapter after the steps, relative", moved, bars.adapter),
        *passes("of the service's own adapter", [ours.loaded], [case.after]),
        check("greedy tokens of the service's own adapter that differ", different, bars.tokens),
    ]
    if ours.other_end is not None:
        name = f"adapter if the loss were the {other_reduction(recording).replace('_', ' ')}, relative"
        apart = relative(ours.other_end, ours.service_end, ours.start)
        checks.append(check(name, apart, bars.adapter, above=True))
    return checks


def other_reduction(recording: Recording) -> Reduction:
    """The reduction that the service does not use."""
    return "sum" if recording.settings.reduction == "sequence_mean" else "sequence_mean"


def largest(ours: Sequence[Pass], theirs: Sequence[Pass]) -> float:
    """Largest absolute difference between two log-probabilities."""
    return float(np.abs(_all(ours) - _all(theirs)).max())


def mean(ours: Sequence[Pass], theirs: Sequence[Pass]) -> float:
    """Mean absolute difference of the log-probabilities, in the worst pass."""
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(_all([a]) - _all([b])).mean()) for a, b in pairs)


def loss(ours: Sequence[Pass], theirs: Sequence[Pass]) -> float:
    """Largest relative difference between two summed losses."""
    return max(abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(ours, theirs, strict=True))


def relative(ours: Tree, theirs: Tree, start: Tree) -> float:
    """|ours - theirs| / |theirs - start|: the difference relative to the distance moved in training."""
    a, b, zero = _flat(ours), _flat(theirs), _flat(start)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - zero))


def different_tokens(ours: Sequence[list[int]], theirs: Sequence[list[int]], stop: int) -> float:
    """Share of greedy tokens that differ, position by position, without the end-of-turn token."""
    different = total = 0
    for pair in zip(ours, theirs, strict=True):
        a, b = ([token for token in answer if token != stop] for answer in pair)
        same = sum(x == y for x, y in zip(a, b, strict=False))
        different, total = different + max(len(a), len(b)) - same, total + max(len(a), len(b))
    return different / max(1, total)


def table(checks: Sequence[Check], title: str) -> Table:
    """Each difference with its bar and verdict, for the terminal."""
    lines = Table(title=title, title_justify="left")
    for name in ("case", "what", "difference", "bar", ""):
        lines.add_column(name, justify="right" if name in ("difference", "bar") else "left")
    for check in checks:
        bar = "" if check.bar is None else f"{'above' if check.above else 'at most'} {check.bar:g}"
        verdict = "" if check.bar is None else "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
        lines.add_row(check.case, check.name, f"{check.value:.2e}" if check.value else "0", bar, verdict)
    return lines


def _all(passes: Sequence[Pass]) -> np.ndarray:
    return np.concatenate([np.asarray(row, np.float64) for one in passes for row in one.logprobs])


def _flat(tree: Tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def _largest_b(tree: Tree) -> float:
    leaves = jax.tree.leaves_with_path(tree)
    return max(float(np.abs(leaf).max()) for path, leaf in leaves if path[-1].key == "lora_b")
