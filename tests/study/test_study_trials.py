"""The study's command, killed and its products damaged: the results of an undisturbed one, or one line.

Exit code 0 means that everything is there and equal; anything else is refused by name.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import kills
from helpers.study_fixtures import FIELDS, report_of, tiny_base
from helpers.trials import DAMAGE, JSON_DAMAGE, try_damage

from jaxlora.runtime.files import read_json, read_jsonl, write_json_atomic, write_jsonl_atomic

SEED = 20260421
RUN = "results/tiny-all_layer-seed-0"
TRIAL = "results/lr-selection/tiny-all_layer-lr-1e-3"
REPORT = "results/tiny-report"
NOT_SEEN = ("summary.json", "a flipped bit")


def outcome(folder: Path) -> dict:
    """Everything of a study that must not depend on how often it was disturbed."""
    found: dict = dict(report_of(folder))
    for manifest in sorted((folder / "results").rglob("manifest.json")):
        run = manifest.parent
        found |= {f"{run.name}/{name}": value for name, value in kills.outcome(run).items()}
    for file in sorted((folder / "results").rglob("*")):
        if file.name == "predictions.jsonl" or ("adapters" in file.parts and file.is_file()):
            found[str(file.relative_to(folder))] = file.read_bytes()
    found["report"] = sorted(path.name for path in (folder / REPORT).rglob("*"))
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> kills.Tool:
    folder = tmp_path_factory.mktemp("study")
    fields = FIELDS | {"model.path": tiny_base(folder / "model")}
    words = [kills.REPOSITORY / "launch" / "study.py", "--config", kills.REPOSITORY / "configs" / "tiny.py"]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    return kills.Tool(folder / "work", lambda folder: words, outcome)


def another_loss(file: Path) -> None:
    """Edit the loss of the first step."""
    rows = read_jsonl(file)
    rows[0]["loss"] += 1
    write_jsonl_atomic(file, rows)


def another_accuracy(file: Path) -> None:
    """Edit every accuracy of a comparison."""
    file.write_text(file.read_text().replace('"accuracy": 0.0', '"accuracy": 1.0'))


def another_alpha(file: Path) -> None:
    """Let an exported adapter be scaled in another way."""
    write_json_atomic(file, read_json(file) | {"lora_alpha": 64})


EDITS = {
    "another loss": another_loss,
    "another accuracy": another_accuracy,
    "another alpha": another_alpha,
}


def damage(study: kills.Tool, trials: list[tuple[str, str]]) -> Counter[str]:
    """Damage a finished study and give its command again; what stops it is named by its folder."""

    def place(folder: Path, name: str) -> str:
        return "/".join(Path(name).parts[: 3 if "lr-selection" in name else 2])

    return try_damage(study.whole, study.new_folder, trials, study.start, study.compare, place, EDITS)


def damage_all(study: kills.Tool, trials: list[tuple[str, str]], what: str, capsys) -> None:
    """The same; every one of many trials must end, and how many ended how is shown."""
    ends = damage(study, trials)
    with capsys.disabled():
        print(f"\ndamage to the {what} of a study: {dict(ends)}")
    assert ends.total() == len(trials)


def test_edited_products_are_computed_again(study):
    adapter = f"{REPORT}/adapters/tiny-all_layer-seed-0/adapter_config.json"
    trials = [(f"{REPORT}/comparison.json", "another accuracy"), (adapter, "another alpha")]
    assert damage(study, trials) == {"made good": 2}


def test_edited_metrics_and_a_truncated_trial_are_refused_by_name(study):
    trials = [(f"{RUN}/metrics.jsonl", "another loss"), (f"{TRIAL}/metrics.jsonl", "a truncation")]
    assert damage(study, trials) == {"one line": 2}


@pytest.mark.slow
def test_every_fault_in_every_product(study, capsys):
    products = [
        f"{REPORT}/{name}"
        for name in ("comparison.json", "selection.json", "report.html", "report.md",
                     "figures/validation_nll.csv", "figures/validation_nll.png",
                     "figures/validation_nll.provenance.json")
    ]  # fmt: skip
    products += [
        f"{REPORT}/adapters/tiny-all_layer-seed-0/{name}"
        for name in ("adapter_model.safetensors", "adapter_config.json", "jaxlora.json")
    ]
    products += [f"{RUN}/evaluation/{name}" for name in ("summary.json", "predictions.jsonl")]
    trials = [(file, fault) for file in products for fault in DAMAGE]
    trials += [(file, fault) for file in products if file.endswith(".json") for fault in JSON_DAMAGE]
    damage_all(study, trials, "products", capsys)


@pytest.mark.slow
def test_every_fault_in_every_file_of_its_runs(study, capsys):
    files = [f"{run}/{name}" for run in (RUN, TRIAL) for name in ("summary.json", "manifest.json")]
    files += [f"{RUN}/metrics.jsonl", f"{RUN}/selected/adapter_model.safetensors"]
    files += [f"{TRIAL}/metrics.jsonl"]
    trials = [(file, fault) for file in files for fault in DAMAGE]
    # A summary holds the hashes of all else and has none itself; a bit of a field that nobody reads is lost.
    trials = [(file, fault) for file, fault in trials if (Path(file).name, fault) != NOT_SEEN]
    damage_all(study, trials, "runs", capsys)


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_in_the_same_bytes(study, capsys):
    choose = random.Random(SEED)
    begin = time.monotonic()
    study.finish(study.new_folder())  # everything is compiled: how long it takes
    seconds = time.monotonic() - begin
    for _ in range(3):
        folder = study.new_folder()
        for _ in range(4):
            program = study.start(folder)
            time.sleep(choose.uniform(0.05, 0.6) * seconds)
            program.send(signal.SIGKILL)
            code = program.wait()
            assert code in (0, -signal.SIGKILL), program.log()
            if code == 0:
                break
            study.kills[f"at random: {reached(folder)}"] += 1
        study.finish(folder)
    study.report(capsys)
    assert study.kills.total() >= 6


def reached(folder: Path) -> str:
    """The last product that a killed study had made, in words."""
    for name, pattern in (
        ("figures", f"{REPORT}/figures/*.png"),
        ("comparison", f"{REPORT}/comparison.json"),
        ("export", f"{REPORT}/adapters/*"),
        ("selection", f"{REPORT}/selection.json"),
        ("sweep", "results/tiny-*-seed-0/manifest.json"),
        ("trials", "results/lr-selection/*/manifest.json"),
        ("baseline", "results/tiny-base/evaluation/summary.json"),
    ):
        if any(folder.glob(pattern)):
            return f"after a file of {name}"
    return "before the baseline"
