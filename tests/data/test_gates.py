"""Promises of the gates: planted leaks are found, and data without a fresh, passed report is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jaxlora.data.build import BuildPlan, build
from jaxlora.data.gates import RULES, Benchmark, FilePair, check, find_pairs, require_gates
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import write_json_atomic

QUESTION = "A farmer has 12 cows and 3 ﬁelds. How many cows per field?"
BENCHMARK = Benchmark("test questions", [("gsm8k-0000", "Another one?"), ("gsm8k-0001", QUESTION)])


def raw(problem, row_id=None, source="gsm8k"):
    return {
        "row_id": row_id or f"id {problem}",
        "source": source,
        "problem": problem,
        "generated_solution": "\\boxed{4}",
        "expected_answer": "4",
    }


def rendered(problem, row_id=None, source="gsm8k"):
    turns = [("system", "Be careful."), ("user", problem), ("assistant", "\\boxed{4}")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {
        "row_id": row_id or f"id {problem}",
        "source": source,
        "expected_answer": "4",
        "messages": messages,
    }


def write(folder, train, validation):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", train), ("val.jsonl", validation)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    return FilePair(str(folder / "train.jsonl"), str(folder / "val.jsonl"))


def clean(make):
    return [make(f"Problem {i}?") for i in range(20)], [make(f"Held out {i}?") for i in range(5)]


def verdicts(report):
    return {gate["name"]: gate["overlaps"] for gate in report["gates"]}


@pytest.fixture(params=[raw, rendered], ids=["raw", "rendered"])
def make(request):
    return request.param


class TestPlantedLeaksAreCaught:
    def test_clean_data_passes_every_gate(self, tmp_path, make):
        report = check([write(tmp_path, *clean(make))], BENCHMARK)
        assert report["passed"]
        assert verdicts(report) == {"benchmark_overlap": 0, "shared_row_id": 0, "shared_problem": 0}

    @pytest.mark.parametrize(
        "leak",
        [
            QUESTION,
            QUESTION.upper(),
            f" \t{QUESTION}\r\n",
            QUESTION.replace(" ", "\u00a0\n "),
            QUESTION.replace("12", "１２").replace("cows", "ｃｏｗｓ"),
            QUESTION.replace("ﬁ", "fi"),
        ],
        ids=["as it is", "case", "outer space", "inner space", "full width", "ligature"],
    )
    def test_a_benchmark_question_in_train(self, tmp_path, make, leak):
        train, validation = clean(make)
        train.insert(7, make(leak, "leaked"))
        report = check([write(tmp_path, train, validation)], BENCHMARK)
        assert not report["passed"]
        assert verdicts(report) == {"benchmark_overlap": 1, "shared_row_id": 0, "shared_problem": 0}
        found = report["gates"][0]["overlapping"]
        place = {"row_id": "leaked", "source": "gsm8k", "line": 8}
        assert found == [place | {"example_ids": ["gsm8k-0001"], "rules": ["equal"]}]

    def test_a_leak_is_one_whatever_its_source_and_the_studys_count_is_kept_apart(self, tmp_path, make):
        train, validation = clean(make)
        train += [make(QUESTION, "a", "gsm8k"), make(QUESTION, "b", "mine")]
        gate = check([write(tmp_path, train, validation)], BENCHMARK)["gates"][0]
        assert gate["overlaps"] == 2
        assert gate["overlaps_with_source_gsm8k"] == 1

    def test_one_shared_problem(self, tmp_path, make):
        train, validation = clean(make)
        validation.append(make("ＰＲＯＢＬＥＭ  3?", "other id"))
        report = check([write(tmp_path, train, validation)], BENCHMARK)
        assert verdicts(report) == {"benchmark_overlap": 0, "shared_row_id": 0, "shared_problem": 1}
        assert report["gates"][2]["overlapping"] == [{"row_id": "other id", "line": 6}]

    def test_one_shared_row_id(self, tmp_path, make):
        train, validation = clean(make)
        validation.append(make("Quite another problem?", train[2]["row_id"]))
        report = check([write(tmp_path, train, validation)], BENCHMARK)
        assert verdicts(report) == {"benchmark_overlap": 0, "shared_row_id": 1, "shared_problem": 0}

    def test_a_leak_in_the_rendered_files_alone_fails_the_dataset(self, tmp_path):
        write(tmp_path / "raw", *clean(raw))
        train, validation = clean(rendered)
        write(tmp_path / "rendered", [*train, rendered(QUESTION)], validation)
        report = check(find_pairs(tmp_path), BENCHMARK, str(tmp_path))
        assert not report["passed"]
        assert [gate["overlaps"] for gate in report["gates"]] == [0, 0, 0, 1, 0, 0]

    def test_near_misses_are_not_leaks(self, tmp_path, make):
        train, validation = clean(make)
        train.append(make(QUESTION.replace("12", "13")))
        train.append(make(QUESTION.replace("o", "\u043e")))  # Cyrillic letters are other letters
        assert check([write(tmp_path, train, validation)], BENCHMARK)["passed"]


class TestReport:
    def test_names_inputs_hashes_rules_and_counts(self, tmp_path):
        import hashlib

        write(tmp_path / "rendered", *clean(rendered))
        report = check(find_pairs(tmp_path), BENCHMARK, str(tmp_path))
        assert report["benchmark"]["questions"] == 2
        assert [(file["role"], file["path"]) for file in report["files"]] == [
            ("train", "rendered/train.jsonl"),
            ("validation", "rendered/val.jsonl"),
        ]
        for file in report["files"]:
            content = (tmp_path / file["path"]).read_bytes()
            assert file["sha256"] == hashlib.sha256(content).hexdigest()
            assert file["bytes"] == len(content)
            assert file["rows_by_source"] == {"gsm8k": file["rows"]}
        for gate in report["gates"]:
            assert gate["rule"] == RULES[gate["name"]]
            assert gate["counts"] == {"train_rows": 20, "validation_rows": 5}

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"{broken", "broken JSON"),
            (b'{"messages": "hi"}', "no user turn"),
            (b'{"messages": [{"role": "user", "content": 3}]}', "no user turn with text"),
            (b'{"row_id": "a", "source": "s"}', "'problem'"),
            (b'{"row_id": "a", "source": "s", "problem": "\\ud83d"}', "surrogate"),
            (b'{"row_id": "\xff"}', "invalid UTF-8"),
        ],
    )
    def test_rows_that_cannot_be_read_are_named(self, tmp_path, line, reason):
        pair = write(tmp_path, *clean(raw))
        with open(pair.train, "ab") as file:
            file.write(line + b"\n")
        with pytest.raises(UserError) as error:
            check([pair], BENCHMARK)
        assert f"{pair.train}:21: " in str(error.value)
        assert reason in str(error.value)

    def test_empty_files_and_half_a_split_are_errors(self, tmp_path):
        pair = write(tmp_path, [], clean(raw)[1])
        with pytest.raises(UserError, match="is empty"):
            check([pair], BENCHMARK)
        (tmp_path / "val.jsonl").unlink()
        with pytest.raises(UserError, match="other half"):
            find_pairs(tmp_path)
        (tmp_path / "train.jsonl").unlink()
        with pytest.raises(UserError, match="holds no"):
            find_pairs(tmp_path)


class TestTrainingIsRefused:
    @pytest.fixture
    def dataset(self, tmp_path):
        """A clean dataset with a good report; returns train path, validation path and report path."""
        pair = write(tmp_path / "rendered", *clean(rendered))
        write_json_atomic(tmp_path / "contamination.json", check([pair], BENCHMARK))
        return pair.train, pair.validation, tmp_path / "contamination.json"

    def test_a_fresh_passed_report_beside_the_rendered_folder_is_enough(self, dataset):
        train, validation, _ = dataset
        status = require_gates(train, validation, None, allow_ungated=False)
        assert status.passed
        assert not status.overridden
        assert status.reason is None
        assert status.gates == dict.fromkeys(RULES, True)

    def test_a_report_in_the_files_own_folder_or_anywhere_named(self, dataset, tmp_path):
        train, validation, report = dataset
        moved = report.rename(tmp_path / "rendered/contamination.json")
        assert require_gates(train, validation, None, False).passed
        elsewhere = moved.rename(tmp_path / "elsewhere.json")
        assert require_gates(train, validation, str(elsewhere), False).passed
        with pytest.raises(UserError, match="the report is missing"):
            require_gates(train, validation, None, False)

    def test_missing_report(self, dataset):
        train, validation, report = dataset
        report.unlink()
        with pytest.raises(UserError, match=r"all gates: the report is missing .*check_dataset.py"):
            require_gates(train, validation, None, False)

    @pytest.mark.parametrize("role", ["train", "validation"])
    def test_stale_report(self, dataset, role):
        train, validation, _ = dataset
        with open(train if role == "train" else validation, "ab") as file:
            file.write(json.dumps(rendered("One more?")).encode() + b"\n")
        with pytest.raises(UserError, match=f"stale: the {role} file is not the one that was checked"):
            require_gates(train, validation, None, False)

    @pytest.mark.parametrize("gate", list(RULES))
    def test_failed_report_names_the_gate(self, tmp_path, gate):
        train, validation = clean(rendered)
        planted = {
            "benchmark_overlap": (train, rendered(QUESTION)),
            "shared_row_id": (validation, rendered("New?", train[0]["row_id"])),
            "shared_problem": (validation, rendered("problem 0?", "new id")),
        }
        rows, row = planted[gate]
        rows.append(row)
        pair = write(tmp_path, train, validation)
        write_json_atomic(tmp_path / "contamination.json", check([pair], BENCHMARK))
        with pytest.raises(UserError, match=f"gate {gate} failed with 1 overlaps"):
            require_gates(pair.train, pair.validation, None, False)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda report: report["gates"].pop(),
            lambda report: report["gates"][0].update(passed=False),
            lambda report: report["gates"][0].update(overlaps=3),
            lambda report: report["gates"][0].update(passed="true"),
            lambda report: report.pop("files"),
            lambda report: report.update(gates=[]),
        ],
    )
    def test_a_damaged_report_is_no_pass(self, dataset, damage):
        train, validation, path = dataset
        report = json.loads(path.read_text())
        damage(report)
        path.write_text(json.dumps(report))
        with pytest.raises(UserError, match="data gates"):
            require_gates(train, validation, None, False)
        path.write_text("[]")
        with pytest.raises(UserError, match="not a gate report"):
            require_gates(train, validation, None, False)

    def test_files_that_were_checked_with_other_partners_are_not_gated(self, tmp_path):
        first = write(tmp_path / "a", *clean(rendered))
        second = write(tmp_path / "b", [rendered("Held out 1?")], [rendered("z?")])
        path = tmp_path / "report.json"
        write_json_atomic(path, check([first, second], Benchmark("none", [("q", "q?")])))
        with pytest.raises(UserError, match=r"not in .* for these files"):
            require_gates(second.train, first.validation, str(path), False)

    def test_the_override_goes_on_says_so_in_red_and_is_recorded(self, dataset, monkeypatch):
        from io import StringIO

        from rich.console import Console

        from jaxlora.data import gates

        train, validation, report = dataset
        report.unlink()
        screen = StringIO()
        monkeypatch.setattr(gates, "console", Console(file=screen, force_terminal=True, width=200))
        status = require_gates(train, validation, None, allow_ungated=True)
        assert not status.passed
        assert status.overridden
        assert "the report is missing" in status.reason
        assert "\x1b[1;31mUNGATED DATA" in screen.getvalue()

    def test_the_shipped_data_is_gated(self):
        assert require_gates("embedded:data/train.jsonl", "embedded:data/val.jsonl", None, False).passed


class TestCommand:
    def run(self, repository, *arguments):
        command = [sys.executable, str(repository / "tools/check_dataset.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=repository)

    def test_writes_the_report_and_exits_1_on_overlap(self, tmp_path, repository):
        benchmark = tmp_path / "test.jsonl"
        benchmark.write_text(json.dumps({"question": QUESTION, "answer": "#### 4"}) + "\n")
        train, validation = clean(rendered)
        pair = write(tmp_path / "rendered", train, validation)
        done = self.run(repository, tmp_path, "--benchmark", benchmark)
        assert done.returncode == 0, done.stderr
        assert require_gates(pair.train, pair.validation, None, False).passed
        pair = write(tmp_path / "rendered", [*train, rendered(QUESTION.lower(), "leak")], validation)
        done = self.run(repository, tmp_path, "--benchmark", benchmark)
        assert done.returncode == 1
        assert "FAILED  benchmark_overlap" in done.stderr
        assert "row leak (line 21) is gsm8k-0000" in done.stderr
        with pytest.raises(UserError, match="benchmark_overlap failed"):
            require_gates(pair.train, pair.validation, None, False)

    def test_what_cannot_be_checked_is_one_line_and_exit_code_2(self, tmp_path, repository):
        for arguments in (
            [tmp_path / "none", "--benchmark", "x"],
            ["--train", "a", "--benchmark", "x"],
            ["--train", "a", "--validation", "b", "--benchmark", "x"],
        ):
            done = self.run(repository, *arguments)
            assert done.returncode == 2
            assert len(done.stderr.strip().splitlines()) == 1


class TestRealRows:
    def test_gsm8k_train_built_here_shares_nothing_with_gsm8k_test(self, shared, tmp_path):
        from jaxlora.data.gsm8k_source import convert
        from jaxlora.evals.gsm8k import load_problems

        lines = (shared / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps(convert(json.loads(x))) + "\n" for x in lines)
        )
        build(BuildPlan(str(tmp_path / "rows.jsonl"), None, tmp_path / "data"))
        problems = load_problems(str(shared / "data/gsm8k/test.jsonl"))
        benchmark = Benchmark("gsm8k test", [(problem.example_id, problem.question) for problem in problems])
        report = check(find_pairs(tmp_path / "data"), benchmark)
        assert report["passed"]
        assert len(report["gates"]) == 6
        assert report["benchmark"]["questions"] == 1319
