"""Evaluation, export and dataset building, disturbed as runs are: the same command ends in the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import kills
from helpers.kills import differing
from helpers.trials import DAMAGE, JSON_DAMAGE, fill, flip_a_bit, one_line, small_disk, try_damage

import jaxlora
from jaxlora.data.build import FILES, BuildPlan, build
from jaxlora.runtime.errors import UserError

REPOSITORY = kills.REPOSITORY
RUN = kills.RUN_ID
WEIGHTS = f"{RUN}/selected/adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(lab) -> Path:
    """A finished run that nothing disturbed."""
    return lab.whole.path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def full_disk(tool: kills.Tool, moment: str, code: int, nth: int = 1) -> None:
    """Fill the disk at a moment: one line; with room again, the same command succeeds."""
    folder = tool.new_folder()
    aside = shutil.move(folder, folder.with_name(f"{folder.name}-aside"))
    with small_disk(folder, "50m"):
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        before = files_of(folder)
        program = tool.pause_at(folder, moment, nth=nth)
        filler = fill(folder)
        assert program.go_on() == code, program.log()
        message = one_line(program.log())
        assert "disk" in message
        assert str(folder) in message
        filler.unlink()
        assert files_of(folder).items() >= before.items()
        assert not [name for name in files_of(folder) if name.endswith((".tmp", ".lock"))]
        tool.finish(folder)


def test_from_python_too_a_damaged_run_is_not_opened(lab, run, tmp_path):
    engine, copy = jaxlora.load(lab.folder / "model"), tmp_path / run.name
    shutil.copytree(run, copy)
    assert engine.open(copy).seed == 0
    flip_a_bit(copy / "selected" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: is not what the run wrote"):
        engine.open(copy)


# --- Evaluation ---------------------------------------------------------------------------------------------

MEASURED = ("seconds", "generated_tokens_per_second")
UNTOUCHED = [*kills.EVALUATION][: [*kills.EVALUATION].index("predictions in their place, no metrics")]


def evaluation_outcome(folder: Path) -> dict:
    """An evaluation without its times, and the names of all that lies there."""
    run = folder / RUN
    found: dict = {"names": sorted(path.name for path in run.iterdir())}
    found |= {f"evaluation/{path.name}": path.read_bytes() for path in (run / "evaluation").iterdir()}
    for name in ("evaluation/summary.json", "evaluation/metrics.jsonl"):
        found[name] = {k: v for k, v in json.loads(found[name]).items() if k not in MEASURED}
    return found


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, lab, run) -> kills.Tool:
    """`--overwrite` over the evaluation of fewer problems."""
    base = [REPOSITORY / "launch" / "evaluate.py", *lab.options, "--overwrite", "--config.eval.batch_rows=2"]
    base += ["--config.eval.max_new_tokens=8"]
    older: list[Path] = []

    def words(folder: Path) -> list[str | Path]:
        return [*base, "--config.eval.problems=6", "--run", folder / RUN]

    def prepare(folder: Path) -> None:
        shutil.copytree(older[0] if older else run, folder / RUN)

    first = kills.Tool(
        tmp_path_factory.mktemp("older"),
        lambda folder: [*base, "--config.eval.problems=2", "--run", folder / RUN],
        evaluation_outcome,
        prepare,
    )
    older.append(first.whole / RUN)
    return kills.Tool(tmp_path_factory.mktemp("evaluation"), words, evaluation_outcome, prepare)


def test_an_evaluation_killed_at_each_named_moment_leaves_no_trace(evaluation, capsys):
    folder = evaluation.new_folder()
    before = files_of(folder / RUN / "evaluation")
    for moment in kills.EVALUATION:
        evaluation.kill_at(folder, moment)
        left = files_of(folder / RUN / "evaluation")
        if moment in UNTOUCHED:
            assert left.items() >= before.items(), moment
    evaluation.finish(folder)
    evaluation.report(capsys)


def test_of_two_evaluations_at_once_the_second_is_one_line(evaluation):
    folder = evaluation.new_folder()
    first = evaluation.pause_at(folder, "all staged, no file in its place")
    second = evaluation.start(folder)
    assert second.wait() == 2
    assert "another process is writing it" in one_line(second.log())
    assert first.go_on() == 0, first.log()
    evaluation.compare(folder)


@pytest.mark.parametrize("moment", ["in the middle of the answers", "claimed, base not loaded"])
def test_an_evaluation_whose_disk_fills_up(evaluation, moment):
    full_disk(evaluation, moment, code=1)


def another_word(file: Path) -> None:
    """Leave every row as readable as it was."""
    file.write_text(file.read_text().replace("More words", "More wards", 1))


def damage(
    tool: kills.Tool, trials: list[tuple[str, str]], place: Callable[[Path, str], str] | None = None
) -> dict[str, int]:
    """Do faults to the inputs of a command; what it says, or what it leaves, must be right."""
    sound = tool.new_folder()
    named = place or (lambda folder, name: str(folder / Path(name).parent))
    more = {"another word": another_word}
    return dict(try_damage(sound, tool.new_folder, trials, tool.start, tool.compare, named, more))


def test_an_evaluation_of_a_damaged_run_is_refused(evaluation):
    trials = [(WEIGHTS, "a flipped bit"), (f"{RUN}/selected/adapter_config.json", "a flipped bit")]
    assert damage(evaluation, trials) == {"one line": 2}


def selected_trials() -> list[tuple[str, str]]:
    """Every fault in every file that an evaluation and an export read of a run."""
    names = ("adapter_model.safetensors", "adapter_config.json", "jaxlora.json")
    files = [f"{RUN}/selected/{name}" for name in names] + [f"{RUN}/manifest.json", f"{RUN}/summary.json"]
    trials = [(file, fault) for file in files for fault in DAMAGE]
    return trials + [(file, fault) for file in files if file.endswith(".json") for fault in JSON_DAMAGE]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["evaluation", "export"])
def test_every_fault_in_every_file_of_a_run_that_is_read(tool, request, capsys):
    ends = damage(request.getfixturevalue(tool), selected_trials(), lambda folder, name: str(folder))
    with capsys.disabled():
        print(f"\ndamage to a run, {tool}: {ends}")
    assert sum(ends.values()) == len(selected_trials())


# --- Export -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory, lab, run) -> kills.Tool:
    def words(folder: Path) -> list[str | Path]:
        own = folder / RUN
        out = ["--out", folder / "adapter", "--merged", folder / "merged"]
        return [REPOSITORY / "tools" / "export.py", "--run", own, *out]

    def prepare(folder: Path) -> None:
        shutil.copytree(run, folder / RUN)

    def outcome(folder: Path) -> dict[str, bytes]:
        return {name: value for name, value in files_of(folder).items() if not name.startswith(RUN)}

    return kills.Tool(tmp_path_factory.mktemp("export"), words, outcome, prepare)


EXPORTED = [(moment, nth) for nth in (1, 2) for moment in kills.EXPORT]  # the adapter, then the merged model
IN_PLACE = ("exported and in its place", 2)  # the command is done: it would be refused


@pytest.mark.parametrize("again", [False, True], ids=["new", "overwriting an adapter"])
def test_an_export_killed_at_each_named_moment_leaves_nothing_for_good(export, again, capsys):
    for moment, nth in EXPORTED:
        if (moment, nth) == IN_PLACE:
            continue
        folder = export.new_folder()
        words = []
        if again:
            shutil.copytree(export.whole / "adapter", folder / "adapter")
            (folder / "adapter" / "jaxlora.json").write_text("{}")
            words = ["--overwrite"]
        export.kill_at(folder, moment, *words, nth=nth)
        export.finish(folder, *words)
    export.report(capsys)


def test_an_export_whose_disk_fills_up(export):
    full_disk(export, "half of the weights exported", code=1, nth=2)


def test_an_export_of_a_damaged_run_is_refused(export):
    trials = [(WEIGHTS, "a flipped bit"), (f"{RUN}/selected/jaxlora.json", "a flipped bit")]
    assert damage(export, trials) == {"one line": 2}


# --- Datasets -----------------------------------------------------------------------------------------------


def write_rows(file: Path, number: int) -> Path:
    """A source of this many problems."""
    rows = (
        {
            "problem": f"Problem number {i}?",
            "generated_solution": f"Thus \\boxed{{6}}, case {i}. " + "More words. " * 40,
            "expected_answer": "6",
            "problem_source": "gsm8k" if i % 3 else "math",
        }
        for i in range(number)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def building(tmp_path_factory) -> kills.Tool:
    """`--overwrite` over a dataset of fewer rows."""
    folder = tmp_path_factory.mktemp("building")
    source, fewer = write_rows(folder / "rows.jsonl", 300), write_rows(folder / "fewer.jsonl", 60)
    tool = [REPOSITORY / "tools" / "build_dataset.py", "--source", source, "--overwrite", "--out"]

    def prepare(folder: Path) -> None:
        build(BuildPlan(str(fewer), None, folder / "data"))

    return kills.Tool(folder / "work", lambda folder: [*tool, folder / "data"], files_of, prepare)


MOVED = {  # where the older dataset is then
    "built, not in its place": ".data.replaced",
    "in its place, the older one not deleted": ".data.replaced",
}


def test_a_build_killed_at_each_named_moment_leaves_no_trace(building, capsys):
    folder = building.new_folder()
    older = files_of(folder / "data")
    for moment in kills.BUILDING:
        for nth in (1, 200) if moment.startswith("a row") else (1,):
            building.kill_at(folder, moment, nth=nth)
            assert differing(files_of(folder / MOVED.get(moment, "data")), older) == [], moment
    building.finish(folder)
    building.report(capsys)


def test_a_dataset_that_was_moved_aside_is_kept_by_a_build_that_fails_or_may_not_replace_it(building):
    folder = building.new_folder()
    older = files_of(folder / "data")
    building.kill_at(folder, "built, not in its place")
    assert not (folder / "data").exists()
    bad = folder.with_suffix(".jsonl")
    bad.write_text("{broken\n")
    for source in (str(bad), str(building.words(folder)[2])):  # the second one without --overwrite
        with pytest.raises(
            UserError, match="exists; choose another" if source != str(bad) else "broken|JSON"
        ):
            build(BuildPlan(source, None, folder / "data", overwrite=source == str(bad)))
        assert differing(files_of(folder / "data"), older) == []
        assert [path.name for path in folder.iterdir()] == ["data"]


def test_a_build_whose_disk_fills_up(building):
    full_disk(building, "a row accepted", code=2, nth=100)
    full_disk(building, "a row of a part written", code=2)


@pytest.mark.slow
def test_disks_of_every_size_for_a_build(building):
    for size in ("180k", "260k", "420k", "480k", "560k"):
        folder = building.new_folder()
        aside = shutil.move(folder, folder.with_name(f"{folder.name}-aside"))
        with small_disk(folder, size) as resize:
            shutil.copytree(aside, folder, dirs_exist_ok=True)
            older = files_of(folder)
            program = building.start(folder)
            assert program.wait() == 2, f"{size}: {program.log()}"
            assert "is full; nothing was written" in one_line(program.log())
            assert differing(files_of(folder), older) == []
            resize("50m")
            building.finish(folder)


def test_a_source_that_is_replaced_while_it_is_read_is_not_recorded_as_if_it_had_been_read(
    building, tmp_path
):
    source = write_rows(tmp_path / "rows.jsonl", 40)
    words = ["--source", source]  # the last one counts
    folder = building.new_folder()
    older = files_of(folder)
    program = building.pause_at(folder, "rows accepted, not split", *words)
    write_rows(source, 41)
    assert program.go_on() == 2, program.log()
    assert f"{source}: changed while it was being read" in one_line(program.log())
    assert differing(files_of(folder), older) == []


@pytest.fixture(scope="module")
def checking(building, tmp_path_factory) -> kills.Tool:
    """The gates over a dataset that was built: the next stage."""
    tool = [REPOSITORY / "tools" / "check_dataset.py", "--benchmark", "embedded:data/test.jsonl"]
    return kills.Tool(
        tmp_path_factory.mktemp("checking"),
        lambda folder: [*tool, folder / "data"],
        lambda folder: {name: content for name, content in files_of(folder).items() if "contam" not in name},
        lambda folder: shutil.copytree(building.whole / "data", folder / "data"),
    )


def test_damage_to_a_built_dataset_is_found_by_the_next_stage(checking):
    trials = [(f"data/{name}", fault) for name in FILES for fault in ("another word", "a missing file")]
    assert damage(checking, trials) == {"one line": len(trials)}


@pytest.mark.slow
def test_every_fault_in_every_file_of_a_built_dataset(checking, capsys):
    trials = [(f"data/{name}", fault) for name in FILES for fault in DAMAGE]
    ends = damage(checking, trials)
    with capsys.disabled():
        print(f"\ndamage to a built dataset: {ends}")
    assert ends == {"one line": len(trials)}
