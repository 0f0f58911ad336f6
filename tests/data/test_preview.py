"""Promises of the preview: the rows of the configuration, with mask, control tokens and counts in sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from helpers import forks

from jaxlora.data.render import load_tokenizer
from jaxlora.data.rows import load_rendered_rows

COMMAND = ("tools/preview.py", "--config", "configs/tiny.py")


def test_shows_rows_control_tokens_mask_colours_and_counts(repository):
    colour = {"FORCE_COLOR": "1", "COLUMNS": "200", "TERM": "xterm-256color"}
    command = [sys.executable, *COMMAND, "--rows", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=os.environ | colour)
    assert done.returncode == 0, done.stderr
    rows, _ = load_rendered_rows(
        "embedded:data/train.jsonl", load_tokenizer("embedded:base"), max_length=256, limit=2
    )
    for row in rows:
        answer = len(row.tokens) - row.prompt_length
        assert (
            f"{row.prompt_length} prompt + {answer} answer tokens; {row.n_tokens} after the shift"
            in done.stdout
        )
    assert done.stdout.count("\x1b[1;35m<|im_end|>") == 6
    first = done.stdout.split("row ")[1]
    prompt, answer = first.split("assistant\x1b[0m")
    assert "\x1b[32m" not in prompt  # green is where loss is
    assert "\x1b[32mThe final answer" in answer


def test_a_wrong_field_or_count_is_one_line_and_exit_code_2(repository):
    for argument in ("--config.data.trian_path=x", "--rows=0", "--config.data.train_path=none.jsonl"):
        done = forks.run([*COMMAND, argument], cwd=repository)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stdout == ""


def test_the_mask_is_readable_without_colour_and_the_format_is_named(repository, tmp_path):
    row = {"instruction": "Say it.", "output": "It\x1b]0;title\x07\x1b[2J is."}
    (tmp_path / "own.json").write_text(json.dumps([row]))
    words = [*COMMAND, "--rows", "1", f"--config.data.train_path={tmp_path / 'own.json'}"]
    done = forks.run(words, cwd=repository)
    assert done.returncode == 0, done.stderr
    assert "⟦It\\x1b]0;title\\x07\\x1b[2J is.<|im_end|>↵\n⟧" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    assert "Alpaca rows in JSON list" in " ".join(done.stdout.split())


def test_rows_are_read_as_training_reads_them(repository, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps([{"frage": "Two and two?", "antwort": "Four.", "note": 1}]))
    words = [*COMMAND, "--rows=1", f"--config.data.train_path={tmp_path / 'own.json'}"]
    own = ["--config.data.columns=prompt=frage,completion=antwort"]
    done = forks.run([*words, *own], cwd=repository)
    assert done.returncode == 0, done.stderr
    assert "⟦Four.<|im_end|>↵\n⟧" in done.stdout
    assert forks.run(words, cwd=repository).returncode == 2  # columns that no format has
