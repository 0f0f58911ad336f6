"""Read a study's results directory: its runs, its learning-rate trials and its evaluations.

    study = load_study(Path("results"), prefix="qwen3-8b")
    study.runs[0].validation_nll()        # {1000: 0.3469, 2000: 0.3411, ...}
    study.absent                          # what a report needs and this directory lacks, in words

Expected layout, each run with the files that `jaxlora.runtime.files` describes:

    <results>/<prefix>-<condition>-seed-<seed>/            manifest.json metrics.jsonl summary.json
    <results>/<prefix>-<condition>-seed-<seed>/evaluation/ predictions.jsonl metrics.jsonl summary.json
    <results>/<prefix>-base/evaluation/                    the untouched base
    <results>/lr-selection/<prefix>-<condition>-lr-<lr>/   one run for each learning rate

A run is described by its records, never by its name. Runs of one `Setting` differ only in their seed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jaxlora.evals.gsm8k import aggregate, rescore
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_jsonl
from jaxlora.runtime.records import check_predictions, read_failure, read_manifest, read_metrics, read_summary
from jaxlora.runtime.remote import EMBEDDED
from jaxlora.study.comparison import Evaluation
from jaxlora.study.grid import TRIALS, Setting, run_name, setting_of
from jaxlora.train.selection import select_checkpoint


@dataclass(frozen=True)
class Run:
    """One training run. Missing files are empty values: `{}` or `()`."""

    run_id: str
    directory: Path
    setting: Setting
    seed: int | None
    manifest: Record
    metrics: tuple[Record, ...]
    summary: Record
    failure: Record

    @property
    def condition(self) -> str:
        """The adapter's placement, such as `all_layer`."""
        return self.setting.condition

    @property
    def status(self) -> str:
        """`completed`, `failed`, or `unfinished` if the run wrote neither a summary nor a failure."""
        if self.summary.get("status"):
            return str(self.summary["status"])
        return "failed" if self.failure else "unfinished"

    def rows(self, split: str) -> list[Record]:
        return [row for row in self.metrics if row.get("split") == split]

    def validation_nll(self) -> dict[int, float]:
        """Validation mean NLL by step, ascending."""
        nll = {row["step"]: row["loss"] for row in self.rows("validation") if row.get("loss") is not None}
        return dict(sorted(nll.items()))

    def selected_step(self) -> int | None:
        """The checkpoint that the selection rule chooses from the recorded validations."""
        nll = self.validation_nll()
        return select_checkpoint(nll) if any(map(math.isfinite, nll.values())) else None

    def learning_rate(self) -> float | None:
        """The peak learning rate; None if no manifest records it."""
        return ((self.manifest.get("config") or {}).get("optim") or {}).get("peak_lr")

    @property
    def adapter_file(self) -> Path | None:
        """The exported PEFT adapter within the run's directory."""
        return next(iter(sorted(self.directory.rglob("adapter_model.safetensors"))), None)

    def adapter(self) -> dict[str, int] | None:
        """Bytes and parameters of the exported adapter, read from the file's own header."""
        if self.adapter_file is None:
            return None
        from jaxlora.checkpoints.tensors import read_header  # imports JAX, which most reports do not need

        tensors = read_header(str(self.adapter_file))
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        return {"bytes": self.adapter_file.stat().st_size, "parameters": parameters}


