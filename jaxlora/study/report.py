"""The report: one HTML file that works offline, and the same in Markdown.

    study = load_study(Path("results"), prefix="qwen3-8b")
    comparison = write_comparison(study, folder)               # `folder / "comparison.json"`
    files = render_report(study, comparison, folder)           # {"report.md": ..., "report.html": ...}

The HTML file loads nothing: styles, script, figures and predictions are embedded. Anything written by a model
or a dataset is shown as text: Jinja escapes it, the predictions browser sets `textContent`, and a content
security policy allows no script but the report's own.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from jaxlora import __version__
from jaxlora.evals.answers import strict_match
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_object, sha256_of, write_json_atomic
from jaxlora.runtime.pages import content_policy, page_style, script_json
from jaxlora.study import findings
from jaxlora.study.comparison import compare_evaluations
from jaxlora.study.figures import plan_figures
from jaxlora.study.results import Study

TEMPLATES = Path(__file__).parent / "templates"
_AS_TABLE = ("primary_comparison", "accounting")  # shown as tables; their pictures are for slides
_WITH_ROWS = ("gsm8k_accuracy", "disagreement", "learning_rate_selection")  # a figure followed by its rows
_MEASURED = "throughput"  # all measured times are in this section, so that the rest can be compared
_OWN_ARTIFACTS = ("comparison.json", "selection.json", "contamination.json", "adapters", "figures")
_ARTIFACTS = (
    "manifest.json",
    "metrics.jsonl",
    "summary.json",
    "failure.json",
    "sample_render.txt",
    "selected",
    "tensorboard",
    "evaluation/predictions.jsonl",
    "evaluation/summary.json",
)


def write_comparison(study: Study, folder: Path) -> dict[str, Any] | None:
    """Compare and write `comparison.json`; without evaluations, delete an old one."""
    if not study.evaluations:
        (folder / "comparison.json").unlink(missing_ok=True)
        return None
    comparison = compare_evaluations(study.evaluations) | {"made_from": comparison_inputs(study)}
    write_derived(folder / "comparison.json", comparison)
    return comparison


def stored_comparison(study: Study, folder: Path) -> dict[str, Any] | None:
    """The content of `comparison.json` if it is unmodified and of exactly these evaluations, else None."""
    if not study.evaluations:
        return None
    stored = read_derived(folder / "comparison.json")
    return stored if stored.get("made_from") == comparison_inputs(study) else None


def write_derived(file: Path, content: Record) -> None:
    """Write a JSON object that can be regenerated at any time, including a hash of its content."""
    write_json_atomic(file, content | {"content_sha256": _content_sha256(content)})


def read_derived(file: Path) -> Record:
    """What `write_derived` wrote; empty if the file is missing or has been modified."""
    try:
        content = read_object(file)
    except UserError:
        return {}
    return content if content.pop("content_sha256", None) == _content_sha256(content) else {}


def _content_sha256(content: Record) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def comparison_inputs(study: Study) -> dict[str, Any]:
    """What determines a comparison, by SHA-256: the code, including the threshold, and all predictions."""
    code = (
        Path(inspect.getfile(compare_evaluations)).read_bytes()
        + Path(inspect.getfile(strict_match)).read_bytes()
    )
    return {
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "predictions_sha256": {
            run.run_id: sha256_of(study.directory / run.run_id / "evaluation" / "predictions.jsonl")
            for run in study.evaluations
        },
    }


def render_report(study: Study, comparison: dict[str, Any] | None, folder: Path) -> dict[str, str]:
    """The report's files by name; the pictures must be in `folder / "figures"`."""
    content = _content(study, comparison, folder)
    return {
        "report.md": _environment().get_template("report.md.j2").render(content),
        "report.html": _html(study, content, folder / "figures"),
    }


def _content(study: Study, comparison: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    figures, not_drawn = plan_figures(study, comparison)
    drawn = [table for table, _ in figures]
    by_name = {table.name: table.rows for table in drawn}
    rows = by_name.get("accounting", ())
    facts = findings.how_it_was_run(study)
    return {
        "version": __version__,
        "prefix": study.prefix,
        "question": findings.question(study),
        "headline": findings.headline(comparison),
        "verdicts": findings.verdicts(comparison),
        "tables": drawn,
        "as_table": _AS_TABLE,
        "with_rows": _WITH_ROWS,
        "totals": findings.totals(study, rows),
        "measured": findings.measured(study, by_name.get(_MEASURED, ())),
        "measured_table": _MEASURED,
        "how": [fact for fact in facts if not fact[0].startswith("config.")],
        "configuration": [fact for fact in facts if fact[0].startswith("config.")],
        "evaluation": findings.evaluation_settings(study),
        "limits": findings.caveats(study, comparison, rows),
        "absent": list(dict.fromkeys((*study.absent, *not_drawn))),
        "links": _links(study, folder),
    }


def _links(study: Study, folder: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """For the study and each run, the artifacts that exist, as (name, path relative to the report)."""
    directories = [run.directory for run in (*study.runs, *study.trials)]
    base = study.directory / f"{study.prefix}-base"
    if base.is_dir():
        directories.insert(0, base)

    def present(directory: Path, names: tuple[str, ...]) -> list[tuple[str, str]]:
        places = [(name, directory / name) for name in names if (directory / name).exists()]
        return [(name, Path(os.path.relpath(place, folder)).as_posix()) for name, place in places]

    own = ("the study", present(folder, _OWN_ARTIFACTS))
    return [own, *((directory.name, present(directory, _ARTIFACTS)) for directory in directories)]


# --- HTML ---------------------------------------------------------------------------------------------------


def _html(study: Study, content: dict[str, Any], figures: Path) -> str:
    style = page_style()
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    pictures = {
        table.name: "data:image/png;base64,"
        + base64.b64encode((figures / f"{table.name}.png").read_bytes()).decode("ascii")
        for table in content["tables"]
    }
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            content,
            style=Markup(style),
            script=Markup(script),
            policy=content_policy(style, script),
            pictures=pictures,
            predictions=script_json(predictions(study)),
        )
    )


def predictions(study: Study) -> dict[str, Any]:
    """The data of the predictions browser: each problem once, with every model's answer to it.

    An answer is `[text, extracted answer or null, strict, numeric, truncated]`.
    """
    if not study.evaluations:
        return {"models": [], "problems": []}
    return {
        "models": [
            {"id": evaluation.run_id, "condition": evaluation.condition, "seed": evaluation.seed}
            for evaluation in study.evaluations
        ],
        "problems": [
            {
                "index": first["benchmark_index"],
                "question": first["question"],
                "reference": first["reference_answer"],
                "answers": [
                    [
                        answer["generated_text"],
                        answer["extracted_answer"],
                        answer["correct"],
                        answer["correct_numeric"],
                        answer["stop_reason"] == "length",
                    ]
                    for answer in (evaluation.records[row] for evaluation in study.evaluations)
                ],
            }
            for row, first in enumerate(study.evaluations[0].records)
        ],
    }


# --- Templates ----------------------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    return environment


def escape_markdown(text: str) -> str:
    """Escape text so that it stays one plain table cell or paragraph in Markdown."""
    text = " ".join(str(text).split())
    for mark in "\\`*[]|":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
