"""Promises of reading rendered rows: nothing skipped in silence, every fault with its file and line."""

from __future__ import annotations

import json

import pytest

from jaxlora.data.containers import read_lines
from jaxlora.data.render import load_tokenizer, prompt_messages, render_batch
from jaxlora.data.rows import BATCH_ROWS, load_rendered_rows
from jaxlora.data.sources import locate
from jaxlora.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded:base")


def row(answer="4", **fields):
    messages = [*prompt_messages("What is 2 + 2?"), {"role": "assistant", "content": answer}]
    return {"row_id": f"id-{answer}", "source": "s", "expected_answer": "4", "messages": messages} | fields


def write(path, rows):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def load(path, tokenizer, **options):
    defaults = {"max_length": 500, "on_bad_row": "error", "limit": None}
    return load_rendered_rows(path, tokenizer, **(defaults | options))


BAD = [
    (b'{"messages": [', "JSONL has one whole object on each line"),
    (b"", "empty line"),
    (b"[1]", "not an object"),
    (b'{"row_id": "\xff"}', "invalid UTF-8 at byte 13"),
    (b"[" * 100_000, "broken JSON"),
    ({"problem": "p"}, "no field 'messages'"),
    (row(row_id=7), "row_id is int"),
    (row(source=["s"]), "source is list"),
    (row(expected_answer=4), "expected_answer is int"),
    (row(messages="hi"), "not a list"),
    (row(messages=prompt_messages("only a question")), "no assistant turn"),
    (row(""), "empty answer"),
    (row("long " * 600), "longer than data.max_length, 500"),
]


class TestGoodRows:
    def test_come_in_file_order_with_the_renderers_tokens(self, tokenizer, tmp_path):
        path = write(tmp_path / "t.jsonl", [row(str(i)) for i in range(BATCH_ROWS + 3)])
        rows, report = load(path, tokenizer)
        assert [r.row_id for r in rows] == [f"id-{i}" for i in range(BATCH_ROWS + 3)]
        (last,) = render_batch(tokenizer, [("x", row(str(BATCH_ROWS + 2))["messages"])])
        assert rows[-1].tokens.tolist() == last.tokens.tolist()
        assert report.used == report.lines == BATCH_ROWS + 3
        assert report.tokens == sum(len(r.tokens) - 1 for r in rows)

    def test_a_limit_takes_the_first_rows_and_reads_no_further(self, tokenizer, tmp_path):
        path = write(tmp_path / "t.jsonl", [row("1"), row("2"), b"broken"])
        rows, report = load(path, tokenizer, limit=2)
        assert [r.row_id for r in rows] == ["id-1", "id-2"]
        assert report.lines == 2

    def test_only_messages_are_needed_and_the_id_is_then_a_hash_of_them(self, tokenizer, tmp_path):
        bare = {"messages": row()["messages"]}
        path = write(tmp_path / "t.jsonl", [bare, bare, {"messages": row("5")["messages"]}])
        rows, _ = load(path, tokenizer)
        assert rows[0].row_id == rows[1].row_id != rows[2].row_id
        assert len(rows[0].row_id) == 20

    def test_crlf_unicode_line_separators_and_a_missing_last_newline_are_fine(self, tokenizer, tmp_path):
        path = tmp_path / "t.jsonl"
        first = json.dumps(row("one\u2028line"), ensure_ascii=False).encode()
        path.write_bytes(first + b"\r\n" + json.dumps(row("2")).encode())
        rows, _ = load(path, tokenizer)
        assert len(rows) == 2

    def test_shipped_rows_are_usable(self, tokenizer):
        rows, report = load("embedded:data/train.jsonl", tokenizer, limit=20)
        assert len(rows) == 20
        assert not report.skipped


class TestBadRows:
    @pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
    def test_stop_the_reading_with_file_and_line(self, tokenizer, tmp_path, line, reason):
        path = write(tmp_path / "t.jsonl", [row(), line, row()])
        with pytest.raises(UserError) as error:
            load(path, tokenizer)
        assert f"{path}:2: " in str(error.value)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)

    def test_the_first_bad_row_in_file_order_is_the_one_reported(self, tokenizer, tmp_path):
        path = write(tmp_path / "t.jsonl", [row(), row(""), b"broken"])
        with pytest.raises(UserError, match=":2: empty answer"):
            load(path, tokenizer)

    def test_skipping_counts_and_names_them(self, tokenizer, tmp_path):
        path = write(tmp_path / "t.jsonl", [row("1"), *(line for line, _ in BAD), row("2")])
        rows, report = load(path, tokenizer, on_bad_row="skip")
        assert [r.row_id for r in rows] == ["id-1", "id-2"]
        assert [bad.line for bad in report.skipped] == list(range(2, 2 + len(BAD)))
        for bad, (_, reason) in zip(report.skipped, BAD, strict=True):
            assert reason in bad.reason
        assert f"skipped {len(BAD)}" in report.describe()
        assert "line 2: broken JSON" in report.describe()

    def test_a_file_with_no_usable_row_is_an_error_even_when_skipping(self, tokenizer, tmp_path):
        with pytest.raises(UserError, match="no usable row"):
            load(write(tmp_path / "t.jsonl", [b"broken"]), tokenizer, on_bad_row="skip")
        with pytest.raises(UserError, match="no usable row"):
            load(write(tmp_path / "e.jsonl", []), tokenizer)

    def test_the_limit_is_the_length_itself(self, tokenizer, tmp_path):
        path = write(tmp_path / "t.jsonl", [row()])
        (rendered,) = render_batch(tokenizer, [("x", row()["messages"])])
        length = len(rendered.tokens)
        assert len(load(path, tokenizer, max_length=length)[0]) == 1
        with pytest.raises(UserError, match=f"{length} tokens, longer than data.max_length, {length - 1}"):
            load(path, tokenizer, max_length=length - 1)


class TestLocations:
    def test_a_missing_file_and_a_directory_are_named(self, tmp_path):
        with pytest.raises(UserError, match="no such file"):
            locate(tmp_path / "none.jsonl")
        with pytest.raises(UserError, match="is a directory"):
            locate(tmp_path)

    @pytest.mark.parametrize("path", ["hf://", "hf://owner/name", "hf://owner//x.jsonl"])
    def test_a_hub_address_needs_owner_name_and_path(self, path):
        with pytest.raises(UserError, match="write hf://OWNER/NAME/PATH"):
            locate(path)

    def test_what_would_be_fetched_is_announced_and_offline_is_one_line(self, capsys):
        with pytest.raises(UserError, match="cannot be fetched") as error:
            locate("hf://owner/does-not-exist/rendered/train.jsonl")
        assert "\n" not in str(error.value)
        assert "fetching hf://owner/does-not-exist/rendered/train.jsonl" in capsys.readouterr().err

    def test_lines_end_at_newlines_only(self, tmp_path):
        (tmp_path / "t").write_bytes("a\u2028b\rc\n\nd".encode())
        assert list(read_lines(tmp_path / "t")) == [(1, "a\u2028b\rc".encode()), (2, b""), (3, b"d")]
