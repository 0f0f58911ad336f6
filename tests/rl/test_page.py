"""The page of a run's answers: it shows what the files say, whatever stands in them, and loads nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.rl import make_model, records, rl_config, ruled_rewards, run

from jaxlora.commands import rl as command
from jaxlora.rl import page
from jaxlora.rl.page import why, write_page
from jaxlora.runtime.errors import UserError

SAMPLES = "samples/step-000001.jsonl"
ATTACKS = (
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "<!-- <script>",
    "\x1b]0;taken\x07\x1b[31m",
    "\u202eevil\u2066",
    "{{ 7 * 7 }}",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    config = rl_config(make_model(folder / "model"), folder, steps=2)
    with ruled_rewards():
        run(config)
    return config


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.run_dir, tmp_path / "run"))


def data(run: Path) -> dict:
    text = (run / page.PAGE).read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found)


def samples(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "samples" / f"{name}.jsonl").read_text().splitlines()]


def test_it_shows_every_batch_and_evaluation_with_the_numbers_of_the_files(finished):
    steps = data(finished.run_dir)["steps"]
    assert [(step["kind"], step["step"]) for step in steps] == [
        ("eval", 0), ("eval", 1), ("step", 1), ("eval", 2), ("step", 2),
    ]  # fmt: skip
    first = next(step for step in steps if step["kind"] == "step")
    lines = samples(finished.run_dir, "step-000001")
    told = [answer for group in first["shown"] for answer in group["answers"]]
    assert [answer["reward"] for answer in told] == [line["reward"] for line in lines]
    assert [len(group["answers"]) for group in first["shown"]] == [4] * 4
    for group in first["shown"]:  # advantages by hand
        rewards = [answer["reward"] for answer in group["answers"]]
        mean = sum(rewards) / 4
        assert group["mean"] == mean
        assert [answer["advantage"] for answer in group["answers"]] == pytest.approx(
            [reward - mean for reward in rewards]
        )
    record = records(finished)[0]
    assert dict(first["numbers"])["largest ratio"] == record["ratio/max"]
    assert dict(first["numbers"])["mean reward"] == record["reward/mean"]
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    assert summary["artifact_paths"]["answers"] == page.PAGE


def test_hostile_answers_are_text_and_nothing_of_them_runs(copy):
    file = copy / "samples" / "step-000001.jsonl"
    lines = samples(copy, "step-000001")
    for line, attack in zip(lines, ATTACKS, strict=False):
        line |= {"text": attack, "question": attack, "answer": attack, "problem": attack, "failed": attack}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(copy)
    text = (copy / page.PAGE).read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert "unsafe" not in text
    group = data(copy)["steps"][2]["shown"][0]
    told = [answer["text"] for answer in group["answers"]]
    assert told == [*ATTACKS[:3], r"\x1b]0;taken\x07\x1b[31m"]
    assert group["question"] == ATTACKS[0]
    (second, *_) = data(copy)["steps"][2]["shown"][1]["answers"]
    assert second["text"] == r"\u202eevil\u2066"
    script = (page.TEMPLATES / "answers.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_a_long_run_is_thinned_evenly_and_says_so(copy, monkeypatch):
    sizes = sum(file.stat().st_size for file in (copy / "samples").iterdir())
    monkeypatch.setattr(page, "MOST_BYTES", sizes // 2)
    write_page(copy)
    steps = data(copy)["steps"]
    assert [step["step"] for step in steps] == [0, 1, 1, 2, 2]
    assert all(step["groups"] == 4 for step in steps)
    assert all(len(step["shown"]) == 2 for step in steps)
    monkeypatch.setattr(page, "MOST_BYTES", 1)
    write_page(copy)
    assert [(step["kind"], step["step"]) for step in data(copy)["steps"]] == [("eval", 0), ("step", 2)]


def test_a_run_that_goes_on_has_a_page_on_demand(copy, monkeypatch, capsys):
    for name in ("summary.json", page.PAGE):
        (copy / name).unlink()
    monkeypatch.setattr(sys, "argv", ["jaxlora rl", "--report", str(copy)])
    assert command.main() == 0
    assert (copy / page.PAGE).is_file()
    assert "answers.html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run), "manifest.json"),
        (lambda run: shutil.rmtree(run / "samples"), "has no answers yet; wait for its first batch"),
        (lambda run: change(run / "manifest.json", kind="train"), "is not a run of `jaxlora rl`"),
        (
            lambda run: (run / SAMPLES).write_text('{"text": 3}\n'),
            "step-000001.jsonl:1: ",
        ),
        (lambda run: (run / SAMPLES).write_text("{"), "step-000001.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("[]\n"), "metrics.jsonl"),
        (lambda run: (run / "samples/step-many.jsonl").write_text("{}\n"), "step-many.jsonl"),
    ],
    ids=["no run", "no answers", "another kind", "a field", "torn", "metrics", "name"],
)
def test_what_is_no_run_or_damaged_is_one_line(copy, spoil, message):
    spoil(copy)
    with pytest.raises(UserError) as caught:
        write_page(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("words", [["--report"], ["--report="], ["--report", "a", "--config", "tiny"]])
def test_a_report_takes_a_run_and_nothing_else(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxlora rl", *words])
    with pytest.raises(UserError, match="--report: takes the directory of a run and no other option"):
        command.main()


RECORD = {"text": r"\boxed{5}", "answer": "6", "reward": 0.0, "well_formed": True, "truncated": False}
RECORD["failed"] = None
FAILED = "the grader gave no value (time limit), which counts as 0"
WHOLE = "the whole text against the reference: 1"


@pytest.mark.parametrize(
    ("record", "rl", "told"),
    [
        ({}, {"reward": "gsm8k_strict"}, "'5' against the reference: 0"),
        ({"text": "6", "well_formed": False}, {"reward": "math"}, "no box is closed: 0"),
        (
            {"reward": 0.9, "well_formed": False, "truncated": True},
            {"reward": "math", "format_weight": 0.1},
            "'5' against the reference: 1; 0.1 less for its form: cut at the limit",
        ),
        ({"reward": 0.25}, {"reward": "mine:score"}, "mine:score gave 0.25"),
        ({"failed": "time limit"}, {"reward": "mine:score"}, FAILED),
        ({"text": "<answer>7</answer>"}, {"reward": "reasoning_gym"}, "'7' against the reference: 0"),
        ({"text": "7", "reward": 1.0}, {"reward": "reasoning_gym"}, WHOLE),
    ],
)  # fmt: skip
def test_why_an_answer_was_graded_so_is_said(record, rl, told):
    assert why(RECORD | record, rl) == told


@pytest.mark.slow
def test_a_browser_shows_it_and_runs_nothing_of_an_answer(copy):
    chromium = shutil.which("chromium") or pytest.skip("Chromium is not installed")
    file = copy / "samples" / "step-000001.jsonl"
    lines = samples(copy, "step-000001")
    for line, attack in zip(lines, ATTACKS, strict=False):
        line |= {"text": attack}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(copy)
    words = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=4000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*words, f"file://{copy / page.PAGE}?step=1"], capture_output=True, text=True, timeout=120
    )
    assert "taken</title>" not in done.stdout
    assert done.stdout.count('class="answer"') == 16
    assert "&lt;img src=x onerror" in done.stdout
