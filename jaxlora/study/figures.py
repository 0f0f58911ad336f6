"""Write the study's figures: each a PNG, a PDF, a CSV with its data, and a provenance JSON.

    draw_figures(study, comparison, Path("results/report/figures"))

Every figure draws one `Table` and nothing else. Files hold no dates: the same inputs give the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jaxlora.progress import progress_bar
from jaxlora.records import Record, write_json_atomic, write_text_atomic
from jaxlora.study import drawings, tables, training_tables
from jaxlora.study.results import Study
from jaxlora.study.tables import Table

_SETTINGS: dict[Any, Any] = {
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


def draw_figures(
    study: Study, comparison: dict[str, Any] | None, folder: Path
) -> tuple[list[Table], list[str]]:
    """Write all figures that the study has data for into `folder`.

    Returns the tables that were drawn, and one sentence for each figure that could not be.
    """
    figures = _figures(study, comparison)
    drawn, absent = [], []
    with progress_bar("drawing figures", total=len(figures), unit="figures") as advance:
        for table, draw in figures:
            if isinstance(table, str):
                absent.append(table)
            else:
                write_figure(table, draw, folder, study.directory)
                drawn.append(table)
            advance(1)
    return drawn, absent


def _figures(
    study: Study, comparison: dict[str, Any] | None
) -> list[tuple[Table | str, Callable[[Table], Figure]]]:
    figures: list[tuple[Table | str, Callable[[Table], Figure]]] = []
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
        (training_tables.validation(study), drawings.draw_validation),
        (training_tables.learning_rates(study), drawings.draw_learning_rates),
        (training_tables.rate_minimum(study), drawings.draw_rate_minimum),
        (training_tables.throughput(study), drawings.draw_throughput),
    ]


# --- Files --------------------------------------------------------------------------------------------------


def write_figure(table: Table, draw: Callable[[Table], Figure], folder: Path, root: Path) -> None:
    """Write `<name>.png`, `.pdf`, `.csv` and `.provenance.json`; input paths are relative to `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own settings must not change the study's figures
        matplotlib.rcParams.update(_SETTINGS)
        figure = draw(table)
        figure.savefig(folder / f"{table.name}.png", dpi=160, metadata={"Software": None})
        no_dates = {"CreationDate": None, "Producer": None, "Creator": None}
        figure.savefig(folder / f"{table.name}.pdf", metadata=no_dates)
    write_text_atomic(folder / f"{table.name}.csv", to_csv(table))
    provenance = {
        "figure": table.name,
        "title": table.title,
        "note": table.note,
        "inputs": [_file_entry(path, path.relative_to(root)) for path in dict.fromkeys(table.inputs)],
        "outputs": [
            _file_entry(folder / name, Path(name))
            for name in (table.name + end for end in (".png", ".pdf", ".csv"))
        ],
        "matplotlib": matplotlib.__version__,
    }
    write_json_atomic(folder / f"{table.name}.provenance.json", provenance)


def _file_entry(path: Path, shown: Path) -> Record:
    content = path.read_bytes()
    return {"path": shown.as_posix(), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def to_csv(table: Table) -> str:
    """The table in full precision; an absent value is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    for row in table.rows:
        writer.writerow([_cell(row.get(column.name)) for column in table.columns])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(repr, value)) if isinstance(value, list) else str(value)
