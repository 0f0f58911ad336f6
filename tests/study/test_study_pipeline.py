"""The study as one command: true plans, nothing done twice, the same report however often it was stopped."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.forks import Fork
from helpers.study_fixtures import FIELDS, report_of, tiny_base
from helpers.xla_flags import xla_flags
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import metadata

from jaxlora.cli import load_config
from jaxlora.config import RunConfig, from_dict, to_dict
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json, read_jsonl, write_json_atomic, write_jsonl_atomic
from jaxlora.runtime.folders import is_claimed
from jaxlora.study import STAGE_NAMES, grid
from jaxlora.study.command import _work
from jaxlora.study.grid import Setting
from jaxlora.study.pipeline import Session, Stage, Task, _wait_for_others, run_stages
from jaxlora.study.planning import (
    H100_DECODE,
    H100_TRAIN,
    H100_VALIDATION,
    Speeds,
    _source,
    plan_table,
    status_tables,
)
from jaxlora.study.stages import STAGES, chosen_rates, selection
from jaxlora.study.state import State
from jaxlora.train.display import TrainingDisplay
from jaxlora.train.job import prepare
from jaxlora.train.manifest import identity
from jaxlora.train.run_directory import _lock
from jaxlora.train.schedule import learning_rate, plan_run

STAGE = {stage.name: stage for stage in STAGES}
CONDITIONS = ("attention_only", "all_layer")


# --- The grid -----------------------------------------------------------------------------------------------


def test_the_trials_are_those_of_the_study(repository):
    config = load_config(repository / "configs/main.py")
    trials = grid.trials(config)
    assert [trial.run_id for trial in trials] == [
        f"qwen3-8b-{condition}-lr-{rate}" for condition in CONDITIONS for rate in ("1e-4", "3e-4", "1e-3")
    ]
    for trial, peak in zip(trials, 2 * (1e-4, 3e-4, 1e-3), strict=True):
        plan = plan_run(trial.optim, trial.train, n_rows=trial.data.train_rows or 0)
        assert (trial.data.train_rows, trial.data.validation_rows, trial.seed) == (512, 128, 7)
        assert (plan.total_steps, plan.validation_steps) == (64, (32, 64))
        assert {learning_rate(step, trial.optim, plan) for step in (1, 32, 64)} == {peak}
        assert trial.run_dir == Path("results/lr-selection") / trial.run_id


def test_a_run_of_the_sweep_is_the_run_that_train_would_make(repository):
    config = load_config(repository / "configs/main.py")
    runs = grid.sweep_runs(config, {"attention_only": 3e-4, "all_layer": 1e-4})
    assert [run.run_id for run in runs] == [
        f"qwen3-8b-{condition}-seed-{seed}" for condition in CONDITIONS for seed in (0, 1, 2)
    ]
    assert [run.optim.peak_lr for run in runs] == [3e-4] * 3 + [1e-4] * 3
    overrides = {"lora.condition": "all_layer", "seed": "2", "optim.peak_lr": "1e-4"}
    assert runs[-1] == load_config(repository / "configs/main.py", overrides)


def test_the_ids_of_other_grids_say_what_differs_and_are_read_back(repository):
    config = load_config(repository / "configs/rank_sweep.py")
    runs = grid.sweep_runs(config)
    assert len({run.run_id for run in runs}) == len(runs) == 24
    assert runs[0].run_id == "qwen3-8b-ranks-attention_only-rank-1-lr-1e-4-seed-0"
    for run in runs:
        setting = grid.setting_of(to_dict(run), run.lora.condition)
        assert f"{config.prefix}-{setting}-seed-{run.seed}" == run.run_id
        assert (setting.condition, setting.rank) == (run.lora.condition, run.lora.rank)
        assert (setting.rate, setting.batch_rows) == (run.optim.peak_lr, None)
        assert str(setting.without_rate()) == f"{run.lora.condition}-rank-{run.lora.rank}"
    assert not grid.trials(config)  # the sweep names its own rates
    sweep = replace(config.sweep, conditions=("all_layer",), ranks=(), learning_rates=(), batch_rows=(512,))
    (batches,) = grid.sweep_runs(replace(config, sweep=sweep))
    assert (batches.run_id, batches.train.batch_rows) == ("qwen3-8b-ranks-all_layer-batch-512-seed-0", 512)


def test_the_longest_prefix_gives_names_that_are_allowed(repository):
    overrides = {"prefix": "p" * 100, "sweep.batch_rows": "128", "sweep.seeds": "2147483647"}
    for run in grid.sweep_runs(load_config(repository / "configs/rank_sweep.py", overrides)):
        assert len(run.run_id) > 150
        assert from_dict(to_dict(run)) == run  # as an evaluation reads it from a run's files
    with pytest.raises(UserError, match=r"config\.prefix: 101 characters"):
        load_config(repository / "configs/main.py", {"prefix": "p" * 101})


def test_settings_are_ordered_by_number():
    settings = [
        Setting("all_layer", rank=16),
        Setting("attention_only", rank=4),
        Setting("all_layer", rank=4, rate=1e-3),
        Setting("all_layer", rank=4, rate=3e-4),
    ]
    ordered = sorted(settings, key=lambda setting: setting.order)
    assert ordered == [settings[1], settings[3], settings[2], settings[0]]


def embedded(repository: Path, name: str, results: Path, **fields: object) -> RunConfig:
    """A configuration of the repository over the data that ships with the package."""
    values = {
        "model.path": "embedded:base",
        "data.train_path": "embedded:data/train.jsonl",
        "data.validation_path": "embedded:data/val.jsonl",
        "eval.benchmark": "embedded:data/test.jsonl",
        "results_dir": results,
    }
    return load_config(repository / f"configs/{name}.py", {k: str(v) for k, v in (values | fields).items()})


def text_of(*tables: Table, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(*tables)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "runs", "evaluations"), [("main", 12, 7), ("rank_sweep", 24, 25), ("lr_sweep", 10, 11)]
)
def test_the_plan_counts_every_run_and_writes_nothing(repository, tmp_path, name, runs, evaluations):
    config = embedded(repository, name, tmp_path / "results", **{"data.train_rows": 600})
    text = text_of(plan_table(config))
    assert f"its runs are {config.prefix}-..." in " ".join(text.split())
    assert len(re.findall(r"│ (?:attention_only|all_layer)-", text)) == runs
    assert f"{evaluations} evaluations of " in text
    rows = {line.split("│")[1].strip(): line.split("│") for line in text.splitlines() if line.startswith("│")}
    steps = {run: int(cells[3].replace(",", "")) for run, cells in rows.items() if run.startswith(CONDITIONS)}
    epochs = config.train.epochs
    for run, count in steps.items():
        assert count == (64 if "-seed-" not in run else 75 * epochs), run
    assert int(rows["all"][3].replace(",", "")) == sum(steps.values())
    assert list(tmp_path.iterdir()) == []
    assert "…" not in text_of(plan_table(config), width=80)


def test_a_plan_says_what_it_rests_on_and_never_nan(repository, tmp_path, monkeypatch):
    config = embedded(repository, "tiny", tmp_path / "results")
    some = Speeds(500.0, 1200.0, math.nan, 170.0, _source(1, 0, "not known"))
    monkeypatch.setattr("jaxlora.study.planning.speeds", lambda *_: some)
    text = " ".join(text_of(plan_table(config)).split())
    assert "measured in 1 run here, validation in the same proportion as on one H100; decoding not" in text
    assert "They rest on 500 tokens/s of training, 1,200 tokens/s of validation, and 170 tokens an" in text
    assert not re.search(r"\bnan\b", text)
    assert _source(0, 0, "for one H100") == "for one H100"
    assert (
        _source(0, 7, "for one H100") == "training for one H100; decoding as measured in 7 evaluations here"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"sweep.batch_rows": 1000}, "-batch-1000-seed-0: config.train.batch_rows: 1000 rows, but"),
     ({"sweep.batch_rows": "8,1000"}, "-batch-1000-seed-0: config.train.batch_rows: 1000 rows, but"),
     ({"mesh.fsdp": 3}, "config.mesh: data=1, fsdp=3, tensor=1 does not fit"),
     ({"model.random_weights": "true"}, "config.model.random_weights: the runs of a study share one base"),
     ({"seed": 3}, "config.seed is ignored by studies; set config.sweep.seeds (now 0,1,2)"),
     ({"data.gate_report": "failed.json"}, "data gates: ")],
)  # fmt: skip
def test_the_plan_refuses_a_study_that_must_fail(repository, tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    Path("failed.json").write_text("{}")
    config = embedded(repository, "tiny", tmp_path / "results", **fields)
    with pytest.raises(UserError, match=re.escape(message)):
        plan_table(config)
    assert not (tmp_path / "results").exists()


def test_the_plan_does_not_ask_for_the_gates_that_the_study_will_check(repository, tmp_path, capsys):
    data = repository / "jaxlora/embedded/data"
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(data / name, tmp_path / name)
    paths = {"train_path": tmp_path / "train.jsonl", "validation_path": tmp_path / "val.jsonl"}
    fields = {f"data.{name}": path for name, path in paths.items()}
    text = text_of(plan_table(embedded(repository, "tiny", tmp_path / "results", **fields)))
    assert "│ all_layer-seed-2 " in text
    assert "UNGATED" not in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_plan_rests_on_the_speeds_that_the_readme_states(repository):
    table = (repository / "README.md").read_text().split("## Speed")[1]
    cells = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    first = {row[1].strip(): row[2].strip() for row in cells}
    assert first["training, all_layer"] == f"{H100_TRAIN:,}"
    assert first["validation, all_layer"] == f"{H100_VALIDATION:,}"
    assert first["decoding the GSM8K workload, 384 slots, generated tokens"] == f"{H100_DECODE:,}"


def test_names_that_look_like_markup_are_shown_as_they_are(repository, monkeypatch):
    config = embedded(repository, "tiny", Path("x[/red]"), prefix="[red]t")
    text = text_of(plan_table(config))
    assert "the study [red]t, in x[/red]; its runs are [red]t-..." in text
    assert "│ all_layer-seed-2 " in text

    shown = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    for module in ("jaxlora.train.display", "jaxlora.runtime.progress"):
        monkeypatch.setattr(f"{module}.console", shown)
    job = prepare(grid.sweep_runs(config)[0], with_weights=False)
    with TrainingDisplay(job, first_step=1) as display:
        display.show(1, 0.5, display.rate(100))
        display.validated(2, {2: 0.5})
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]t-attention_only-seed-0" in text
    assert "loss 0.5000" in text
    assert "step 2: validation mean NLL 0.50000 (best so far)" in text


# --- A whole study, in seconds ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A random one-layer model with the embedded tokenizer."""
    return tiny_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def study(model_dir, repository):
    """A function that starts the command in a working directory."""

    def start(folder: Path, *words: str, **fields: object) -> Fork:
        values = FIELDS | {"model.path": model_dir} | fields
        command = [repository / "launch/study.py", "--config", repository / "configs/tiny.py"]
        command += [f"--config.{name}={value}" for name, value in values.items()]
        log = folder.parent / f"{folder.name}-{time.monotonic_ns()}.log"
        environment = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}
        return Fork([*command, *words], cwd=folder, environment=environment, log=log)

    return start


