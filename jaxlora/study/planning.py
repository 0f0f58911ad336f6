"""What a study will do and how long it may take (`--dry-run`), and how far it has come (`--status`).

Neither writes anything. An estimate states its basis: the speed of this study's own runs if there are any,
otherwise that of one H100 as given in the README, scaled by the model's size and the available devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import jax
from rich.markup import escape
from rich.table import Table

from jaxlora.checkpoints.base import find_base
from jaxlora.config import RunConfig, check_study
from jaxlora.data.gates import GateStatus, report_place
from jaxlora.evals.gsm8k import load_problems
from jaxlora.models.families import count_matrix_parameters
from jaxlora.runtime.devices import peak_flops
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json
from jaxlora.study import grid
from jaxlora.study.pipeline import Session, Task
from jaxlora.study.results import Study, load_study
from jaxlora.study.stages import STAGES
from jaxlora.train.job import Job, prepare, token_count

# One H100 80GB, Qwen3-8B, rank 8, batches of 8 rows: `tools/bench.py`, see the README.
H100_TRAIN, H100_VALIDATION, H100_DECODE = 14_604, 34_939, 13_421  # tokens per second
H100_FLOPS, H100_PARAMETERS = 989e12, 7.568e9
# A smaller model is limited by more than its matmuls: SmolLM2-135M, 56 times smaller, reaches a quarter.
LARGEST_FACTOR = 10
ANSWER_TOKENS = 200  # the study's answers have 172 (adapters) to 283 (base) tokens on average


@dataclass(frozen=True)
class Speeds:
    """Tokens per second, and a description of their source."""

    train: float
    validation: float
    decode: float
    answer_tokens: float
    source: str


def speeds(config: RunConfig, study: Study | None) -> Speeds:
    """The speeds of the study's own runs and evaluations; what has not been measured is assumed."""
    model = find_base(config.model, with_weights=False).config
    device, count = jax.devices()[0], jax.device_count()
    peak = peak_flops(device)
    factor = H100_PARAMETERS / count_matrix_parameters(model) * (count * peak / H100_FLOPS if peak else 1)
    if factor < LARGEST_FACTOR:
        train, validation, decode = (factor * rate for rate in (H100_TRAIN, H100_VALIDATION, H100_DECODE))
        what = f"{count} x {device.device_kind}" if peak else "one H100, not for this machine"
        assumed = f"for {what}, from what Qwen3-8B reaches on one H100"
    else:
        train = validation = decode = math.nan
        assumed = "not known before it is measured; the model is too small to be compared with Qwen3-8B"
    length = float(min(ANSWER_TOKENS, config.eval.max_new_tokens))
    runs = [] if study is None else [*study.runs, *study.trials]
    rates = [
        median(measured)
        for run in runs
        if (
            measured := [
                row["tokens_per_second"] for row in run.rows("train") if row.get("tokens_per_second")
            ]
        )
    ]
    if rates:
        train, validation = fmean(rates), fmean(rates) * H100_VALIDATION / H100_TRAIN
    answers = [] if study is None else list(study.evaluation_summaries.values())
    answers = [summary for summary in answers if "generated_tokens_per_second" in summary]
    if answers:
        decode = fmean(summary["generated_tokens_per_second"] for summary in answers)
        length = fmean(summary["generated_tokens"] / summary["total"] for summary in answers)
    return Speeds(train, validation, decode, length, _source(len(rates), len(answers), assumed))


def _source(runs: int, evaluations: int, assumed: str) -> str:
    """The source of the speeds: measured in this many runs and evaluations, or assumed."""
    if not runs and not evaluations:
        return assumed
    training = (
        f"as measured in {runs} run{'s' * (runs != 1)} here, validation in the same proportion as on one H100"
    )
    decoding = f"as measured in {evaluations} evaluation{'s' * (evaluations != 1)} here"
    return f"training {training if runs else assumed}; decoding {decoding if evaluations else assumed}"


@dataclass(frozen=True)
class RunSize:
    """Steps and shifted tokens of one training run."""

    config: RunConfig
    steps: int
    train_tokens: int
    validation_tokens: int

    def hours(self, at: Speeds) -> float:
        return (self.train_tokens / at.train + self.validation_tokens / at.validation) / 3600


def run_sizes(config: RunConfig) -> list[RunSize]:
    """The sizes of all trials and runs of the sweep, each prepared as if it started now.

    Reads the rows, so files on the Hub are fetched, but loads no weights. Until the trials have chosen a
    learning rate, the configured one stands in; no count depends on it.

    Raises:
      UserError: something that would stop a run, perhaps hours from now.
    """
    check_study(config)
    config = Session(config).config
    gates = _gates_to_come(config)
    sizes: list[RunSize] = []
    job = None
    for run in (*grid.trials(config), *grid.sweep_runs(config)):
        try:
            job = prepare(run, with_weights=False, like=job, gates=gates)
        except UserError as error:
            raise UserError(f"{run.run_id}: {error}") from None
        sizes.append(_size(run, job))
    return sizes


def _gates_to_come(config: RunConfig) -> GateStatus | None:
    """The gates' status once the first stage has written their report; None if it will not write one."""
    data = config.data
    report = report_place(data.train_path, data.gate_report)
    if report is None or not report.is_file() or report.parent == grid.study_dir(config):
        return GateStatus(True, False, None, None, None, train_sha256="", validation_sha256="")
    return None


