"""What a study will do and how long it may take (`--dry-run`), and how far it is (`--status`).

Both write nothing. An estimate says what it rests on: the speed of this study's own runs where there are any,
else that of one H100 as the README states it, scaled by the model's size and by the devices at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median

import jax
from rich.markup import escape
from rich.table import Table

from jaxlora.config import RunConfig
from jaxlora.data.render import RenderedRow
from jaxlora.data.rows import load_rendered_rows
from jaxlora.devices import peak_flops
from jaxlora.evals.gsm8k import load_problems
from jaxlora.models.parameters import count_matrix_parameters
from jaxlora.records import read_json
from jaxlora.study import grid
from jaxlora.study.pipeline import Session, Task
from jaxlora.study.results import Study, load_study
from jaxlora.study.stages import STAGES
from jaxlora.train.job import load_job_tokenizer, locate_model, token_count
from jaxlora.train.schedule import plan_run

# One H100 80GB, Qwen3-8B, rank 8, batches of 8 rows: `tools/bench.py`, see the README.
H100_TRAIN, H100_VALIDATION, H100_DECODE = 15_464, 32_670, 8_165  # tokens a second
H100_FLOPS, H100_PARAMETERS = 989e12, 7.568e9
ANSWER_TOKENS = 200  # an answer of the study is 172 (adapters) to 283 (base) tokens long


@dataclass(frozen=True)
class Speeds:
    """Tokens a second, and where they come from in words."""

    train: float
    validation: float
    decode: float
    answer_tokens: float
    source: str


def speeds(config: RunConfig, study: Study | None) -> Speeds:
    """The measured speeds of the study's own runs and evaluations; what was not measured is assumed."""
    _, model = locate_model(config, with_weights=False)
    peak, count = peak_flops(jax.devices()[0]), jax.device_count()
    share = (peak or H100_FLOPS) / H100_FLOPS * (count if peak else 1)
    factor = share * H100_PARAMETERS / count_matrix_parameters(model)
    what = (
        f"{count} x {jax.devices()[0].device_kind}" if peak else "one H100 (this machine is not measured yet)"
    )
    train, validation, decode = (factor * rate for rate in (H100_TRAIN, H100_VALIDATION, H100_DECODE))
    source = [f"assumed for {what}, scaled from Qwen3-8B on one H100"]
    runs = [] if study is None else [*study.runs, *study.trials]
    rates = [
        median(speeds)
        for run in runs
        if (speeds := [row["tokens_per_second"] for row in run.rows("train") if row.get("tokens_per_second")])
    ]
    if rates:
        train, validation = fmean(rates), fmean(rates) * H100_VALIDATION / H100_TRAIN
        source = [f"training as measured in {len(rates)} runs here"]
    answers = [] if study is None else list(study.evaluation_summaries.values())
    length = float(min(ANSWER_TOKENS, config.eval.max_new_tokens))
    if answers and all("generated_tokens_per_second" in summary for summary in answers):
        decode = fmean(summary["generated_tokens_per_second"] for summary in answers)
        length = fmean(summary["generated_tokens"] / summary["total"] for summary in answers)
        source.append(f"decoding as measured in {len(answers)} evaluations here")
    return Speeds(train, validation, decode, length, "; ".join(source))


@dataclass(frozen=True)
class PlannedRun:
    """Steps and shifted tokens of one training run."""

    config: RunConfig
    steps: int
    train_tokens: int
    validation_tokens: int

    def hours(self, at: Speeds) -> float:
        return (self.train_tokens / at.train + self.validation_tokens / at.validation) / 3600


def plan_runs(config: RunConfig) -> list[PlannedRun]:
    """All trials and runs of the sweep. Reads the rows, so a Hub file is fetched; loads no weights."""
    folder, _ = locate_model(config, with_weights=False)
    data = config.data
    load = partial(
        load_rendered_rows,
        tokenizer=load_job_tokenizer(config, folder),
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
    )
    train, _ = load(data.train_path, limit=data.train_rows)
    validation, _ = load(data.validation_path, limit=data.validation_rows)
    return [_planned(run, train, validation) for run in (*grid.trials(config), *grid.members(config))]


