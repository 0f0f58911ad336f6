"""What a file or an error holds reaches the terminal as visible text, and no traceback shows a secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from jaxlora.runtime.text import harmless

SECRET = "hf_" + "Q" * 30
ESCAPES = "\x1b[31mred\x1b]0;title\x07 \u202eback"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb\x08\x07", "a\\rb\\x08\\x07"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\ud800", "\\ud800"),
        ("hidden\u200b\U000e0041", "hidden\\u200b\\U000e0041"),
        ("a\nb\tc", "a\nb\tc"),
        ("é 中 \U0001f468\u200d\U0001f469 ½ \\x1b", "é 中 \U0001f468\u200d\U0001f469 ½ \\x1b"),
    ],
)
def test_only_what_a_terminal_would_obey_is_escaped(text, shown):
    assert harmless(text) == shown
    assert harmless(text).encode("utf-8")


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


class TestTracebacks:
    @pytest.mark.parametrize(
        "failure",
        [
            "raise RuntimeError('login with ' + secret)",
            "raise KeyError(secret)",
            "raise KeyboardInterrupt(secret)",
            "raise type('Panic', (BaseException,), {})(secret)",
            "try: raise ValueError(secret)\n    except ValueError as error: raise RuntimeError from error",
            "thread = threading.Thread(target=lambda: {}[secret])\n    thread.start(); thread.join()\n"
            "    raise RuntimeError",
        ],
        ids=["error", "key", "interrupt", "panic", "cause", "thread"],
    )
    def test_show_no_secret(self, failure):
        code = (
            "import os, threading\nfrom jaxlora.runtime.errors import run_main\ndef main():\n"
            f"    secret = os.environ['MY_API_KEY'] + ' {SECRET[:3]}' + 'Q' * 30\n    {failure}\n"
            "run_main(main)\n"
        )
        done = run(code, MY_API_KEY="correct-horse-battery")
        assert done.returncode not in (0, 2)
        assert "Traceback (most recent call last)" in done.stderr
        assert "in main" in done.stderr
        assert "correct-horse-battery" not in done.stderr
        assert SECRET not in done.stderr

    def test_show_no_secret_where_other_hosts_are_told(self):
        code = (
            "from jaxlora.runtime import errors\n"
            "errors.on_failure.append(lambda message, code: print(message, code))\n"
            f"def main(): raise RuntimeError('\\x1b[31m {SECRET}')\nerrors.run_main(main)\n"
        )
        done = run(code)
        assert done.returncode == 1
        assert done.stdout == "RuntimeError: \\x1b[31m <secret> 1\n"
        assert SECRET not in done.stderr
        assert "\x1b" not in done.stderr


class TestTools:
    def call(self, repository, tool, *arguments):
        command = [sys.executable, str(repository / "tools" / tool), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
        assert "Traceback" not in done.stderr
        return done

    def row(self, **changes):
        turns = [("user", "How many?"), ("assistant", "\\boxed{4}")]
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"row_id": ESCAPES, "source": ESCAPES, "messages": messages} | changes

    def test_the_gates_and_the_audit_print_no_escape_of_a_row(self, repository, tmp_path):
        for name in ("train", "val"):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(self.row()) + "\n")
        (tmp_path / "test.jsonl").write_text(json.dumps({"question": "How many?", "answer": "#### 4"}) + "\n")
        gates = self.call(repository, "check_dataset.py", tmp_path, "--benchmark", tmp_path / "test.jsonl")
        audit = ["--tokenizer", "embedded:base", "--out", tmp_path / "audit"]
        audit = self.call(repository, "audit_dataset.py", tmp_path, *audit)
        assert (gates.returncode, audit.returncode) == (1, 0), audit.stderr
        for text in (gates.stderr, audit.stdout):
            assert "\\x1b[31mred" in text
        assert not {"\x1b", "\x07", "\u202e"} & set(gates.stdout + gates.stderr + audit.stdout + audit.stderr)

    def test_nor_does_the_build_of_a_source(self, repository, tmp_path):
        row = {"problem": "How?", "generated_solution": "\\boxed{4}", "expected_answer": "4"}
        rows = [row | {"problem_source": ESCAPES, "problem": f"How {i}?"} for i in range(20)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["--source", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
        refused = self.call(repository, "build_dataset.py", *command)
        assert refused.returncode == 2
        built = self.call(repository, "build_dataset.py", *command, "--sources", ESCAPES)
        assert built.returncode == 0, built.stderr
        assert "\x1b" not in refused.stderr + built.stdout + built.stderr
        assert "\\x1b[31mred" in built.stdout
