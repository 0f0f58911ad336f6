"""Measure the time and memory for preparing rows: the first time, and from the cache.

    jaxlora data bench --config own --rows 1000000           # synthetic short rows
    jaxlora data bench --config own --config.data.train_path=rows.jsonl

Each start is a separate process that does everything training does before it loads a model: it reads the
file, tokenises it or finds its tokens in the cache, splits off validation rows, and plans steps and buffers.
The cache is a temporary folder, which is deleted; files below 8 MiB are not cached. Prints a table and one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlora.cli import parse_config
from jaxlora.config import RunConfig, from_dict, to_dict
from jaxlora.runtime.errors import UserError, add_number

FIRST, AGAIN = "first start", "from what was kept"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_number(parser, "--rows", metavar="N", help="generate this many short rows instead of reading a file")
    config, options = parse_config(parser)
    with tempfile.TemporaryDirectory(prefix="jaxlora-rows-") as folder:
        if options.rows is not None:
            config = replace(
                config, data=replace(config.data, train_path=made_up(Path(folder), options.rows))
            )
        if config.eval.benchmark is not None:  # the gates are not part of this measurement
            config = replace(config, eval=replace(config.eval, benchmark=None, after_training=False))
        results = {name: _start(config, Path(folder)) for name in (FIRST, AGAIN)}
    show(results)
    print(json.dumps(results))


def made_up(folder: Path, rows: int) -> str:
    """Write short, distinct rows of prompt and completion; return the file's path."""
    file = folder / "rows.jsonl"
    with file.open("w") as out:
        for n in range(rows):
            question = f"A shop has {n} boxes of {n % 97 + 2} pens. How many pens are that?"
            answer = f"Each box has {n % 97 + 2} pens, so there are {n * (n % 97 + 2)} pens."
            out.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    return str(file)


def _start(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Measure one start in a separate process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAXLORA_ROWS": str(folder / "kept")}
    words = [sys.executable, "-c", f"from {__name__} import measure; measure()"]
    given = json.dumps(to_dict(config))
    done = subprocess.run(words, input=given, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError("the rows cannot be used; the line above says why")
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> None:
    """Prepare the run with the configuration on standard input, and print time and memory as JSON."""
    from jaxlora.runtime.errors import run_main

    run_main(_measure)


def _measure() -> None:
    config = from_dict(json.load(sys.stdin))
    began = time.monotonic()
    from jaxlora.data import rows as reading
    from jaxlora.train import job as preparing

    imported, cpu_before = time.monotonic(), time.process_time()
    spent = on_cpu = 0.0
    load = reading.load_rendered_rows

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent, on_cpu
        start, cpu = time.monotonic(), time.process_time()
        result = load(*args, **kwargs)
        spent += time.monotonic() - start
        on_cpu += time.process_time() - cpu
        return result

    preparing.load_rendered_rows = timed
    job = preparing.prepare(config, with_weights=False)
    ready, cpu_after = time.monotonic(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "rows": len(job.train_rows) + len(job.validation_rows),
        "tokens": preparing.token_count([*job.train_rows, *job.validation_rows]),
        "import_seconds": imported - began,
        "rows_seconds": spent,
        "plan_seconds": ready - imported - spent,
        "rows_cpu_seconds": on_cpu,
        "plan_cpu_seconds": cpu_after - cpu_before - on_cpu,
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }
    print(json.dumps(found))


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print a table of both starts."""
    from rich.table import Table

    from jaxlora.runtime.progress import console

    one = results[FIRST]
    table = Table(title=f"{one['rows']:,} rows, {one['tokens']:,} tokens", title_justify="left")
    for name in ("", "import, s", "rows, s", "plan, s", "rows, CPU s", "plan, CPU s", "peak, GB"):
        table.add_column(name, justify="right" if name else "left")
    for name, found in results.items():
        parts = ("import", "rows", "plan", "rows_cpu", "plan_cpu")
        seconds = (f"{found[f'{part}_seconds']:.1f}" for part in parts)
        table.add_row(name, *seconds, f"{found['peak_bytes'] / 1e9:.2f}")
    console.print(table)
