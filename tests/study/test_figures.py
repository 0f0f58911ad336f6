"""Promises of the figures: four files each, the same bytes every time, readable in grey, honest axes."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json

import matplotlib
import pytest
from helpers.study_fixtures import build_study
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from jaxlora.study import drawings, tables, training_tables
from jaxlora.study.comparison import compare_evaluations
from jaxlora.study.figures import draw_figures, is_current, plan_figures, to_csv, write_figure
from jaxlora.study.grid import Setting
from jaxlora.study.results import load_study

NAMES = {
    "primary_comparison",
    "gsm8k_accuracy",
    "disagreement",
    "accounting",
    "validation_nll",
    "learning_rate_selection",
    "learning_rate_minimum",
    "throughput",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return load_study(build_study(tmp_path_factory.mktemp("study"), seeds=(0, 1)), "test")


@pytest.fixture(scope="module")
def comparison(study):
    return compare_evaluations(study.evaluations, resamples=99)


@pytest.fixture(scope="module")
def folder(study, comparison):
    figures, absent = plan_figures(study, comparison)
    assert {table.name for table, _ in figures} == NAMES
    assert absent == []
    draw_figures(figures, study.directory / "report" / "figures", study.directory)
    return study.directory / "report" / "figures"


def test_every_figure_has_its_picture_its_data_and_its_provenance(folder):
    assert {path.name for path in folder.iterdir()} == {
        name + end for name in NAMES for end in (".png", ".pdf", ".csv", ".provenance.json")
    }
    for name in NAMES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_provenance_names_the_inputs_and_outputs_by_their_hashes(folder, study):
    for path in folder.glob("*.provenance.json"):
        provenance = json.loads(path.read_text())
        assert provenance["inputs"]
        for root, entries in ((study.directory, provenance["inputs"]), (folder, provenance["outputs"])):
            for entry in entries:
                content = (root / entry["path"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == entry["sha256"]
                assert len(content) == entry["bytes"]


def test_the_same_inputs_give_the_same_bytes(folder, study, comparison, tmp_path):
    table = training_tables.learning_rates(study)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False}):  # nor do a user's own settings matter
        write_figure(table, drawings.draw_learning_rates, tmp_path, study.directory)
    for end in (".png", ".pdf", ".csv", ".provenance.json"):
        name = table.name + end
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_csv_holds_the_values_in_full_precision(folder, comparison):
    rows = list(csv.DictReader(io.StringIO((folder / "primary_comparison.csv").read_text())))
    assert [row["condition"] for row in rows] == ["untouched base", "attention_only", "all_layer"]
    assert float(rows[1]["strict_mean"]) == comparison["conditions"][0]["strict"]["mean"]
    assert rows[0]["strict_delta"] == ""
    low, high = map(float, rows[1]["strict_delta_interval"].split())
    assert [low, high] == comparison["conditions"][0]["strict"]["delta_interval"]


def test_a_study_without_evaluations_still_draws_its_training(study, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.study.figures.write_figure", lambda *_: None)
    figures, absent = plan_figures(study, None)
    draw_figures(figures, tmp_path, study.directory)
    assert {table.name for table, _ in figures} == NAMES - {
        "primary_comparison",
        "gsm8k_accuracy",
        "disagreement",
    }
    assert absent == ["Without an evaluation there is no comparison to draw."]


def test_conditions_differ_in_lightness_marker_and_line():
    looks = drawings.looks(map(Setting, ["attention_only", "mlp_only", "all_layer"]))
    grey = [
        sum(w * c for w, c in zip((0.299, 0.587, 0.114), to_rgb(look["color"]), strict=True))
        for look in looks.values()
    ]
    assert min(abs(a - b) for i, a in enumerate(grey) for b in grey[:i]) > 0.1
    for part in ("marker", "linestyle", "color"):
        assert len({look[part] for look in looks.values()}) == 3
    all_layer = Setting("all_layer")
    assert drawings.looks([all_layer])[all_layer] == looks[all_layer]  # the same in every figure
    others = drawings.looks(map(Setting, ["one", "two", "three"]))
    assert len({look["color"] for look in others.values()}) == 3


def test_settings_of_one_condition_keep_its_hue_and_differ_in_lightness_and_marker():
    settings = [Setting(c, rank=r) for c in ("attention_only", "all_layer") for r in (1, 4, 16)]
    looks = drawings.looks(reversed(settings))
    assert list(looks) == settings  # by number, not by letter
    all_layer = Setting("all_layer")
    assert (
        looks[Setting("all_layer", rank=1)]["color"].lower()
        == drawings.looks([all_layer])[all_layer]["color"].lower()
    )
    for condition in ("attention_only", "all_layer"):
        own = [look for setting, look in looks.items() if setting.condition == condition]
        sums = [sum(to_rgb(look["color"])) for look in own]
        assert sums == sorted(sums)
        assert len({look["marker"] for look in own}) == 3


def test_a_figure_is_current_until_its_data_its_files_or_its_inputs_change(
    folder, study, comparison, tmp_path
):
    table = training_tables.validation(study)
    write_figure(table, drawings.draw_validation_nll, tmp_path, study.directory)
    assert is_current(table, tmp_path, study.directory)
    changed = dataclasses.replace(table, rows=table.rows[:-1])
    assert not is_current(changed, tmp_path, study.directory)
    picture = tmp_path / f"{table.name}.png"
    picture.write_bytes(picture.read_bytes()[:-1])
    assert not is_current(table, tmp_path, study.directory)


def test_an_axis_that_does_not_begin_at_zero_says_so_and_bars_begin_there(study, comparison):
    for table, draw, axis in (
        (tables.accuracy(study, comparison), lambda t: drawings.draw_accuracy(t, 0.01), "x"),
        (training_tables.validation(study), drawings.draw_validation_nll, "y"),
        (training_tables.learning_rates(study), drawings.draw_learning_rates, "y"),
        (training_tables.rate_minimum(study), drawings.draw_rate_minimum, "y"),
        (training_tables.throughput(study), drawings.draw_throughput, "x"),
        (tables.disagreement(study, comparison), drawings.draw_disagreement, "x"),
    ):
        (axes,) = draw(table).axes
        low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
        label = axes.get_xlabel() if axis == "x" else axes.get_ylabel()
        assert (low <= 0 <= high) or "does not begin at zero" in label, table.name


def test_every_seed_is_shown_with_its_own_value(study, comparison):
    table = tables.accuracy(study, comparison)
    (axes,) = drawings.draw_accuracy(table, 0.01).axes
    drawn = {float(x) for line in axes.lines if line.get_marker() in ("o", "s") for x in line.get_xdata()}
    for row in table.rows:
        if row["condition"]:
            assert {row["accuracy"], row["accuracy_numeric"]} <= drawn


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scores", [[0.0], [0.9], [0.9, 0.901], [0.9, 0.92], [0.3, 0.9]])
def test_the_ruler_of_accuracies_is_inside_however_close_they_are(study, comparison, scores):
    table = tables.accuracy(study, comparison)
    rows = [
        row | dict.fromkeys(("accuracy", "accuracy_numeric"), scores[i % len(scores)])
        for i, row in enumerate(table.rows)
    ]
    figure = drawings.draw_accuracy(dataclasses.replace(table, rows=tuple(rows)), 0.01)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axes,) = figure.axes
    (label,) = (text for text in axes.texts if "difference" in text.get_text())
    inside, own = axes.get_window_extent(renderer), label.get_window_extent(renderer)
    assert inside.x0 < own.x0 < own.x1 < inside.x1


def test_to_csv_quotes_what_needs_it():
    table = tables.Table("t", "T", "", (tables.Column("a", "A"),), ({"a": 'x,"y"\n'}, {}), ())
    assert to_csv(table) == 'a\n"x,""y""\n"\n""\n'
