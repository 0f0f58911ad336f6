"""The page for reading a run's answers: one HTML file that works offline.

    write_page(Path("results/rl-tiny-all_layer-seed-0"))      # answers.html there, also of an unfinished run

It shows, batch by batch, problems and their answers with reward, advantage and the reason for the grade, plus
the batch's ratios. Answers are untrusted: they are stored as data in a script element and shown as
`textContent`, and anything that affects a terminal or misleads a reader (escape sequences, marks that reorder
letters) is written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from pydantic import ConfigDict
from typing_extensions import TypedDict

from jaxlora import __version__
from jaxlora.rl.grading import marked_answer
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_numbered_jsonl, write_text_atomic
from jaxlora.runtime.pages import content_policy, page_style, script_json
from jaxlora.runtime.records import check_record, read_manifest, read_metrics
from jaxlora.runtime.text import harmless

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "answers.html"
MOST_BYTES = 24 * 2**20  # of sample files shown on a page: more makes a browser slow
_PLAIN = ("reward", "advantage", "correct", "well_formed", "truncated", "tokens", "logprob")  # as recorded
OF_A_BATCH = (  # label of each figure shown for a batch, and the field of its record
    ("mean reward", "reward/mean"),
    ("right", "reward/correct"),
    ("constant groups", "group/constant"),
    ("cut at the limit", "episode/truncated"),
    ("grader failed", "reward/failed"),
    ("mean ratio", "ratio/mean"),
    ("largest ratio", "ratio/max"),
    ("smallest ratio", "ratio/min"),
    ("ratios outside the clip", "ratio/outside"),
    ("KL v1", "optim/kl_sample_train_v1"),
    ("KL v2", "optim/kl_sample_train_v2"),
    ("entropy", "optim/entropy"),
)
OF_AN_EVALUATION = (("right", "eval_metric"), ("mean reward", "reward/mean"))


class _Sample(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    problem: str
    question: str
    answer: str
    text: str
    reward: float
    correct: bool
    well_formed: bool
    failed: str | None
    truncated: bool
    tokens: int
    logprob: float | None


def write_page(run: Path) -> Path:
    """Write the page of a run that learns from rewards, finished or not, and return its path.

    Raises:
      UserError: this is not such a run, it has no answers yet, or its files are damaged.
    """
    manifest = read_manifest(run)
    if manifest.get("kind") != "rl":
        raise UserError(f"{run}: is not a run of `jaxlora rl`; give the directory of one")
    files = sorted((run / "samples").glob("*.jsonl"), key=lambda file: file.stem.partition("-")[::-1])
    if not files:
        raise UserError(f"{run}: has no answers yet; wait for its first batch")
    rl = (manifest.get("config") or {}).get("rl") or {}
    steps = [_step(file, share, run, rl) for file, share in _shares(files)]
    script = (TEMPLATES / "answers.js").read_text(encoding="utf-8")
    style = page_style()
    render = run / "sample_render.txt"
    text = _template().render(
        version=__version__,
        run=harmless(str(manifest.get("run_id"))),
        facts=[(name, harmless(str(value))) for name, value in _facts(manifest, rl)],
        prompt=harmless(render.read_text(encoding="utf-8", errors="replace")) if render.is_file() else "",
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
        data=script_json({"steps": steps}),
    )
    write_text_atomic(run / PAGE, text)
    return run / PAGE


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("answers.html.j2")


def _facts(manifest: Record, rl: Record) -> list[tuple[str, Any]]:
    """What the answers were sampled from, and the settings."""
    model = (manifest.get("config") or {}).get("model") or {}
    names = ("problems", "reward", "format_weight", "loss", "temperature", "group", "max_new_tokens")
    return [("model", model.get("path")), *((name.replace("_", " "), rl.get(name)) for name in names)]


def _shares(files: Sequence[Path]) -> list[tuple[Path, float]]:
    """The files to show, and the share of each file's groups: everything, unless that is too much.

    Every batch keeps a share, of at least one group; if that is still too much, batches are dropped evenly.
    """
    sizes = np.array([file.stat().st_size for file in files])
    share = min(1.0, MOST_BYTES / max(1, sizes.sum()))
    group = sizes.mean() / 32  # a batch has about 32 groups, of which at least one is shown
    n = min(len(files), max(2, int(MOST_BYTES / max(1.0, group, sizes.mean() * share))))
    chosen = np.unique(np.linspace(0, len(files) - 1, n).round().astype(int))
    return [(files[i], share) for i in chosen]


def _step(file: Path, share: float, run: Path, rl: Record) -> Record:
    """The page's data for one file of answers."""
    kind, _, number = file.stem.partition("-")
    groups: list[list[Record]] = []
    for line, record in read_numbered_jsonl(file, torn_last_line="error"):
        check_record(f"{file}:{line}", record, _Sample)
        if not record.get("sample"):  # the first answer to a problem
            groups.append([])
        if groups:
            groups[-1].append(record)
    shown = np.unique(np.linspace(0, len(groups) - 1, max(1, round(share * len(groups)))).round().astype(int))
    split = "train" if kind == "step" else "validation"
    of = next((x for x in read_metrics(run) if x["split"] == split and x["step"] == int(number)), {})
    named = OF_A_BATCH if kind == "step" else OF_AN_EVALUATION
    return {
        "kind": kind,
        "step": int(number),
        "file": file.name,
        "groups": len(groups),
        "numbers": [[name, of[field]] for name, field in named if of.get(field) is not None],
        "shown": [_group(groups[i], rl) for i in shown],
    }


def _group(records: Sequence[Record], rl: Record) -> Record:
    """The page's data for one problem and its answers."""
    first = records[0]
    return {
        "problem": harmless(first["problem"]),
        "question": harmless(first["question"]),
        "reference": harmless(first["answer"]),
        "mean": float(np.mean([record["reward"] for record in records])),
        "answers": [
            {
                **{name: record.get(name) for name in _PLAIN},
                "failed": record["failed"] is not None,
                "text": harmless(record["text"]),
                "why": harmless(why(record, rl)),
            }
            for record in records
        ],
    }


def why(record: Record, rl: Record) -> str:
    """Explain in words how the reward of an answer came about."""
    reward, weight = str(rl.get("reward")), float(rl.get("format_weight") or 0)
    value = record["reward"] - weight * (record["well_formed"] - 1)
    read = marked_answer(record["text"], tagged=reward == "reasoning_gym")
    if record["failed"] is not None:
        text = f"the grader gave no value ({record['failed']}), which counts as 0"
    elif ":" in reward:
        text = f"{reward} gave {value:g}"
    elif read is None and reward != "reasoning_gym":
        text = f"no box is closed: {value:g}"
    else:
        told = "the whole text" if read is None else repr(read)
        text = f"{told} against the reference: {value:g}"
    if weight and not record["well_formed"]:
        reason = "cut at the limit" if record["truncated"] else "no answer is marked"
        text += f"; {weight:g} less for its form: {reason}"
    return text
