"""Promises of the report: verdict first, self-contained, inert whatever a model wrote, plain about gaps."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from helpers.study_fixtures import FORMAT, HOSTILE, NO_BOX, RIGHT, WRONG, build_study, evaluation, make_report

from jaxlora.runtime.files import read_json, read_jsonl, write_json_atomic
from jaxlora.runtime.pages import script_json
from jaxlora.study import findings
from jaxlora.study.comparison import compare_evaluations
from jaxlora.study.report import escape_markdown


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """The real figures are tested in test_figures.py; here small files stand for them."""

    def write(table, draw, folder, root):
        folder.mkdir(parents=True, exist_ok=True)
        for end in (".png", ".pdf", ".csv", ".provenance.json"):
            (folder / f"{table.name}{end}").write_bytes(b"picture of " + table.name.encode())

    monkeypatch.setattr("jaxlora.study.figures.write_figure", write)


@pytest.fixture
def root(tmp_path):
    return build_study(tmp_path / "results", seeds=(0, 1))


def report(root):
    path = make_report(root)
    return path.read_text(encoding="utf-8"), path.with_suffix(".md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of each kind of element."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.elements[-1][0], data.strip()))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# --- What it says -------------------------------------------------------------------------------------------


def test_the_verdict_comes_first(root):
    html, markdown = report(root)
    texts = [text for tag, text in Page(html).texts if tag not in ("style", "title")]
    assert (
        texts[0] == "Which LoRA adapter of Qwen/Qwen3-8B solves more of GSM8K: attention_only or all_layer?"
    )
    assert texts[1] == "Inconclusive: no condition is called better."
    assert texts[2].startswith("By the strict score, attention_only solves 80.83 % (mean of seeds 0, 1)")
    assert markdown.startswith("# Inconclusive: no condition is called better.\n")


def test_the_studys_figures_give_the_studys_verdict(shared):
    reference = json.loads((shared / "reference" / "study.json").read_text())["gsm8k_eval"]
    runs = [evaluation(None, None, [RIGHT] * 1115 + [NO_BOX] * 31 + [WRONG] * 173)]
    for condition in ("attention_only", "all_layer"):
        for seed in "012":
            right = reference[condition][seed]["correct"]
            runs.append(evaluation(condition, int(seed), [RIGHT] * right + [WRONG] * (1319 - right)))
    comparison = compare_evaluations(runs, resamples=99)
    assert findings.headline(comparison) == "Inconclusive: no condition is called better."
    text = findings.verdicts(comparison)[0]
    assert "attention_only solves 90.55 % (mean of seeds 0, 1, 2) and all_layer solves 90.09 %" in text
    assert "The difference of +0.45 points is below the study's threshold of 1.00 points" in text


def test_a_winner_is_named_and_scores_that_disagree_are_pointed_out():
    first = evaluation("attention_only", 0, [RIGHT] * 60 + [WRONG] * 40)
    second = evaluation("all_layer", 0, [RIGHT] * 50 + [FORMAT] * 10 + [WRONG] * 40)
    comparison = compare_evaluations([first, second], resamples=99)
    assert findings.headline(comparison) == "attention_only scores higher."
    pair, *gains = findings.verdicts(comparison)
    assert "reaches the study's threshold" in pair
    assert "The two scores do not agree" in pair
    assert gains[0] == "The gain of attention_only is not known: the untouched base was not evaluated."


@pytest.mark.parametrize(
    ("base", "adapter", "sentence"),
    [
        ([RIGHT] * 5 + [FORMAT] * 5, [RIGHT] * 9 + [WRONG], "So all of the strict gain is the format"),
        ([RIGHT] * 4 + [FORMAT] * 1 + [WRONG] * 5, [RIGHT] * 8 + [WRONG] * 2, "So 25 % of the strict gain"),
        ([RIGHT] * 5 + [WRONG] * 5, [RIGHT] * 9 + [WRONG], "points and the numeric one by +40.00."),
    ],
)
def test_the_share_of_a_gain_that_is_format_is_said(base, adapter, sentence):
    runs = [evaluation(None, None, base), evaluation("all_layer", 0, adapter)]
    (text,) = findings.verdicts(compare_evaluations(runs, resamples=99))
    assert sentence in text
    assert ("format" in text) == ("format" in sentence or "25 %" in sentence)


def test_the_cost_is_hours_times_devices_times_price():
    """Two runs of 1.5 and 2.5 hours and an evaluation of half an hour, on 8 chips at 1.20 dollars."""
    manifest = {"config": {"price": 1.2}, "device": {"count": 8}}

    def cost(*manifests, seconds=1800):
        study = SimpleNamespace(
            runs=[SimpleNamespace(manifest=manifest) for manifest in manifests],
            evaluation_summaries={"a": {"seconds": seconds}},
        )
        return dict(findings.measured(study, [{"hours": 1.5}, {"hours": 2.5}]))[
            "cost of these hours, dollars"
        ]

    assert cost(manifest, manifest) == f"{4.5 * 8 * 1.2:.2f}"
    assert cost(manifest, manifest, seconds=None) == "not recorded for every run"
    for other in ({}, {"config": {"price": 2.0}, "device": {"count": 8}}):
        assert cost(manifest, other) == "no price was given (--config.price)"


def test_it_tells_how_it_was_run_and_what_it_cannot_say(root):
    html, markdown = report(root)
    for text in (html, markdown):
        for fact in ("code.git_sha", "0123abcd", "packages.jax", "0.10.2", "dataset.train.sha256", "ab" * 32):
            assert fact in text
        assert "not recorded for every run" in text  # the hours of decoding
        assert "attention_only 16, all_layer 32" in text
        assert "A condition has at most 2 seeds" in text
        assert "1e-4, 3e-4, 1e-3 on runs of 50 steps" in text


def test_the_report_names_the_benchmark_that_was_used(root):
    for path in root.glob("test-*/evaluation/summary.json"):
        write_json_atomic(path, read_json(path) | {"dataset": "embedded:data/test.jsonl"})
    html, markdown = report(root)
    assert "Accuracy on the embedded word problems by condition, 60 problems" in html
    assert "GSM8K" not in markdown.split("## How it was run")[0]


def test_a_best_rate_at_the_edge_of_the_grid_is_pointed_out(root):
    assert "is at the edge" not in report(root)[1]
    shutil.rmtree(root / "lr-selection" / "test-all_layer-lr-0.001")
    assert "The best rate of all_layer, 3e-4, is at the edge: no larger one was tried." in report(root)[1]


def test_values_that_differ_between_runs_are_shown_with_their_runs(root):
    path = root / "test-all_layer-seed-1" / "manifest.json"
    write_json_atomic(path, read_json(path) | {"packages": {"jax": "0.11.2"}})
    html, _ = report(root)
    assert "0.11.2 (test-all_layer-seed-1)" in html


def test_long_lists_are_counted():
    assert findings.flatten({"row_ids": list(range(25348))}) == {"row_ids": "(25,348 entries)"}
    assert findings.flatten({"a": {"b": [1, 2], "c": None}}) == {"a.b": "1, 2", "a.c": "not set"}


# --- What is missing is said --------------------------------------------------------------------------------


def test_a_study_that_is_not_finished_is_reported_as_such(root):
    shutil.rmtree(root / "test-base")
    shutil.rmtree(root / "test-all_layer-seed-1" / "evaluation")
    (root / "test-all_layer-seed-0" / "summary.json").unlink()
    html, markdown = report(root)
    for text in (html, markdown):
        assert "There is no finished evaluation of the untouched base." in text
        assert "There is no finished evaluation of test-all_layer-seed-1." in text
        assert "test-all_layer-seed-0 is unfinished." in text
        assert "Only one of the two was evaluated with seed 1." in text


def test_an_empty_directory_still_makes_an_honest_report(tmp_path):
    html, markdown = report(tmp_path)
    for text in (html, markdown):
        assert "No verdict: no finished evaluation was found." in text
        assert "There is no training run whose id begins with test-." in text
        assert "No learning-rate selection is recorded here" in text
    assert not (tmp_path / "report" / "comparison.json").exists()


def test_a_comparison_of_an_earlier_state_does_not_stay_behind(root):
    report(root)
    assert (root / "report" / "comparison.json").exists()
    for folder in root.glob("test-*/evaluation"):
        shutil.rmtree(folder)
    report(root)
    assert not (root / "report" / "comparison.json").exists()


# --- Self-contained, safe, repeatable -----------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_only_its_own_script(root):
    html, _ = report(root)
    page = Page(html)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert "default-src 'none'" in policy
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        assert len(inline) == 1
        digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(image["alt"] for image in page.all("img"))
    assert not page.all("link")
    assert "http://" not in html
    assert "https://" not in html


def test_markup_from_models_data_and_failures_stays_text(root):
    write_json_atomic(root / "test-all_layer-seed-0" / "failure.json", {"error": HOSTILE})
    (root / "test-all_layer-seed-0" / "summary.json").unlink()
    path = root / "test-attention_only-seed-0" / "manifest.json"
    write_json_atomic(path, read_json(path) | {"device": HOSTILE})
    html, markdown = report(root)
    page = Page(html)
    assert len(page.all("script")) == 2
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script>document" not in html
    assert "<script>" not in markdown
    assert "<img" not in markdown
    assert "</script>&lt;" not in html


def test_the_predictions_inside_are_the_predictions_outside(root):
    html, _ = report(root)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])
    assert data["models"][0]["id"] == "test-base"
    for column, model in enumerate(data["models"]):
        records = read_jsonl(root / model["id"] / "evaluation" / "predictions.jsonl")
        assert len(records) == len(data["problems"]) == 60
        for record, problem in zip(records, data["problems"], strict=True):
            assert problem["question"] == record["question"]
            assert problem["answers"][column] == [
                record["generated_text"],
                record["extracted_answer"],
                record["correct"],
                record["correct_numeric"],
                record["stop_reason"] == "length",
            ]


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "\u2028", "é & 'quotes' \"", "]]>", "\\u003c"])
def test_json_inside_a_script_element_cannot_leave_it(text):
    encoded = str(script_json({"text": text}))
    assert "<" not in encoded
    assert json.loads(encoded) == {"text": text}


def test_markdown_cells_stay_cells():
    assert escape_markdown("a|b\n<b>`x`</b>") == "a\\|b &lt;b&gt;\\`x\\`&lt;/b&gt;"


def test_every_table_row_in_markdown_has_the_cells_of_its_header(root):
    _, markdown = report(root)
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_every_link_leads_to_a_file(root):
    html, markdown = report(root)
    links = [anchor["href"] for anchor in Page(html).all("a")]
    inside = {link for link in links if link.startswith("#")}
    ids = {attributes.get("id") for _, attributes in Page(html).elements}
    assert {link[1:] for link in inside} <= ids
    outside = [link for link in links if link not in inside] + re.findall(r"\]\(([^)]+)\)", markdown)
    assert len(outside) > 40
    for link in outside:
        assert (root / "report" / unquote(link)).exists(), link


def test_the_same_results_give_the_same_report(root):
    assert report(root) == report(root)


# --- In a browser -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", None),  # two conditions of seed 0, only one of them right
        ("?filter=all", 60),
        ("?first=test-base&second=test-base&filter=nobox", 8),
        ("?first=test-base&second=test-base&filter=truncated", 2),
        ("?first=test-base&second=test-base&filter=format", 12),
        ("?first=test-base&second=test-base&filter=wrong", 30),
        ("?filter=all&words=1000%20%2B%2017%3F", 1),
    ],
)
def test_the_browser_for_predictions_filters_and_shows_markup_as_text(root, tmp_path, query, found):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    path = make_report(root)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    page = subprocess.run(
        [browser, *flags, "--virtual-time-budget=3000", "--dump-dom", path.as_uri() + query],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    if found is None:
        comparison = read_json(root / "report" / "comparison.json")
        first = comparison["pairs"][0]["strict"]["by_seed"][0]
        found = first["only_first"] + first["only_second"]
    assert f"{found} found among 60 problems" in page
    assert "<title>test: Inconclusive" in page  # the hostile answer did not run
    assert page.count('class="problem"') == min(found, 10)