@dataclass(frozen=True)
class Study:
    """Everything in a results directory that belongs to one study."""

    directory: Path
    prefix: str
    runs: tuple[Run, ...]
    trials: tuple[Run, ...]  # learning-rate selection
    evaluations: tuple[Evaluation, ...]  # the baseline first, if there is one
    evaluation_summaries: dict[str, Record]  # by run id
    absent: tuple[str, ...]

    def conditions(self) -> list[str]:
        """The placements compared, in the study's order."""
        names = {run.condition for run in (*self.runs, *self.trials)}
        names |= {evaluation.condition for evaluation in self.evaluations if evaluation.condition}
        return sorted(names, key=lambda name: Setting(name).order)

    def by_rate(self) -> dict[Setting, dict[float, list[Run]]]:
        """The runs that compare learning rates, by setting and then by rate, with seeds together.

        These are the sweep's own runs if it varies the rate, otherwise the trials of the selection.
        """
        swept = [run for run in self.runs if run.setting.rate is not None]
        found: dict[Setting, dict[float, list[Run]]] = {}
        for run in swept or self.trials:
            if (value := run.learning_rate()) is not None:
                found.setdefault(run.setting.without_rate(), {}).setdefault(value, []).append(run)
        settings = sorted(found, key=lambda setting: setting.order)
        return {setting: dict(sorted(found[setting].items())) for setting in settings}

    def benchmark(self) -> str:
        """The benchmark that the models were evaluated on, as a reader would call it."""
        names = sorted({str(summary.get("dataset")) for summary in self.evaluation_summaries.values()})
        if all("gsm8k" in name.lower() for name in names):
            return "GSM8K"
        own = all(name.startswith(EMBEDDED) for name in names)
        if own:
            return "the embedded word problems"
        return ", ".join(Path(name).name if Path(name).suffix else name for name in names)

    def evaluation_files(self) -> list[Path]:
        return [
            self.directory / evaluation.run_id / "evaluation" / name
            for evaluation in self.evaluations
            for name in ("predictions.jsonl", "summary.json")
        ]


def lowest_nll(runs: Sequence[Run]) -> float | None:
    """The lowest validation NLL of a run; for several seeds, the mean of each one's lowest.

    None if any of them failed, is unfinished or recorded no validation, which makes the rate ineligible.
    """
    lowest = [min(run.validation_nll().values(), default=None) for run in runs if run.status == "completed"]
    if not runs or len(lowest) < len(runs) or None in lowest:
        return None
    return fmean(value for value in lowest if value is not None)


def load_study(directory: Path, prefix: str, with_evaluations: bool = True) -> Study:
    """Read everything. A broken file is a `UserError`; a missing one is listed in `Study.absent`.

    Args:
      with_evaluations: if False, skip the evaluations, as selections made before them do.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give the study's results directory")
    base_id = f"{prefix}-base"
    absent: list[str] = []
    runs = _runs(directory, prefix, skip=base_id)
    trials = _runs(directory / TRIALS, prefix, trial=True)
    evaluations: list[Evaluation] = []
    summaries: dict[str, Record] = {}
    subjects = [(base_id, None, None), *((run.run_id, run.setting, run.seed) for run in runs)]
    for run_id, setting, seed in subjects if with_evaluations else ():
        found = load_evaluation(directory / run_id / "evaluation", run_id, setting, seed)
        if found is None:
            what = "the untouched base" if setting is None else run_id
            absent.append(f"There is no finished evaluation of {what}.")
        else:
            evaluations.append(found[0])
            summaries[run_id] = found[1]
    if not runs:
        absent.append(f"There is no training run whose id begins with {prefix}-.")
    absent += [f"{run.run_id} is {run.status}{_reason(run)}." for run in runs if run.status != "completed"]
    absent += [f"{run.run_id} has no recorded validation." for run in runs if not run.validation_nll()]
    absent += [f"{run.run_id} has no exported adapter." for run in runs if run.adapter() is None]
    absent += _mismatches(runs, summaries)
    if not trials and all(run.setting.rate is None for run in runs):
        absent.append("There are no learning-rate selection runs.")
    absent += [f"{run.run_id} is {run.status}{_reason(run)}." for run in trials if run.status != "completed"]
    return Study(directory, prefix, tuple(runs), tuple(trials), tuple(evaluations), summaries, tuple(absent))


def _runs(directory: Path, prefix: str, skip: str | None = None, trial: bool = False) -> list[Run]:
    """The study's runs in a folder, in order, excluding runs of other studies or with a name of their own."""
    if not directory.is_dir():
        return []
    runs = []
    for folder in sorted(directory.iterdir()):
        if folder.is_dir() and folder.name.startswith(f"{prefix}-") and folder.name != skip:
            run = load_run(folder, trial)
            if run is not None and _belongs(run, prefix, trial):
                runs.append(run)
    return sorted(runs, key=lambda run: (run.setting.order, run.learning_rate() or 0, run.seed or 0))


def _belongs(run: Run, prefix: str, trial: bool) -> bool:
    config = run.manifest.get("config") or {}
    given = config.get("name")  # None: the default name
    if given is not None and given != run_name(prefix, run.setting, None if trial else run.seed):
        return False
    return config.get("prefix", prefix) == prefix and run.run_id.startswith(f"{prefix}-{run.condition}-")