def _planned(run: RunConfig, train: list[RenderedRow], validation: list[RenderedRow]) -> PlannedRun:
    train, validation = train[: run.data.train_rows], validation[: run.data.validation_rows]
    plan = plan_run(run.optim, run.train, len(train))
    return PlannedRun(
        run,
        plan.total_steps,
        token_count(train) * run.train.epochs,
        token_count(validation) * len(plan.validation_steps),
    )


def plan_table(config: RunConfig) -> Table:
    """The whole plan: every run with steps, tokens and hours, the evaluations, and the sum."""
    results = Path(config.results_dir)
    at = speeds(config, load_study(results, config.prefix) if results.is_dir() else None)
    runs = plan_runs(config)
    problems = len(load_problems(config.eval.benchmark, config.eval.problems))
    table = Table(title=f"the study {config.prefix}, in {config.results_dir}", title_justify="left")
    table.add_column("run", no_wrap=True)
    for name in ("rate", "steps", "train tokens", "validation tokens", "hours"):
        table.add_column(name, justify="right")
    chosen = grid.selects_rates(config)
    for run in runs:
        is_trial = run.config.run_dir.parent.name == grid.TRIALS
        rate = "by the trials" if chosen and not is_trial else grid.rate(run.config.optim.peak_lr)
        table.add_row(run.config.run_id, rate, *_amounts(run, at))
    members = len(grid.members(config))
    answers = (members + 1) * problems * at.answer_tokens
    decoding = answers / at.decode / 3600
    table.add_section()
    table.add_row(f"{members + 1} evaluations", "", "", f"{problems:,} problems each", "", f"{decoding:.2f}")
    table.add_section()
    table.add_row(
        "all",
        "",
        f"{sum(run.steps for run in runs):,}",
        f"{sum(run.train_tokens for run in runs):,}",
        f"{sum(run.validation_tokens for run in runs):,}",
        f"{sum(run.hours(at) for run in runs) + decoding:.2f}",
    )
    table.caption = (
        f"Hours: {at.source}; training at {at.train:,.0f} tokens/s, validation at {at.validation:,.0f},"
        f" decoding at {at.decode:,.0f} with {at.answer_tokens:.0f} tokens an answer. Compilation and loading"
        " are not counted."
    )
    return table


def _amounts(run: PlannedRun, at: Speeds) -> Sequence[str]:
    return f"{run.steps:,}", f"{run.train_tokens:,}", f"{run.validation_tokens:,}", f"{run.hours(at):.2f}"


# --- Status -------------------------------------------------------------------------------------------------

_COLOURS = {"done": "green", "failed": "red", "foreign": "red", "unfinished": "yellow", "redo": "yellow"}


def status_tables(session: Session) -> list[Table]:
    """How far every stage is, and every run."""
    stages = Table(title="stages", title_justify="left")
    for name in ("stage", "state", "why"):
        stages.add_column(name, no_wrap=name == "stage")
    runs = Table(title="runs", title_justify="left")
    for name in ("run", "state", "rate", "step", "validation NLL", "strict score", "why"):
        runs.add_column(
            name, no_wrap=name == "run", justify="left" if name in ("run", "state", "why") else "right"
        )
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
                runs.add_row(*_run_row(task))
            runs.add_section()
    return [stages, runs]


def _run_row(task: Task) -> list[str]:
    state, folder = task.state, task.item.run_dir
    colour = _COLOURS.get(state.kind, "default")
    step = nll = score = ""
    if state.kind == "done":
        summary = read_json(folder / "summary.json")
        step, nll = f"{summary['selected_step']:,}", f"{summary['primary_metric']['value']:.5f}"
    if (folder / "evaluation" / "summary.json").is_file():
        score = f"{read_json(folder / 'evaluation' / 'summary.json')['accuracy']:.2%}"
    rate = "" if state.kind == "waiting" else grid.rate(task.item.optim.peak_lr)
    return [task.name, f"[{colour}]{state.kind}[/{colour}]", rate, step, nll, score, escape(state.why)]