def finish(process: Fork, code: int = 0) -> str:
    try:
        ended = process.wait(900)
    finally:
        process.kill()
    assert ended == code, process.text
    return " ".join(process.text.split())


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory) -> Path:
    """The working directory of a study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(study(folder))
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    return folder


@pytest.fixture
def session(repository, model_dir, copy, monkeypatch) -> Session:
    """The same study in this process, over a copy of its results."""
    monkeypatch.chdir(copy)
    fields = FIELDS | {"model.path": model_dir}
    return Session(load_config(repository / "configs/tiny.py", {k: str(v) for k, v in fields.items()}))


def states(session: Session, name: str) -> dict[str, str]:
    return {task.name: task.state.kind for task in STAGE[name].check(session)}


def test_one_command_makes_everything(finished):
    results = finished / "results"
    runs = [f"tiny-{condition}-seed-0" for condition in CONDITIONS]
    assert {path.name for path in results.iterdir() if not path.name.startswith(".")} == {
        "lr-selection", "tiny-base", "tiny-report", *runs,
    }  # fmt: skip
    report = results / "tiny-report"
    assert {path.name for path in report.iterdir()} == {
        "report.html", "report.md", "comparison.json", "selection.json", "figures", "adapters",
    }  # fmt: skip
    for run in runs:
        adapter = "adapter_model.safetensors"
        assert (report / "adapters" / run / adapter).read_bytes() == (
            results / run / "selected" / adapter
        ).read_bytes()
    comparison = read_json(report / "comparison.json")
    assert [row["run_id"] for row in [comparison["baseline"], *comparison["runs"]]] == ["tiny-base", *runs]
    assert "What is missing here" not in (report / "report.md").read_text(encoding="utf-8")


def test_the_sweep_trains_at_the_rate_that_its_trials_chose(finished):
    results = finished / "results"
    for condition in CONDITIONS:
        lowest = {}
        for rate in ("1e-3", "3e-3"):
            rows = read_jsonl(results / "lr-selection" / f"tiny-{condition}-lr-{rate}" / "metrics.jsonl")
            lowest[float(rate)] = min(row["loss"] for row in rows if row["split"] == "validation")
        manifest = read_json(results / f"tiny-{condition}-seed-0" / "manifest.json")
        assert manifest["config"]["optim"]["peak_lr"] == min(lowest, key=lambda rate: lowest[rate])


def test_a_finished_study_is_left_alone(study, copy):
    def files() -> dict[Path, tuple[int, int]]:
        found = (path for path in copy.rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}

    before = files()
    text = finish(study(copy))
    assert text.count("✓") == len(STAGES)
    assert files() == before


def test_the_status_of_a_finished_study_is_done_everywhere(session):
    text = text_of(*status_tables(session))
    assert text.count("│ done") == len(STAGES) + 4 + 2
    assert not re.search("missing|waiting|failed|unfinished", text)
    assert "…" not in text_of(*status_tables(session), width=80)


def test_the_command_offers_the_stages_that_there_are(repository):
    assert tuple(STAGE_NAMES) == tuple(STAGE)
    watched = "import sys; from jaxlora.study.command import main\ntry: main(argv=['--help'])\n"
    watched += "finally: assert 'jax' not in sys.modules"  # so that help and mistakes answer at once
    shown = subprocess.run(
        [sys.executable, "-c", watched], cwd=repository, capture_output=True, text=True, check=True
    )
    assert ", ".join(STAGE) in " ".join(shown.stdout.split())


def test_each_stage_runs_alone_and_says_what_it_waits_for(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    waiting = {
        "sweep": "learning-rates", "selection": "sweep", "export": "sweep", "evaluation": "sweep",
        "comparison": "baseline", "figures": "sweep", "report": "figures",
    }  # fmt: skip
    for name, needed in waiting.items():
        with pytest.raises(UserError, match=f"stage {name}: .* waits for .*--stage {needed}"):
            run_stages(session, [STAGE[name]])
    assert not (tmp_path / "results").exists()  # looking writes nothing


def test_a_host_that_sees_the_shared_folder_late_looks_again(session, monkeypatch):
    """Process 0 has seen two runs, the first of them finished; this process sees one, and the other later."""
    run = lambda name: Task(name, State("missing"), name)  # noqa: E731
    ended = [Task(name, State("done")) for name in "ab"]
    views = [[run("a")], [run("a")], [run("a"), run("b")], ended]  # the last is the look after the work
    done = []
    stage = Stage("sweep", "", lambda _: views.pop(0), lambda _, tasks: done.extend(tasks), True)
    monkeypatch.setattr(
        "jaxlora.runtime.hosts.broadcast", lambda _: [["a", "done", ""], ["b", "missing", ""]]
    )
    monkeypatch.setattr("time.sleep", lambda _: None)
    run_stages(session, [stage])
    assert (done, views) == ([run("b")], [])
    views += 100 * [[run("a")]]
    monkeypatch.setattr("jaxlora.study.pipeline.LOOK_SECONDS", 0)
    with pytest.raises(
        UserError, match=r"stage sweep: this host does not see in results what process 0 sees"
    ):
        run_stages(session, [stage])


def test_all_hosts_train_with_the_rates_that_process_0_has_chosen(session, monkeypatch):
    trained = []
    monkeypatch.setattr("jaxlora.runtime.hosts.broadcast", lambda rates: [2e-3 for _ in rates])
    monkeypatch.setattr("jaxlora.study.stages._train_run", lambda _, config: trained.append(config))
    tasks = STAGE["sweep"].check(session)
    STAGE["sweep"].run(session, tasks)
    assert [config.run_id for config in trained] == [task.name for task in tasks]
    assert {config.optim.peak_lr for config in trained} == {2e-3}


# --- What is not valid is done again, and nothing else ------------------------------------------------------


RUN, OTHER = (f"tiny-{condition}-seed-0" for condition in CONDITIONS)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "jaxlora.json")


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def forget_hashes(run: Path) -> None:
    """Let the summary of a run hold no hashes of its other files, as in earlier versions."""
    summary = read_json(run / "summary.json")
    del summary["sha256"]
    write_json_atomic(run / "summary.json", summary)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "noted by the selection"])
@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_damaged_adapter_is_made_again_from_its_checkpoint(session, name, recorded):
    run, exported = Path("results") / RUN, session.folder / "adapters" / RUN
    if recorded:
        (session.folder / "selection.json").unlink()
    else:
        forget_hashes(run)
    before = {file: (run / "selected" / file).read_bytes() for file in ADAPTER_FILES}
    checkpoints = {path: path.stat().st_ino for path in (run / "checkpoints").rglob("*")}
    flip(run / "selected" / name)
    (task, _) = STAGE["sweep"].check(session)
    assert task.state == State(
        "redo", f"finished, but selected/{name} is not what was written (its SHA-256 differs)"
    )
    assert states(session, "export") == {OTHER: "done"}  # what is damaged is neither exported nor evaluated
    assert states(session, "evaluation") == {OTHER: "done"}
    with pytest.raises(
        UserError, match=f"stage selection: .* waits for sound files of {RUN}: .*selected/{name}"
    ):
        run_stages(session, [STAGE["selection"]])
    assert run_stages(session, [STAGE["sweep"]]) == []
    assert {path: path.stat().st_ino for path in (run / "checkpoints").rglob("*")} == checkpoints
    for folder in (run / "selected", exported):
        assert {file: (folder / file).read_bytes() for file in ADAPTER_FILES} == before
    assert states(session, "export") == states(session, "evaluation") == {RUN: "done", OTHER: "done"}


@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_damaged_export_is_written_again(session, name, damage):
    exported, own = session.folder / "adapters" / RUN, Path("results") / RUN / "selected"
    damage(exported / name)
    assert states(session, "export") == {RUN: "redo", OTHER: "done"}
    assert run_stages(session, [STAGE["export"]]) == []
    assert (exported / name).read_bytes() == (own / name).read_bytes()


def test_an_export_with_another_alpha_is_written_again(session):
    settings = session.folder / "adapters" / RUN / "adapter_config.json"
    write_json_atomic(settings, read_json(settings) | {"lora_alpha": 64})
    assert states(session, "export") == {RUN: "redo", OTHER: "done"}


def edit_row(file: Path, split: str, **changes: object) -> None:
    """Change the first row of a split in a run's metrics."""
    rows = read_jsonl(file)
    rows[[row["split"] for row in rows].index(split)] |= changes
    write_jsonl_atomic(file, rows)


