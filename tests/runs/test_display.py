"""What is printed while a run trains: a line that lives on a terminal, lines with the time elsewhere."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console

from jaxlora.cli import load_config
from jaxlora.rl.display import Display
from jaxlora.rl.job import prepare as prepare_rl
from jaxlora.runtime import progress
from jaxlora.train.display import TrainingDisplay
from jaxlora.train.job import Job, prepare, token_count

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
SHAPE = (1, 8, 96)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return prepare(
        replace(load_config("tiny"), results_dir=str(tmp_path_factory.mktemp("results"))), with_weights=False
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def shown_on(monkeypatch, terminal: bool) -> io.StringIO:
    file = io.StringIO()
    shown = Console(width=200, file=file, force_terminal=terminal, highlight=False)
    for module in ("jaxlora.train.display", "jaxlora.runtime.progress"):
        monkeypatch.setattr(f"{module}.console", shown)
    return file


def test_off_a_terminal_a_line_with_the_time_comes_at_most_every_thirty_seconds(job, clock, monkeypatch):
    file = shown_on(monkeypatch, terminal=False)
    steps = job.plan.total_steps
    with TrainingDisplay(job, first_step=1) as display:
        with display.compiling("training step", SHAPE):
            clock[0] += 12.34
        with display.compiling("training step", SHAPE):  # it is compiled already
            clock[0] += 5
        for step in range(1, steps + 1):
            clock[0] += 2
            display.show(step, 0.5, display.rate(100))
    lines = file.getvalue().splitlines()
    assert all(re.match(STAMP, line) for line in lines)
    lines = [re.sub(STAMP, "", line) for line in lines]
    title = "the training step for buffers of 1 x 8 x 96"
    assert lines[:2] == [f"compiling {title}", f"compiled {title} in 12.3 s"]
    found = [re.fullmatch(r"step (\d+) of 120 · loss 0.5000 · (.*)", line) for line in lines[2:]]
    assert [int(match[1]) for match in found] == [7, 22, 37, 52, 67, 82, 97, 112, 120]
    assert all(re.fullmatch(r"50 tokens/s · ETA \d:\d\d:\d\d", match[2]) for match in found)
    # At 50 tokens/s; a validation that was not timed yet takes a third of a pass over its rows.
    a_step, a_validation = token_count(job.train_rows) / 60 / 50, token_count(job.validation_rows) / 150
    for match in found:
        step = int(match[1])
        left = (120 - step) * a_step + sum(s > step for s in job.plan.validation_steps) * a_validation
        assert match[2].endswith(f"ETA {timedelta(seconds=int(left))}")


def test_a_long_validation_gives_signs_of_life_too(job, clock, monkeypatch):
    file = shown_on(monkeypatch, terminal=False)
    with TrainingDisplay(job, first_step=1) as display:
        for batch in range(1, 6):
            clock[0] += 20
            display.validating(batch)
        display.validated(10, {10: 0.25})
    lines = [re.sub(STAMP, "", line) for line in file.getvalue().splitlines()]
    assert lines == [
        "validating, batch 2 of 5",
        "validating, batch 4 of 5",
        "step 10: validation mean NLL 0.25000 (best so far)",
    ]


def test_learning_from_rewards_shows_its_line_in_the_same_way(tmp_path, clock, monkeypatch):
    job = prepare_rl(replace(load_config("rl_tiny"), results_dir=str(tmp_path)), with_weights=False)
    file = shown_on(monkeypatch, terminal=False)
    numbers = {"reward/mean": 0.5, "group/constant": 0.25, "ratio/max": None, "tokens_per_second": 1000.0}
    with Display(job, done=28) as display:
        for answers in (100, 200):
            clock[0] += 20
            display.say(f"step 29: sampling, {answers} of 256 answers")
        for step in (29, 30):
            display.show_batch(step, numbers)
        display.evaluated(30, 0.5)
    lines = [re.sub(STAMP, "", line) for line in file.getvalue().splitlines()]
    assert lines == [
        "step 29: sampling, 200 of 256 answers",
        "step 30 of 30 · reward 0.500 · constant 25% · 1,000 sampled tokens/s",
        "step 30: 50.00% of the held-out problems are right",
    ]


def test_on_a_terminal_compiling_counts_its_seconds(job, clock, monkeypatch):
    file = shown_on(monkeypatch, terminal=True)
    with TrainingDisplay(job, first_step=1) as display, display.compiling("training step", SHAPE):
        clock[0] += 42
        display._progress.refresh()
    text = file.getvalue()
    assert "compiling the training step, 42 s" in text
    assert "compiled the training step for buffers of 1 x 8 x 96 in 42.0 s" in text
    assert not re.search(STAMP, text)


def test_a_bar_that_cannot_be_drawn_counts_in_lines(clock, monkeypatch):
    file = shown_on(monkeypatch, terminal=False)
    with progress.progress_bar(f"tokenising {Path('[red]rows')}", 1000, "rows") as advance:
        for _ in range(10):
            clock[0] += 8
            advance(100)
    lines = [re.sub(STAMP, "", line) for line in file.getvalue().splitlines()]
    assert lines == ["tokenising [red]rows: 400 of 1,000 rows", "tokenising [red]rows: 800 of 1,000 rows"]
