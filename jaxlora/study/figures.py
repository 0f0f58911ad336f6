"""Write the study's figures, each as a PNG, a PDF, a CSV of its data, and a provenance JSON.

    figures, left_out = plan_figures(study, comparison)
    draw_figures(figures, Path("results/report/figures"), study.directory)

Every figure draws exactly one `Table`. Files contain no dates, so the same inputs give the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_json, write_json_atomic, write_text_atomic
from jaxlora.runtime.progress import progress_bar
from jaxlora.study import drawings, tables, training_tables
from jaxlora.study.results import Study
from jaxlora.study.tables import Table

ENDS = (".png", ".pdf", ".csv")
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}


Drawing = Callable[[Table], Figure]


def draw_figures(figures: Sequence[tuple[Table, Drawing]], folder: Path, root: Path) -> None:
    """Write these figures into `folder`; provenance names their inputs relative to `root`."""
    with progress_bar("drawing figures", total=len(figures), unit="figures") as advance:
        for table, draw in figures:
            write_figure(table, draw, folder, root)
            advance(1)


def plan_figures(
    study: Study, comparison: dict[str, Any] | None
) -> tuple[list[tuple[Table, Drawing]], list[str]]:
    """The figures for which the study has data, and one sentence for each that cannot be drawn."""
    figures = _figures(study, comparison)
    absent = [table for table, _ in figures if isinstance(table, str)]
    return [(table, draw) for table, draw in figures if isinstance(table, Table)], absent


def _figures(study: Study, comparison: dict[str, Any] | None) -> list[tuple[Table | str, Drawing]]:
    figures: list[tuple[Table | str, Drawing]] = []
    if comparison is None:
        figures.append(("Without an evaluation there is no comparison to draw.", drawings.draw_table))
    else:
        figures += [
            (tables.primary(study, comparison), drawings.draw_table),
            (
                tables.accuracy(study, comparison),
                lambda table: drawings.draw_accuracy(table, comparison["threshold"]),
            ),
            (tables.disagreement(study, comparison), drawings.draw_disagreement),
        ]
    return [
        *figures,
        (training_tables.accounting(study), drawings.draw_table),
        (training_tables.validation(study), drawings.draw_validation_nll),
        (training_tables.learning_rates(study), drawings.draw_learning_rates),
        (training_tables.rate_minimum(study), drawings.draw_rate_minimum),
        (training_tables.throughput(study), drawings.draw_throughput),
    ]


# --- Files --------------------------------------------------------------------------------------------------


@contextmanager
def own_style() -> Iterator[None]:
    """Use our own matplotlib settings; a user's must not affect what is drawn and saved inside."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def write_figure(table: Table, draw: Callable[[Table], Figure], folder: Path, root: Path) -> None:
    """Write `<name>.png`, `.pdf`, `.csv` and `.provenance.json`; input paths are relative to `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    with own_style():
        figure = draw(table)
        figure.savefig(folder / f"{table.name}.png", dpi=160, metadata={"Software": None})
        no_dates = {"CreationDate": None, "Producer": None, "Creator": None}
        figure.savefig(folder / f"{table.name}.pdf", metadata=no_dates)
    write_text_atomic(folder / f"{table.name}.csv", to_csv(table))
    write_json_atomic(folder / f"{table.name}.provenance.json", provenance(table, folder, root))


def is_current(table: Table, folder: Path, root: Path) -> bool:
    """Whether the figure's files exist and match what would be written now: same data, same code."""
    files = [folder / f"{table.name}{end}" for end in (*ENDS, ".provenance.json")]
    if not all(file.is_file() for file in files):
        return False
    if (folder / f"{table.name}.csv").read_bytes() != to_csv(table).encode("utf-8"):
        return False
    try:
        return read_json(files[-1]) == provenance(table, folder, root)
    except UserError:  # no longer JSON: draw it again
        return False


def provenance(table: Table, folder: Path, root: Path) -> Record:
    """What a figure was made from and with, and the current hashes of its own files."""
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in (drawings, sys.modules[__name__]))
    return {
        "figure": table.name,
        "title": table.title,
        "note": table.note,
        "inputs": [_file_entry(path, path.relative_to(root)) for path in dict.fromkeys(table.inputs)],
        "outputs": [_file_entry(folder / f"{table.name}{end}", Path(f"{table.name}{end}")) for end in ENDS],
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "matplotlib": matplotlib.__version__,
    }


def _file_entry(path: Path, shown: Path) -> Record:
    content = path.read_bytes()
    return {"path": shown.as_posix(), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def to_csv(table: Table) -> str:
    """The table in full precision; a missing value is an empty cell."""
    return csv_text([column.name for column in table.columns], table.rows)


def csv_text(names: Sequence[str], rows: Iterable[Record]) -> str:
    """These columns of the rows as CSV, with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(repr, value)) if isinstance(value, list) else str(value)