@pytest.mark.parametrize(
    ("split", "changes", "text"),
    [("validation", {"loss": 0.25}, "validation of step 2: 0.25 and "),
     ("train", {"token_count": 1}, "train tokens: ")],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["learning-rates", "sweep"])
def test_metrics_that_contradict_their_summary_stop_the_study_and_are_named(
    session, stage, split, changes, text
):
    task = STAGE[stage].check(session)[0]
    if stage == "learning-rates":
        text = text.replace("step 2", "step 1")
    forget_hashes(task.item.run_dir)
    edit_row(task.item.run_dir / "metrics.jsonl", split, **changes)
    named = f"{task.item.run_dir}: metrics.jsonl and summary.json contradict each other ({text}"
    with pytest.raises(UserError, match=re.escape(named)) as refused:
        run_stages(session, STAGES)
    assert "delete this folder to train this run again" in str(refused.value)
    assert "overwrite" not in str(refused.value)


def test_metrics_that_moved_without_a_contradiction_are_named_by_their_hash(session):
    assert states(session, "sweep") == {RUN: "done", OTHER: "done"}
    edit_row(Path("results") / RUN / "metrics.jsonl", "train", tokens_per_second=1e9)
    assert states(session, "sweep") == {RUN: "damaged", OTHER: "done"}
    with pytest.raises(UserError, match=r"metrics\.jsonl is not what was written \(its SHA-256 differs\)"):
        run_stages(session, [STAGE["sweep"]])