def _size(run: RunConfig, job: Job) -> RunSize:
    return RunSize(
        run,
        job.plan.total_steps,
        token_count(job.train_rows) * run.train.epochs,
        token_count(job.validation_rows) * len(job.plan.validation_steps),
    )


def plan_table(config: RunConfig) -> Table:
    """The whole plan: every run with steps, tokens and hours; the evaluations; and the totals."""
    results = Path(config.results_dir)
    at = speeds(config, load_study(results, config.prefix) if results.is_dir() else None)
    runs = run_sizes(config)
    evaluations = len(grid.sweep_runs(config)) + 1
    problems = len(load_problems(config.benchmark, config.eval.problems))
    decoding = evaluations * problems * at.answer_tokens / at.decode / 3600

    title = escape(f"the study {config.prefix}, in {config.results_dir}; its runs are {config.prefix}-...")
    table = Table(title=title, title_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("rate", "steps", "tokens", "validation", "hours"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        is_trial = run.config.run_dir.parent.name == grid.TRIALS
        rate = (
            "chosen" if grid.selects_rates(config) and not is_trial else grid.rate(run.config.optim.peak_lr)
        )
        counts = (run.steps, run.train_tokens, run.validation_tokens)
        table.add_row(
            _name(config, run.config.run_id), rate, *(f"{n:,}" for n in counts), _hours(run.hours(at))
        )
    table.add_section()
    table.add_row(f"{evaluations} evaluations of {problems:,}", "", "", "", "", _hours(decoding))
    table.add_section()
    sums = [
        sum(column)
        for column in zip(*((r.steps, r.train_tokens, r.validation_tokens) for r in runs), strict=True)
    ]
    table.add_row("all", "", *(f"{n:,}" for n in sums), _hours(sum(run.hours(at) for run in runs) + decoding))
    table.caption_justify = "left"
    table.caption = (
        f"Tokens are shifted counts; a chosen rate is the best of the trials. Hours are {escape(at.source)}."
    )
    rates = {"training": at.train, "validation": at.validation, "decoding": at.decode}
    known = [f"{rate:,.0f} tokens/s of {name}" for name, rate in rates.items() if not math.isnan(rate)]
    if known:
        table.caption += (
            f" They rest on {', '.join(known)}, and {at.answer_tokens:.0f} tokens an answer; compilation and"
            " loading are not counted."
        )
    return table


def _name(config: RunConfig, run_id: str) -> str:
    """A run's name without the study's prefix, which is the same in every row."""
    return escape(run_id.removeprefix(f"{config.prefix}-"))


def _hours(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.2f}"


# --- Status -------------------------------------------------------------------------------------------------

_COLOURS = {
    "done": "green",
    "failed": "red",
    "foreign": "red",
    "damaged": "red",
    "unfinished": "yellow",
    "redo": "yellow",
}


def status_tables(session: Session) -> list[Table]:
    """How far each stage and each run has come."""
    stages = Table(title="stages", title_justify="left")
    for name in ("stage", "state", "why"):
        stages.add_column(name, no_wrap=name != "why", overflow="fold")
    config = session.config
    title = escape(f"runs {config.prefix}-..., with the selected step's validation NLL and strict score")
    runs = Table(title=title, title_justify="left")
    for name in ("run", "state", "rate", "step", "NLL", "strict", "why"):
        left, may_fold = name in ("run", "state", "why"), name in ("run", "why")
        runs.add_column(name, no_wrap=not may_fold, overflow="fold", justify="left" if left else "right")
    for stage in STAGES:
        tasks = stage.check(session)
        done = sum(task.state.kind == "done" for task in tasks)
        open_tasks = [task for task in tasks if task.state.kind != "done"]
        kinds = dict.fromkeys(task.state.kind for task in open_tasks)
        text = "done" if not open_tasks else f"{done} of {len(tasks)} done" if done else ", ".join(kinds)
        why = next((task.state.why for task in open_tasks if task.state.why), "")
        colour = "green" if not open_tasks else next((_COLOURS[k] for k in kinds if k in _COLOURS), "default")
        stages.add_row(stage.name, f"[{colour}]{text}[/{colour}]", escape(why))
        if stage.name in ("learning-rates", "sweep"):
            for task in tasks:
                runs.add_row(*_run_row(config, task))
            runs.add_section()
    return [stages, runs]


def _run_row(config: RunConfig, task: Task) -> list[str]:
    state, folder = task.state, task.item.run_dir
    colour = _COLOURS.get(state.kind, "default")
    step = nll = score = ""
    if state.kind == "done":
        summary = read_json(folder / "summary.json")
        step, nll = f"{summary['selected_step']:,}", f"{summary['primary_metric']['value']:.5f}"
    if (folder / "evaluation" / "summary.json").is_file():
        score = f"{read_json(folder / 'evaluation' / 'summary.json')['accuracy']:.2%}"
    rate = "" if state.kind == "waiting" else grid.rate(task.item.optim.peak_lr)
    why = "" if state.kind == "waiting" else escape(state.why)  # the stage already says it once
    return [_name(config, task.name), f"[{colour}]{state.kind}[/{colour}]", rate, step, nll, score, why]