def load_run(folder: Path, trial: bool = False) -> Run | None:
    """One run's files; None if the folder contains no training run."""
    manifest, summary, failure = (
        read(folder) if (folder / name).is_file() else {}
        for name, read in (
            ("manifest.json", read_manifest),
            ("summary.json", read_summary),
            ("failure.json", read_failure),
        )
    )
    metrics = tuple(read_metrics(folder)) if (folder / "metrics.jsonl").is_file() else ()
    config = manifest.get("config") or {}
    records: list[Record] = [summary, failure, *metrics[:1], manifest, config]
    condition = next((found for record in records if (found := record.get("condition"))), None)
    condition = condition or _placement(config)
    if condition is None:
        return None  # not a training run: an evaluation of the base, or something else
    seed = next((found for record in records if (found := record.get("seed")) is not None), None)
    setting = setting_of(config, condition, trial)
    return Run(folder.name, folder, setting, seed, manifest, metrics, summary, failure)


def _placement(config: Record) -> str | None:
    """What a configuration trains, under the name used in records and run ids."""
    if (config.get("train") or {}).get("what") == "full":
        return "full"
    lora = config.get("lora") or {}
    named = lora.get("targets") or lora.get("condition")  # `condition` in earlier versions
    return named and named.replace(",", "+")


def _reason(run: Run) -> str:
    reason = run.failure.get("error") or run.failure.get("reason") or run.failure.get("message")
    return f" ({reason})" if reason else ""


def load_evaluation(
    folder: Path, run_id: str, setting: Setting | None, seed: int | None
) -> tuple[Evaluation, Record] | None:
    """A finished evaluation, scored again from its text; None if it is missing or unfinished.

    Raises:
      UserError: it is of another model, or its scores do not match its texts.
    """
    predictions = folder / "predictions.jsonl"
    if not predictions.is_file() or not (folder / "summary.json").is_file():
        return None
    summary = read_summary(folder)
    if summary.get("status") != "completed":
        return None
    condition = None if setting is None else setting.condition
    if summary.get("condition") != condition or (condition is not None and summary.get("seed") != seed):
        found = f"condition {summary.get('condition')}, seed {summary.get('seed')}"
        raise UserError(
            f"{folder / 'summary.json'} is of {found}, but it lies in the run of condition {condition}, "
            f"seed {seed}; evaluate this run again"
        )
    records = rescore(predictions)
    check_predictions(predictions, records)
    stored = read_jsonl(predictions, torn_last_line="refuse")
    for number, (new, old) in enumerate(zip(records, stored, strict=True), start=1):
        if new["correct"] != old.get("correct"):
            raise UserError(
                f"{predictions}: record {number} is stored as correct={json.dumps(old.get('correct'))} "
                f"but scores {json.dumps(new['correct'])}; evaluate this run again"
            )
    for name, value in aggregate(records).items():
        if summary.get(name, value) != value:
            raise UserError(
                f"{folder / 'summary.json'} records {name} {json.dumps(summary[name])}, but the predictions "
                f"beside it give {json.dumps(value)}; evaluate this run again"
            )
    return Evaluation(run_id, setting, seed, tuple(records)), summary


def step_of(checkpoint: Any) -> int | None:
    """The step in a checkpoint's name, such as `step-3169` or `3169`."""
    number = re.search(r"(\d+)$", str(checkpoint)) if checkpoint is not None else None
    return int(number[1]) if number else None


def _mismatches(runs: list[Run], summaries: dict[str, Record]) -> list[str]:
    """Evaluations of a checkpoint other than the one that the selection rule chooses."""
    lines = []
    for run in runs:
        summary = summaries.get(run.run_id)
        if summary is None or run.selected_step() is None:
            continue
        evaluated = step_of(summary.get("checkpoint"))
        if evaluated is None:
            lines.append(f"The evaluation of {run.run_id} does not say which checkpoint it used.")
        elif evaluated != run.selected_step():
            lines.append(
                f"{run.run_id} was evaluated at step {evaluated}, "
                f"but its lowest validation NLL is at step {run.selected_step()}."
            )
    return lines