def test_a_truncated_trial_is_named_and_no_good_run_is_to_be_deleted(session):
    (trial,) = Path("results/lr-selection").glob(
        f"tiny-all_layer-lr-{grid.rate(chosen_rates(session)['all_layer'])}"
    )
    lines = (trial / "metrics.jsonl").read_text().splitlines(keepends=True)
    (trial / "metrics.jsonl").write_text("".join(lines[:-1]))
    forget_hashes(trial)
    assert set(states(session, "sweep").values()) == {"done", "waiting"}  # none is of another configuration
    with pytest.raises(UserError, match=f"{trial}: metrics.jsonl and summary.json contradict each other"):
        run_stages(session, [STAGE["learning-rates"], STAGE["sweep"]])


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"], ids=["edited", "torn", "a list", "no text"])
def test_an_edited_comparison_is_computed_again(session, content):
    file = session.folder / "comparison.json"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"accuracy": 0.0', b'"accuracy": 1.0') if content is None else content)
    assert file.read_bytes() != before
    assert states(session, "comparison") == {"comparison.json": "redo"}
    assert set(states(session, "figures").values()) == {"waiting"}  # nothing is drawn from it
    assert run_stages(session, STAGES) == []
    assert file.read_bytes() == before


def test_an_edited_selection_is_made_again_and_believed_in_nothing(session):
    file = session.folder / "selection.json"
    before = file.read_bytes()
    digest = read_json(file)["runs"][RUN]["selected_sha256"]["selected/adapter_config.json"]
    file.write_bytes(before.replace(digest.encode(), b"0" * 64))
    assert states(session, "sweep") == {RUN: "done", OTHER: "done"}
    assert states(session, "selection") == {"selection.json": "redo"}
    assert run_stages(session, [STAGE["selection"]]) == []
    assert file.read_bytes() == before


