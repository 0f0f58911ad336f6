"""Promises of a build: the same bytes every time, all or nothing, and one clear error for bad input."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from jaxlora.data.build import FILES, BuildPlan, build
from jaxlora.data.gsm8k_source import convert
from jaxlora.runtime.errors import UserError


def source_row(i, source="math", problem=None, solution=None, answer="6"):
    return {
        "problem": problem or f"Problem number {i}?",
        "generated_solution": solution or f"Thus \\boxed{{{answer}}}, case {i}.",
        "expected_answer": answer,
        "problem_source": source,
    }


def write_jsonl(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def make(tmp_path, rows, name="out", **options):
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    return build(BuildPlan(source, None, tmp_path / name, **options))


def run_tool(repository, *arguments):
    command = [sys.executable, str(repository / "tools/build_dataset.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=repository)


ROWS = [source_row(i, "gsm8k" if i % 3 else "math") for i in range(60)]


class TestContent:
    def test_counts_hashes_and_sizes_in_the_manifest_are_those_of_the_files(self, tmp_path):
        rows = [
            *ROWS,
            source_row(100, solution="none"),
            source_row(101, answer="7", solution="\\boxed{8}"),
            source_row(102, solution="it must be an integer \\boxed{6}"),
            source_row(103, problem="Problem: what?"),
            source_row(104, "augmented_math"),
        ]
        manifest = make(tmp_path, rows)
        assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
        assert manifest["rows_read"] == 65
        assert manifest["other_sources"] == {"augmented_math": 1}
        assert manifest["candidates"] == {"gsm8k": 40, "math": 24}
        assert manifest["accepted"] == {"gsm8k": 40, "math": 20}
        assert manifest["rejected"]["math"] == dict.fromkeys(manifest["rejected"]["math"], 1)
        assert list(manifest["rejected"]["math"]) == [
            "missing_box",
            "boxed_mismatch",
            "suspicious_pattern",
            "problem_pattern",
        ]
        assert manifest["split_rows"]["val"]["total"] == manifest["split_groups"]["val"] == 6
        assert sorted(manifest["files"]) == sorted(FILES)
        for name in FILES:
            content = (tmp_path / "out" / name).read_bytes()
            recorded = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            assert manifest["files"][name] == recorded

    def test_raw_and_rendered_files_hold_the_same_rows_in_the_same_order(self, tmp_path):
        make(tmp_path, ROWS)
        for part in ("train", "val"):
            raw = [json.loads(line) for line in (tmp_path / f"out/raw/{part}.jsonl").open()]
            rendered = [json.loads(line) for line in (tmp_path / f"out/rendered/{part}.jsonl").open()]
            assert [row["row_id"] for row in raw] == [row["row_id"] for row in rendered]
            for a, b in zip(raw, rendered, strict=True):
                assert [m["role"] for m in b["messages"]] == ["system", "user", "assistant"]
                texts = [m["content"] for m in b["messages"]][1:]
                assert texts == [a["problem"], a["generated_solution"]]

    def test_text_is_kept_as_it_came(self, tmp_path):
        text = 'é 漢字 🙂 "quoted" \\back \r\n crlf \u2028 sep \x07 bell'
        make(tmp_path, [source_row(0, problem=text), *ROWS])
        content = (tmp_path / "out/raw/train.jsonl").read_bytes() + (
            tmp_path / "out/raw/val.jsonl"
        ).read_bytes()
        assert content.count(b"\n") == 61
        assert b"\r\n" not in content
        assert "é 漢字 🙂".encode() in content
        assert text in [json.loads(line)["problem"] for line in content.splitlines()]

    def test_the_same_source_gives_the_same_bytes_from_jsonl_crlf_jsonl_and_parquet(self, tmp_path):
        first = make(tmp_path, ROWS)
        crlf = tmp_path / "crlf.jsonl"
        crlf.write_bytes((tmp_path / "rows.jsonl").read_bytes().replace(b"\n", b"\r\n"))
        table = pyarrow.Table.from_pylist([row | {"other": 1} for row in ROWS])
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
        for name in ("crlf.jsonl", "rows.parquet"):
            again = build(BuildPlan(str(tmp_path / name), None, tmp_path / f"{name}.out"))
            assert again["files"] == first["files"]

    def test_other_sources_can_be_named_and_their_order_counts(self, tmp_path):
        mine = [row | {"problem_source": f"mine-{i % 2}"} for i, row in enumerate(ROWS)]
        a = make(tmp_path, mine, "a", sources=("mine-0", "mine-1"))
        b = make(tmp_path, mine, "b", sources=("mine-1", "mine-0"))
        assert a["accepted"] == {"mine-0": 30, "mine-1": 30}
        assert a["files"] != b["files"]

    def test_gsm8k_answers_become_boxed_ones(self, tmp_path):
        row = convert({"question": "Q?", "answer": "48/2 = <<48/2=24>>24 clips.\n1000 #### x\n#### 1,000"})
        assert row == {
            "problem": "Q?",
            "generated_solution": "48/2 = 24 clips.\n1000 #### x\n\nThe final answer is $\\boxed{1,000}$.",
            "expected_answer": "1,000",
            "problem_source": "gsm8k",
        }
        for bad in (
            {"question": "Q"},
            {"question": "Q", "answer": "no mark"},
            {"question": 1, "answer": "#### 2"},
        ):
            with pytest.raises(ValueError, match=r"field|no value"):
                convert(bad)

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
    def test_gsm8ks_own_rows_are_a_source(self, tmp_path, name):
        answers = [f"{i} = <<{i}={i}>>{i}\n#### {i}" for i in range(20)]
        rows = [{"question": f"How many, {i}?", "answer": answer} for i, answer in enumerate(answers)]
        converted = make(tmp_path, [convert(row) for row in rows])
        source = tmp_path / name
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
        else:
            write_jsonl(source, rows)
        assert build(BuildPlan(str(source), None, tmp_path / "own"))["files"] == converted["files"]

    def test_a_gsm8k_row_without_a_value_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"rows.jsonl:1: the answer has no value after '####'"):
            make(tmp_path, [{"question": "Q?", "answer": "6"}])

    def test_every_real_row_is_accepted(self, shared, tmp_path):
        source = shared / "data/gsm8k/train.jsonl"
        manifest = build(BuildPlan(str(source), None, tmp_path / "out"))
        assert manifest["accepted"]["gsm8k"] == manifest["rows_read"] == 7473
        assert manifest["split_rows"]["val"]["total"] == round(0.1 * 7473)


class TestAllOrNothing:
    def names(self, tmp_path):
        return sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("rows."))

    def test_an_existing_dataset_is_kept_unless_asked(self, tmp_path):
        make(tmp_path, ROWS)
        before = (tmp_path / "out/manifest.json").read_bytes()
        with pytest.raises(UserError, match="--overwrite"):
            make(tmp_path, ROWS[:30])
        assert (tmp_path / "out/manifest.json").read_bytes() == before
        assert make(tmp_path, ROWS[:30], overwrite=True)["rows_read"] == 30
        assert self.names(tmp_path) == ["out"]

    def test_a_failed_rebuild_keeps_the_old_dataset(self, tmp_path):
        make(tmp_path, ROWS)
        before = (tmp_path / "out/manifest.json").read_bytes()
        with pytest.raises(UserError, match=r"rows\.jsonl:61"):
            make(tmp_path, [*ROWS, b"{broken"], overwrite=True)
        assert (tmp_path / "out/manifest.json").read_bytes() == before
        assert self.names(tmp_path) == ["out"]

    def test_an_empty_folder_may_be_filled_and_a_file_is_never_replaced(self, tmp_path):
        (tmp_path / "out").mkdir()
        make(tmp_path, ROWS)
        (tmp_path / "file").write_text("mine")
        with pytest.raises(UserError, match="is a file"):
            make(tmp_path, ROWS, "file", overwrite=True)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_killed_build_leaves_nothing_under_the_name_and_the_next_one_finishes(
        self, tmp_path, repository
    ):
        source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
        code = (
            "import os, signal, sys; from pathlib import Path; import jaxlora.data.build as b\n"
            "b.put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "b.build(b.BuildPlan(sys.argv[1], None, Path(sys.argv[2])))"
        )
        command = [sys.executable, "-c", code, source, str(tmp_path / "out")]
        assert subprocess.run(command, cwd=repository, capture_output=True).returncode == -9
        assert self.names(tmp_path) == [".out.building"]
        killed = json.loads((tmp_path / ".out.building/manifest.json").read_text())
        (tmp_path / ".out.building/stray").write_text("left behind")
        assert make(tmp_path, ROWS) == killed
        assert not (tmp_path / "out/stray").exists()
        assert self.names(tmp_path) == ["out"]

    def test_two_builds_of_one_dataset_do_not_mix(self, tmp_path):
        import fcntl

        (tmp_path / ".out.building").mkdir()
        lock = os.open(tmp_path / ".out.building", os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build"):
            make(tmp_path, ROWS)
        os.close(lock)
        make(tmp_path, ROWS)

    @pytest.mark.parametrize("limit", [3_000, 20_000])
    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path, repository, limit):
        """A limit on file sizes stops the writes in the middle, as a full disk does."""
        source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "from pathlib import Path; import jaxlora.data.build as b\n"
            "from jaxlora.runtime.errors import run_main\n"
            "run_main(lambda: b.build(b.BuildPlan(sys.argv[1], None, Path(sys.argv[2]))) and None)"
        )
        command = [sys.executable, "-c", code, source, str(tmp_path / "out")]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(errors) == 1
        assert "is full; nothing was written" in errors[0]
        assert self.names(tmp_path) == []


class TestBadInput:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"problem": "p"}, "field 'generated_solution' is missing"),
            (source_row(1) | {"expected_answer": 6}, "field 'expected_answer' is int, not text"),
            (source_row(1) | {"problem": None}, "field 'problem' is NoneType"),
            (
                {k: v for k, v in source_row(1).items() if k != "problem_source"},
                "'problem_source' is missing",
            ),
            (b'{"problem": "caf\xe9"}', "invalid UTF-8 at byte 17"),
            (b'{"problem": "p"', "broken JSON"),
            (b"", "empty line"),
            (b"3", "JSON int, not an object"),
        ],
    )
    def test_names_file_and_row_and_leaves_nothing(self, tmp_path, row, reason):
        with pytest.raises(UserError) as error:
            make(tmp_path, [*ROWS[:4], row, *ROWS])
        assert f"{tmp_path}/rows.jsonl:5: " in str(error.value)
        assert reason in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]

    def test_half_a_surrogate_pair(self, tmp_path):
        row = json.dumps(source_row(1, problem="half \ud83d pair")).encode()
        with pytest.raises(UserError, match=r"rows.jsonl:3: holds half a surrogate pair"):
            make(tmp_path, [*ROWS[:2], row])

    def test_nothing_to_build_from(self, tmp_path):
        with pytest.raises(UserError, match="is empty"):
            make(tmp_path, [])
        with pytest.raises(
            UserError, match=r"no row has problem_source gsm8k or math, only other; .*--sources"
        ):
            make(tmp_path, [source_row(1, "other")])
        with pytest.raises(UserError, match=r"none of 1 candidates was accepted \(missing_box 1\)"):
            make(tmp_path, [source_row(1, solution="none")])
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]

    def test_truncated_and_damaged_parquet(self, tmp_path):
        table = pyarrow.Table.from_pylist(ROWS * 50)
        pyarrow.parquet.write_table(
            table, tmp_path / "good.parquet", compression="none", use_dictionary=False
        )
        content = (tmp_path / "good.parquet").read_bytes()
        (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
        (tmp_path / "empty.parquet").write_bytes(b"")
        for name in ("cut.parquet", "empty.parquet"):
            with pytest.raises(UserError, match=rf"{name}:1: Parquet cannot be read") as error:
                build(BuildPlan(str(tmp_path / name), None, tmp_path / "out"))
            assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_parquet_columns_of_another_type_or_missing(self, tmp_path):
        for rows, reason in (
            ([source_row(1) | {"expected_answer": 6}], "'expected_answer' is int"),
            ([{"problem": "p"}], "'generated_solution' is missing"),
        ):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
            with pytest.raises(UserError, match=rf"rows.parquet:1: field {reason}"):
                build(BuildPlan(str(tmp_path / "rows.parquet"), None, tmp_path / "out"))

    @pytest.mark.parametrize("source", ["none.jsonl", "./nowhere", "one-word"])
    def test_a_source_that_is_not_there(self, tmp_path, source, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="no such file"):
            build(BuildPlan(source, None, tmp_path / "out"))

    def test_a_dataset_that_cannot_be_reached_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match="owner/none: the Hub does not provide it") as error:
            build(BuildPlan("owner/none", "train", tmp_path / "out"))
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []


class TestCommand:
    def test_builds_prints_and_compares_with_the_study(self, tmp_path, repository):
        source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
        done = run_tool(repository, "--source", source, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert "gsm8k: 40 candidates, 40 accepted; rejected: none" in done.stdout
        assert "train: 54 rows in 54 groups" in done.stdout
        done = run_tool(repository, "--out", tmp_path / "out", "--verify-study")
        assert done.returncode == 1
        assert "differs: candidates.gsm8k: study 14764, here 40" in done.stderr
        assert "differs: files.rendered/val.jsonl.sha256" in done.stderr

    def test_dry_run_says_what_would_happen_and_does_nothing(self, tmp_path, repository):
        done = run_tool(repository, "--out", tmp_path / "out", "--dry-run")
        assert done.returncode == 0
        assert "from nvidia/OpenMathInstruct-2, split train_1M" in done.stdout
        assert list(tmp_path.iterdir()) == []

    def test_errors_are_one_line_and_exit_code_2(self, tmp_path, repository):
        done = run_tool(repository, "--source", tmp_path / "none.jsonl", "--out", tmp_path / "out")
        assert done.returncode == 2
        assert done.stderr.strip().startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1
