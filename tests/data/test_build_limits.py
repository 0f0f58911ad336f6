"""What a source may cost: rows that are too long and files that unpack to far too much are one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from jaxlora.data import build as build_module
from jaxlora.data.build import BuildPlan, build, verify
from jaxlora.runtime.errors import UserError


def write_parquet(path, solutions, **options):
    rows = [
        {"problem": f"How {i}?", "generated_solution": text, "expected_answer": "4", "problem_source": "math"}
        for i, text in enumerate(solutions)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="zstd", **options)
    return BuildPlan(str(path), None, path.parent / "out")


def write_dictionary(path, text, rows):
    """A table whose solutions are one text, stored once."""
    one = pyarrow.array(["x"] * rows)
    solutions = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), [text])
    columns = {
        "problem": one,
        "generated_solution": solutions,
        "expected_answer": pyarrow.array(["4"] * rows),
    }
    table = pyarrow.table(columns | {"problem_source": pyarrow.array(["math"] * rows)})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    return BuildPlan(str(path), None, path.parent / "out")


class TestExpansion:
    def test_a_few_kilobytes_that_unpack_to_gigabytes_are_refused_before_they_fill_the_disk(self, tmp_path):
        plan = write_dictionary(tmp_path / "bomb.parquet", "x" * 500_000 + " \\boxed{4}", 5600)
        assert (tmp_path / "bomb.parquet").stat().st_size < 10_000
        with pytest.raises(UserError, match=r"bomb.parquet:\d+: the source unpacks to more than 200 times"):
            build(plan)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.parquet"]

    @pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
    def test_pages_that_unpack_to_gigabytes_are_not_unpacked(self, tmp_path):
        write_parquet(
            tmp_path / "bomb.parquet", ["x" * 4_000_000 + " \\boxed{4}"] * 250, use_dictionary=False
        )
        code = (
            "import re, sys; from pathlib import Path; from jaxlora.data.build import *\n"
            "try: build(BuildPlan(sys.argv[1], None, Path(sys.argv[2])))\n"
            "except UserError as error: print(error)\n"
            "print(int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "bomb.parquet"), str(tmp_path / "out")]
        message, peak = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert "unpacks to more than" in message
        assert int(peak) < 800  # MB

    def test_text_that_compresses_well_is_built(self, tmp_path, monkeypatch):
        monkeypatch.setattr(build_module, "FREE_BYTES", 0)
        solutions = [f"{i} and {i * i} " * 10 + "\\boxed{4}" for i in range(3000)]
        assert build(write_parquet(tmp_path / "rows.parquet", solutions))["rows_read"] == 3000

    def test_a_row_that_nothing_can_train_on_is_named(self, tmp_path):
        row = {"problem": "How?", "expected_answer": "4", "problem_source": "math"}
        row["generated_solution"] = "x" * 20_000_000 + "\\boxed{4}"
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=r"rows.jsonl:1: the row has 40,000,\d+ bytes"):
            build(BuildPlan(str(tmp_path / "rows.jsonl"), None, tmp_path / "out"))


class TestParquet:
    @pytest.mark.parametrize(
        "column",
        [
            pyarrow.array([2**62], pyarrow.timestamp("us")),
            pyarrow.array([-(2**62)], pyarrow.timestamp("ms")),
            pyarrow.array([2**31 - 1], pyarrow.date32()),
            pyarrow.array([2**62], pyarrow.duration("s")),
        ],
        ids=["microseconds", "milliseconds", "date", "duration"],
    )
    def test_a_column_of_times_that_python_cannot_hold_is_one_line(self, tmp_path, column):
        texts = {name: ["4"] for name in ("generated_solution", "expected_answer", "problem_source")}
        table = pyarrow.table({"problem": column, **texts})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=r"rows.parquet:1: "):
            build(BuildPlan(str(tmp_path / "rows.parquet"), None, tmp_path / "out"))


class TestDamagedManifest:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("built")
        build(write_parquet(folder / "rows.parquet", ["\\boxed{4}"] * 20))
        return folder / "out"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda manifest: [], "list, not a JSON object"),
            (lambda manifest: manifest | {"files": []}, "files: "),
            (lambda manifest: manifest | {"candidates": [1]}, "candidates: "),
            (lambda manifest: manifest | {"rejected": {"math": 7}}, "rejected.math: "),
            (lambda manifest: manifest | {"rows_read": "many"}, "rows_read: "),
            (lambda manifest: {k: v for k, v in manifest.items() if k != "split_groups"}, "split_groups: "),
        ],
    )
    def test_is_one_line(self, folder, change, reason):
        path = folder / "manifest.json"
        good = path.read_text()
        path.write_text(json.dumps(change(json.loads(good))))
        with pytest.raises(UserError) as error:
            verify(folder)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match=r"manifest.json is not a JSON file"):
            verify(folder)
        path.write_text(good)
        assert str(path) in str(error.value)
        assert reason in str(error.value)
        assert verify(folder)["rows_read"] == 20

    @pytest.mark.parametrize("part", ["raw/train.jsonl"])
    def test_a_missing_part_is_named(self, folder, part):
        hidden = (folder / part).rename(folder / "hidden")
        with pytest.raises(UserError, match=part):
            verify(folder)
        hidden.rename(folder / part)