def test_an_evaluation_whose_totals_are_not_those_of_its_answers_is_redone(session):
    summary = Path("results") / RUN / "evaluation" / "summary.json"
    write_json_atomic(summary, read_json(summary) | {"accuracy": 1.0})
    (task, _) = STAGE["evaluation"].check(session)
    assert task.state.kind == "redo"
    assert "records accuracy 1.0, but the predictions beside it give 0.0" in task.state.why


def test_a_figure_whose_provenance_is_broken_is_drawn_again(session):
    (session.folder / "figures/validation_nll.provenance.json").write_text("{")
    assert states(session, "figures")["validation_nll"] == "redo"


@pytest.mark.parametrize("content", [b"{", b"\xff\n", None], ids=["torn", "no text", "gone"])
def test_metrics_that_cannot_be_read_are_named_and_trained_again_where_asked(session, content):
    metrics = Path("results") / RUN / "metrics.jsonl"
    before = [row["loss"] for row in read_jsonl(metrics)]
    if content is None:
        metrics.unlink()
    else:
        metrics.write_bytes(content + metrics.read_bytes())
    with pytest.raises(
        UserError, match=rf"results/{RUN}: .*metrics\.jsonl.* delete this folder to train this run"
    ):
        run_stages(session, [STAGE["sweep"]])
    asked = Session(replace(session.config, overwrite=True))
    assert run_stages(asked, [STAGE["sweep"]]) == []
    after = [row["loss"] for row in read_jsonl(metrics)]  # compiled with other options than the command's
    assert after == pytest.approx(before, rel=1e-5)


def test_a_manifest_that_was_edited_after_its_run_is_named(session):
    run = Path("results") / RUN
    manifest = read_json(run / "manifest.json")
    manifest["config"]["lora"]["rank"] = 4  # looks like another configuration, and is not
    write_json_atomic(run / "manifest.json", manifest)
    (task, _) = STAGE["sweep"].check(session)
    assert task.state == State("damaged", "manifest.json is not what was written (its SHA-256 differs)")


# --- What was read must not change under a study ------------------------------------------------------------


@pytest.fixture
def moving(session, repository, tmp_path) -> Session:
    """The session over data, base and tokenizer that a test may change, their hashes taken."""
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(repository / "jaxlora/embedded/data" / name, tmp_path / name)
    shutil.copytree(session.config.model.path, tmp_path / "base")
    config = replace(
        session.config,
        model=replace(session.config.model, path=str(tmp_path / "base")),
        data=replace(
            session.config.data,
            train_path=str(tmp_path / "train.jsonl"),
            validation_path=str(tmp_path / "val.jsonl"),
        ),
    )
    moving = Session(config)
    assert set(states(moving, "learning-rates").values()) == {"done"}
    return moving


@pytest.mark.parametrize(
    ("name", "field"),
    [("train.jsonl", "data.train_path"), ("val.jsonl", "data.validation_path"),
     ("base/model.safetensors", "model.path"), ("base/tokenizer_config.json", "model.tokenizer")],
)  # fmt: skip
def test_files_that_change_between_two_stages_stop_the_study(moving, tmp_path, name, field):
    file = tmp_path / name
    file.write_bytes(
        file.read_bytes() + b"\n" if file.suffix != ".safetensors" else file.read_bytes()[:-1] + b"~"
    )
    with pytest.raises(UserError, match=rf"config\.{field}: .* changed while the study was running"):
        run_stages(moving, [STAGE["sweep"]])


def test_data_that_changes_while_a_run_reads_it_stops_the_study(moving, tmp_path, monkeypatch):
    """The run's manifest might name the new file, though its rows are those of the old one."""
    run_stages(moving, [STAGE["gates"]])
    shutil.rmtree(Path("results") / RUN)

    def change(job, *_):
        (tmp_path / "train.jsonl").write_text("")
        return SimpleNamespace(step=2, mean_nll=0.5)

    monkeypatch.setattr("jaxlora.study.stages.train", change)
    with pytest.raises(UserError, match="changed while the study was running"):
        run_stages(moving, [STAGE["sweep"]])


@pytest.mark.parametrize("name", ["sha256", "tokens_sha256"])
def test_runs_that_were_trained_on_different_rows_are_not_compared(session, name):
    manifest = read_json(Path("results") / OTHER / "manifest.json")
    manifest["dataset"]["train"][name] = "0" * 64
    write_json_atomic(Path("results") / OTHER / "manifest.json", manifest)
    with pytest.raises(UserError, match=rf"{OTHER}: .* the data of {RUN} \(dataset\.train\.{name} differs"):
        selection(session)


# --- A study that is not finished says so -------------------------------------------------------------------


