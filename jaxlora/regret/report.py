"""What an experiment found, as files: the table of all runs.

path = write_report(lab)
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from jaxlora.regret.worker import Lab
from jaxlora.runtime.files import Record, write_text_atomic

COLUMNS = (
    *("name", "arm", "placement", "rank", "parameters", "batch_rows", "rate", "seed", "steps"),
    *("held_out", "held_out_by_row", "diverged_at", "seconds"),
)


def write_report(lab: Lab) -> Path:
    """Write `runs.csv` beside the runs and return its path."""
    path = lab.folder.path / "runs.csv"
    write_text_atomic(path, runs_csv(list(lab.folder.records().values())))
    return path


def runs_csv(records: list[Record]) -> str:
    """One line a run, its last held-out loss by both definitions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        _, by_token, by_row = record["held_out"][-1]
        own = record | {
            "held_out": by_token,
            "held_out_by_row": by_row,
            "seconds": record["seconds"]["all"],
        }
        writer.writerow(["" if own[name] is None else own[name] for name in COLUMNS])
    return text.getvalue()