def test_a_study_without_a_finished_run_is_not_a_success(session, capsys):
    for run in (RUN, OTHER):
        fail(Path("results") / run, "Diverged: step 2: loss nan")
    assert _work(session, None) == 2  # the same command would end in the same way
    shown = " ".join(capsys.readouterr().err.split())
    assert "the study is not finished: stage selection: selection.json waiting for a finished run" in shown
    assert "the report is" not in shown


def test_a_run_that_failed_and_one_that_waits_for_it_are_named(session, monkeypatch, capsys):
    fail(Path("results/lr-selection/tiny-all_layer-lr-1e-3"), "XlaRuntimeError: out of memory")

    def break_down(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("jaxlora.study.stages.train", break_down)
    assert _work(session, None) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "tiny-all_layer-lr-1e-3 failed (XlaRuntimeError: out of memory)" in shown
    assert f"stage sweep: {OTHER} waiting for its learning rate" in shown
    assert shown.rstrip().endswith("The same command tries again")
    assert session.accidents == ["tiny-all_layer-lr-1e-3"]


def test_a_finished_study_is_a_success(session, capsys):
    assert _work(session, None) == 0
    shown = " ".join(capsys.readouterr().err.split())
    report = Path("results/tiny-report/report.md").read_text()
    (headline,) = (line for line in report.splitlines() if line.startswith("# "))
    assert headline.lstrip("# ") in shown  # the verdict
    assert shown.endswith("the report is results/tiny-report/report.html")


# --- Evaluations of something else --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("checkpoint", "step-2000"), ("base_fingerprint", "0" * 64), ("benchmark_sha256", "0" * 64),
     ("prompts_sha256", "0" * 64), ("max_new_tokens", 512), ("seed", 5), ("status", "failed")],
)  # fmt: skip
def test_an_evaluation_of_something_else_is_redone(session, field, value):
    run, other = (f"tiny-{condition}-seed-0" for condition in CONDITIONS)
    summary = Path("results") / run / "evaluation" / "summary.json"
    write_json_atomic(summary, read_json(summary) | {field: value})
    assert states(session, "evaluation") == {run: "redo", other: "done"}


def test_changed_predictions_are_made_again_and_compared_again(session):
    assert set(states(session, "comparison").values()) == {"done"}
    predictions = Path("results/tiny-base/evaluation/predictions.jsonl")
    records = read_jsonl(predictions)
    write_jsonl_atomic(predictions, [records[0] | {"generated_text": "no box"}, *records[1:]])
    assert states(session, "baseline") == {"tiny-base": "redo"}
    assert states(session, "comparison") == {"comparison.json": "redo"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"train.epochs": 2}, "train.epochs: 1 then, 2 now"),
     ({"lora.alpha": 16}, "lora.alpha: 32.0 then, 16.0 now"),
     ({"optim.b2": 0.99}, "optim.b2"), ({"data.train_path": "rows/train.jsonl"}, "dataset.train.sha256")],
)  # fmt: skip
def test_runs_of_another_configuration_are_named_and_not_overwritten(session, fields, named, repository):
    Path("rows").mkdir()
    data = repository / "jaxlora/embedded/data"
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("rows/train.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    values = FIELDS | {"model.path": session.config.model.path} | fields
    other = Session(load_config(repository / "configs/tiny.py", {k: str(v) for k, v in values.items()}))
    assert "foreign" in {*states(other, "learning-rates").values(), *states(other, "sweep").values()}
    with pytest.raises(UserError, match=re.escape(named) + ".*--config.overwrite=true"):
        run_stages(other, [STAGE["learning-rates"], STAGE["sweep"]])


def test_another_base_is_noticed_by_its_bytes(session, model_dir, tmp_path, repository):
    other = tmp_path / "other base"
    shutil.copytree(model_dir, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    moved = Session(replace(session.config, model=replace(session.config.model, path=str(other))))
    assert set(states(moved, "learning-rates").values()) == {"foreign"}
    assert states(moved, "baseline") == {"tiny-base": "redo"}


def test_a_base_that_only_moved_is_the_same_base(session, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "moved")
    moved = Session(
        replace(session.config, model=replace(session.config.model, path=str(tmp_path / "moved")))
    )
    assert {*states(moved, "sweep").values(), *states(moved, "evaluation").values()} == {"done"}


def test_a_finished_run_without_its_adapter_is_trained_again(session):
    shutil.rmtree("results/tiny-all_layer-seed-0/selected")
    assert states(session, "sweep") == {"tiny-attention_only-seed-0": "done", "tiny-all_layer-seed-0": "redo"}


def test_a_lost_figure_and_an_edited_report_are_made_again(session):
    report = Path("results/tiny-report")
    before = (report / "report.html").read_bytes(), (report / "figures/validation_nll.png").read_bytes()
    (report / "figures/validation_nll.png").unlink()
    assert [name for name, state in states(session, "figures").items() if state != "done"] == [
        "validation_nll"
    ]
    assert set(states(session, "report").values()) == {"waiting"}
    (report / "report.html").write_text("edited")
    run_stages(session, [STAGE["figures"], STAGE["report"]])
    assert before == (
        (report / "report.html").read_bytes(),
        (report / "figures/validation_nll.png").read_bytes(),
    )


def test_a_selection_that_contradicts_its_metrics_is_refused(session):
    run = Path("results/tiny-all_layer-seed-0")
    write_json_atomic(run / "summary.json", read_json(run / "summary.json") | {"selected_step": 2})
    with pytest.raises(UserError, match=r"summary\.json selects step 2, its metrics select step 3"):
        run_stages(session, [STAGE["selection"]])


def test_random_weights_are_refused_because_every_seed_would_have_another_base(session):
    session = Session(replace(session.config, model=replace(session.config.model, random_weights=True)))
    with pytest.raises(UserError, match="the runs of a study share one base"):
        run_stages(session, [STAGE["learning-rates"]])


def test_gates_that_do_not_know_the_benchmark_are_run_again(session, tmp_path):
    problems = [{"question": "How many?", "answer": "#### 3"}]
    write_jsonl_atomic(tmp_path / "other.jsonl", problems)
    other = Session(
        replace(session.config, eval=replace(session.config.eval, benchmark=str(tmp_path / "other.jsonl")))
    )
    assert set(states(other, "gates").values()) == {"redo"}
    with pytest.raises(
        UserError, match=r"data gates: .*tools/check_dataset\.py"
    ):  # it is not ours to replace
        run_stages(other, [STAGE["gates"]])


def test_data_without_a_gate_report_is_gated_into_the_studys_own_folder(session, repository, tmp_path):
    data = repository / "jaxlora/embedded/data"
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(data / name, tmp_path / name)
    paths = {"train_path": str(tmp_path / "train.jsonl"), "validation_path": str(tmp_path / "val.jsonl")}
    own = Session(replace(session.config, data=replace(session.config.data, **paths)))
    run_stages(own, [STAGE["gates"]])
    assert read_json(own.folder / "contamination.json")["passed"] is True
    assert set(states(own, "gates").values()) == {"done"}
    rows = read_jsonl(tmp_path / "val.jsonl")
    write_jsonl_atomic(tmp_path / "val.jsonl", [*rows, read_jsonl(tmp_path / "train.jsonl")[0]])
    with pytest.raises(UserError, match="gate shared_row_id failed with 1 overlaps"):
        run_stages(own, [STAGE["gates"]])


# --- Failed runs --------------------------------------------------------------------------------------------


def fail(run: Path, error: str) -> None:
    """Make a finished run look as if it had ended in an error."""
    (run / "summary.json").unlink()
    write_json_atomic(run / "failure.json", {"stage": "training", "step": 2, "error": error})


def test_a_trial_that_diverged_is_ineligible_and_is_not_tried_again(session):
    best = f"{chosen_rates(session)['all_layer']:g}"
    (worse,) = {"0.001", "0.003"} - {best}
    fail(
        Path("results/lr-selection") / f"tiny-all_layer-lr-{grid.rate(float(best))}",
        "Diverged: step 2: loss nan",
    )
    assert chosen_rates(session)["all_layer"] == float(worse)
    left = [task.name for task in STAGE["learning-rates"].check(session) if not task.state.final]
    assert left == []


def test_a_trial_that_failed_by_accident_is_tried_again_before_a_rate_is_chosen(session):
    fail(Path("results/lr-selection/tiny-all_layer-lr-1e-3"), "XlaRuntimeError: out of memory")
    assert "all_layer" not in chosen_rates(session)
    assert states(session, "sweep") == {
        "tiny-attention_only-seed-0": "done",
        "tiny-all_layer-seed-0": "waiting",
    }


def test_no_rate_is_chosen_where_every_trial_failed(session):
    for rate in ("1e-3", "3e-3"):
        fail(Path(f"results/lr-selection/tiny-all_layer-lr-{rate}"), "Diverged: step 1: loss nan")
    with pytest.raises(UserError, match="no learning rate can be selected"):
        chosen_rates(session)


def test_another_grid_with_a_run_that_diverges_ends_in_a_report_that_says_so(study, tmp_path):
    fields = {"sweep.conditions": "all_layer", "sweep.ranks": "4", "sweep.learning_rates": "1e-3,1e30",
              "lora.alpha": 1}  # fmt: skip
    finish(study(tmp_path, **fields))
    report = (tmp_path / "results/tiny-report/report.md").read_text(encoding="utf-8")
    assert "tiny-all_layer-rank-4-lr-1e30-seed-0 is failed (Diverged: step" in report
    assert (tmp_path / "results/tiny-all_layer-rank-4-lr-1e-3-seed-0/evaluation/summary.json").is_file()
    minimum = (tmp_path / "results/tiny-report/figures/learning_rate_minimum.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in minimum[1:]] == ["all_layer-rank-4"] * 2
    assert all(line.endswith(",0.001") for line in minimum[1:])
    assert not (tmp_path / "results/lr-selection").exists()
    assert finish(study(tmp_path, **fields)).count("✓") == len(STAGES)


# --- Stopped anywhere ---------------------------------------------------------------------------------------


def wait_for(condition, process: Fork, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


PLACES = {
    "a trial": "lr-selection/tiny-all_layer-lr-1e-3/metrics.jsonl",
    "the sweep": "tiny-attention_only-seed-0/metrics.jsonl",
    "an evaluation": "tiny-report/adapters/tiny-all_layer-seed-0/jaxlora.json",
    "the figures": "tiny-report/comparison.json",
}


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=[pytest.mark.slow] if place != "the sweep" else []) for place in PLACES],
)
def test_a_study_killed_in_the_middle_ends_in_the_same_report(finished, study, tmp_path, place):
    process = study(tmp_path)
    file = tmp_path / "results" / PLACES[place]
    wait_for(lambda: file.is_file() and file.stat().st_size > 0, process)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL, "the study ended before it was killed"
    assert not (tmp_path / "results/tiny-report/report.html").exists()
    finish(study(tmp_path))
    assert report_of(tmp_path) == report_of(finished)


@pytest.mark.slow
def test_a_study_asked_to_stop_exits_with_75_and_goes_on(finished, study, tmp_path):
    process = study(tmp_path)
    file = tmp_path / "results" / PLACES["the sweep"]
    wait_for(lambda: file.is_file() and file.stat().st_size > 0, process)
    process.send_signal(signal.SIGTERM)
    assert "the same command" in finish(process, code=75)
    finish(study(tmp_path))
    assert report_of(tmp_path) == report_of(finished)


# --- TensorBoard --------------------------------------------------------------------------------------------


def hparams_of(run: Path) -> tuple[dict, dict]:
    """Settings and last scalars of a run, from its event files."""
    settings, scalars = {}, {}
    for file in sorted((run / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == metadata.SESSION_START_INFO_TAG:
                    content = metadata.parse_session_start_info_plugin_data(
                        value.metadata.plugin_data.content
                    )
                    settings = {k: v.string_value or v.number_value for k, v in content.hparams.items()}
                elif value.tensor.float_val:
                    scalars[value.tag] = value.tensor.float_val[0]
    return settings, scalars


def test_tensorboard_knows_the_settings_and_the_outcome_of_every_run(finished):
    for condition in CONDITIONS:
        run = finished / "results" / f"tiny-{condition}-seed-0"
        settings, scalars = hparams_of(run)
        config = read_json(run / "manifest.json")["config"]
        assert settings["condition"] == condition
        assert settings["learning_rate"] == config["optim"]["peak_lr"]
        assert (settings["rank"], settings["seed"]) == (config["lora"]["rank"], 0)
        nll = read_json(run / "summary.json")["primary_metric"]["value"]
        assert scalars["final/validation_nll"] == pytest.approx(nll, rel=1e-6)
        accuracy = read_json(run / "evaluation/summary.json")["accuracy"]
        assert scalars["final/accuracy_strict"] == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.slow
def test_tensorboard_shows_all_runs_in_one_table(finished):
    from tensorboard.program import TensorBoard

    board = TensorBoard()
    board.configure(argv=["", "--logdir", str(finished / "results"), "--port", "0", "--load_fast", "false"])
    url = board.launch()
    asked = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_RUNNING", "STATUS_UNKNOWN"],
        "colParams": [{"metric": {"group": "", "tag": "final/validation_nll"}}],
        "startIndex": 0,
        "sliceSize": 100,
    }
    request = urllib.request.Request(
        f"{url}data/plugin/hparams/session_groups",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    groups: list[dict] = []
    deadline = time.monotonic() + 120
    while len(groups) < 6 and time.monotonic() < deadline:
        time.sleep(1)
        groups = json.loads(urllib.request.urlopen(request).read()).get("sessionGroups", [])
    shown = {group["name"]: group for group in groups}
    for condition in CONDITIONS:
        run = f"tiny-{condition}-seed-0"
        group = shown[f"{run}/tensorboard"]
        assert group["hparams"]["condition"] == condition
        nll = read_json(finished / "results" / run / "summary.json")["primary_metric"]["value"]
        outcome = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        assert outcome["final/validation_nll"] == pytest.approx(nll, rel=1e-6)
    assert sum("lr-selection/" in name for name in shown) == 4


def test_a_run_of_the_study_has_the_identity_of_a_lone_run(finished, session):
    rates = chosen_rates(session)
    for run in grid.sweep_runs(session.config, rates):
        stored = identity(read_json(finished / run.run_dir / "manifest.json"))
        assert stored["seed"] == run.seed
        assert stored["optim.peak_lr"] == rates[run.lora.condition]
        assert stored["name"] is None
        json.dumps(stored)


# --- Several processes --------------------------------------------------------------------------------------


def test_what_another_process_is_at_is_waited_for_and_taken_over_where_it_leaves_it(session, monkeypatch):
    """A run is missing; another process holds it at first, and then ends before it is done."""
    run = Path("results") / RUN
    shutil.rmtree(run)
    trained, looks = [], []
    monkeypatch.setattr("jaxlora.study.stages._train_run", lambda _, config: trained.append(config.run_id))
    with _lock(run.with_name(f".{RUN}.lock"), run):
        assert is_claimed(run)
    assert not is_claimed(run)
    monkeypatch.setattr("jaxlora.study.pipeline.is_claimed", lambda out: looks.append(out) or len(looks) < 3)
    monkeypatch.setattr("time.sleep", lambda _: None)
    (task, _) = STAGE["sweep"].check(session)
    assert (task.name, task.state.kind) == (RUN, "missing")
    session.others = [(STAGE["sweep"], RUN)]
    _wait_for_others(session)
    assert (looks, trained) == (3 * [run], [RUN])


@pytest.mark.slow
def test_two_processes_make_one_study(repository, tmp_path):
    """Each run and each evaluation is made once, both processes end well, and the report is whole."""
    words = ["--config", "tiny", f"--config.results_dir={tmp_path}", "--config.sweep.seeds=0"]
    words += ["--config.data.train_rows=16", "--config.data.validation_rows=8", "--config.train.epochs=1"]
    words += ["--config.eval.problems=4", "--config.eval.max_new_tokens=8", "--config.selection.train_rows=8"]
    both = [
        subprocess.Popen([sys.executable, "-m", "jaxlora", "study", *words], cwd=repository) for _ in range(2)
    ]
    assert [process.wait() for process in both] == [0, 0]
    report = (tmp_path / "tiny-report" / "report.html").read_text()
    for condition in CONDITIONS:
        folder = tmp_path / f"tiny-{condition}-seed-0"
        steps = [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if row["split"] == "train"]
        assert steps == [1, 2]
        assert (folder / "evaluation" / "summary.json").is_file()
        assert condition in report
