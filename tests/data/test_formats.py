"""Promises of formats and containers: each pair gives the same rows; what fits none is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from jaxlora.data.containers import read_rows
from jaxlora.data.formats import FORMATS, find_format, to_example
from jaxlora.data.render import load_tokenizer, render_batch
from jaxlora.data.rows import RowOptions, load_rendered_rows
from jaxlora.data.sources import read_records
from jaxlora.runtime.errors import UserError, one_line

ASKED, ANSWER = 'What is 2 + 3?\n\nBe brief, "please".', "5, of course"
MESSAGES = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]
RECORDS = {
    "messages": {"messages": MESSAGES},
    "ShareGPT": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]},
    "ShareGPT of messages": {"conversations": MESSAGES},
    "Alpaca": {"instruction": "What is 2 + 3?", "input": 'Be brief, "please".', "output": ANSWER},
    "Alpaca without input": {"instruction": ASKED, "input": "", "output": ANSWER},
    "prompt/completion": {"prompt": ASKED, "completion": ANSWER},
    "prompt/completion of messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "question/answer": {"question": ASKED, "answer": ANSWER},
    "text": {"text": "Once upon a time, é.\nThe end."},
}
CONTAINERS = ["x.jsonl", "x.json", "x.csv", "x.parquet"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded:base")


def write(path, records):
    """The records in the container that the name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
        content = file.getvalue()
    elif name.endswith(".csv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(records[0]))
        writer.writeheader()
        for record in records:
            cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
            writer.writerow(cells)
        content = text.getvalue().encode()
    elif name.endswith(".json"):
        content = json.dumps(records, indent=1).encode()
    else:
        content = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def load(path, tokenizer, on_bad_row="error", limit=None, max_length=500, **options):
    return load_rendered_rows(
        path,
        tokenizer,
        max_length=max_length,
        on_bad_row=on_bad_row,
        limit=limit,
        options=RowOptions(**options),
    )


def refusal(path, tokenizer, **options):
    with pytest.raises(UserError) as error:
        load(path, tokenizer, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


class TestFormats:
    @pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
    @pytest.mark.parametrize("container", CONTAINERS)
    @pytest.mark.parametrize("kind", RECORDS)
    def test_each_in_each_container_gives_the_same_rows(self, tokenizer, tmp_path, kind, container, suffix):
        record = RECORDS[kind]
        path = write(tmp_path / (container + suffix), [record, record])
        rows, report = load(path, tokenizer)
        assert report.kind.startswith(f"{kind.split(' ')[0]} rows in ")
        assert report.kind in report.describe()
        if kind == "text":
            expected = tokenizer(record["text"])["input_ids"]
            assert all(row.weights.all() for row in rows)
        else:
            (same,) = render_batch(tokenizer, [("x", MESSAGES)])
            expected = same.tokens.tolist()
            assert rows[0].weights.tolist() == same.weights.tolist()
        assert [row.tokens.tolist() for row in rows] == [expected, expected]
        assert (report.used, report.duplicates) == (2, 1)

    def test_the_table_of_formats_is_tested(self):
        assert {kind.split(" ")[0] for kind in RECORDS} == {row_format.name for row_format in FORMATS}

    def test_answers_in_a_prompt_carry_no_loss(self, tokenizer, tmp_path):
        prompt = [*MESSAGES, {"role": "user", "content": "Sure?"}]
        record = {"prompt": prompt, "completion": [{"role": "assistant", "content": "Yes"}]}
        (row,), _ = load(write(tmp_path / "x.jsonl", [record]), tokenizer, loss_on="all")
        assert tokenizer.decode(row.tokens[row.weights > 0]).startswith("Yes<|im_end|>")

    def test_a_system_column_is_the_system_turn_and_none_is_invented(self):
        record = RECORDS["Alpaca"] | {"system": "Be kind."}
        example = to_example(find_format(record), record)
        assert [message["role"] for message in example.messages] == ["system", "user", "assistant"]
        assert example.messages[0]["content"] == "Be kind."
        assert to_example(find_format(RECORDS["Alpaca"]), RECORDS["Alpaca"]).messages == MESSAGES

    def test_alpaca_with_its_text_rendered_beside_it_is_not_plain_text(self):
        record = RECORDS["Alpaca"] | {"text": "Below is an instruction ..."}
        assert find_format(record).name == "Alpaca"
        assert to_example(find_format(record), record).text is None

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            (
                {"query": "q", "response": "a"},
                "keys 'query', 'response'; the nearest format is prompt/completion (prompt, completion): name"
                " its columns with --config.data.columns=prompt=COLUMN,completion=COLUMN",
            ),
            ({"instructions": "q", "outputs": "a"}, "the nearest format is Alpaca (instruction, output)"),
            ({"conversation": []}, "the nearest format is ShareGPT (conversations)"),
            ({"chosen": "a", "rejected": "b"}, "the keys 'chosen', 'rejected'"),
            ({}, "no keys"),
        ],
    )
    def test_what_fits_none_names_the_keys_and_the_nearest(self, tokenizer, tmp_path, record, reason):
        message = refusal(write(tmp_path / "x.jsonl", [record]), tokenizer)
        assert reason in message
        assert "--config.data.columns=" in message

    def test_a_row_with_many_keys_is_one_short_line(self, tokenizer, tmp_path):
        record = {f"key {i}" * 30: i for i in range(20_000)}
        assert len(one_line(UserError(refusal(write(tmp_path / "x.jsonl", [record]), tokenizer)))) < 1000

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            (
                {"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "a"}]},
                "turn 2",
            ),
            ({"conversations": [{"from": "human", "value": "q", "loss": 0}]}, "turn 1 has the key 'loss'"),
            ({"conversations": {"from": "human"}}, "conversations is dict"),
            ({"conversations": [7]}, "turn 1 is int"),
            ({"conversations": [{"from": ["human"], "value": "q"}]}, "turn 1 is from"),
            ({"instruction": ["q"], "output": "a"}, "instruction is list, not text"),
            ({"instruction": "q", "output": 5}, "content of type int"),
            ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "key 'history'"),
            ({"prompt": 5, "completion": "a"}, "prompt is int"),
            ({"prompt": "q", "completion": ""}, "empty answer"),
            ({"text": 5}, "text is int"),
            ({"text": "  "}, "empty text"),
            ({"text": "<|im_start|>user"}, "text holds the control token '<|im_start|>'"),
            ({"messages": MESSAGES, "tools": "{"}, "tools is text that is not JSON"),
        ],
    )
    def test_what_a_format_cannot_map_is_named(self, tokenizer, tmp_path, record, reason):
        assert reason in refusal(write(tmp_path / "x.jsonl", [record]), tokenizer)

    def test_the_first_row_decides(self, tokenizer, tmp_path):
        path = write(tmp_path / "x.jsonl", [RECORDS["Alpaca"], RECORDS["messages"]])
        assert f"{path}:2: no field 'instruction'; the first row is of the format Alpaca" in refusal(
            path, tokenizer
        )
        rows, report = load(path, tokenizer, on_bad_row="skip")
        assert (len(rows), len(report.skipped)) == (1, 1)


class TestColumns:
    def test_columns_of_other_names(self, tokenizer, tmp_path):
        record = {"question": ASKED, "answer": ANSWER, "score": 5}
        path = write(tmp_path / "x.csv", [record])
        (row,), _ = load(path, tokenizer, columns={"prompt": "question", "completion": "answer"})
        (same,) = render_batch(tokenizer, [("x", MESSAGES)])
        assert row.tokens.tolist() == same.tokens.tolist()
        assert "no column 'q'; it has the keys 'answer', 'question', 'score'" in refusal(
            path, tokenizer, columns={"prompt": "q", "completion": "answer"}
        )

    def test_a_key_that_is_not_used_is_refused_unless_it_is_ignored(self, tokenizer, tmp_path):
        path = write(tmp_path / "x.jsonl", [{"messages": MESSAGES, "quality": 3, "id": 7, "language": None}])
        message = refusal(path, tokenizer)
        assert "has the key 'quality'" in message
        assert "data.ignore_columns" in message
        assert len(load(path, tokenizer, ignore_columns=["quality"])[0]) == 1


class TestKeysThatChangeTheComputation:
    TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]  # noqa: RUF012

    @pytest.mark.parametrize(
        ("row", "message", "reason"),
        [
            ({"tools": TOOLS}, {}, "key 'tools', which the chat template leaves out"),
            ({"chat_template_kwargs": {"enable_thinking": True}}, {}, "key 'chat_template_kwargs'"),
            ({"row_id": "\ud800"}, {}, "row_id holds half a surrogate"),
            ({"source": "a\udfff"}, {}, "source holds half a surrogate"),
            ({}, {"weight": 0}, "weight 0"),
            ({}, {"weight": 0.5}, "message 2 has weight 0.5; it must be 0 or 1"),
            ({}, {"weight": "1"}, "message 2 has weight '1'"),
            ({}, {"train": False}, "all-zero loss mask"),
            ({}, {"loss": True}, "message 2 has the key 'loss'"),
            ({}, {"thinking": "hm"}, "message 2 has the key 'thinking'"),
            ({}, {"reasoning_content": "hm"}, "message 2 holds thoughts (reasoning_content)"),
            ({}, {"content": "<think>\nhm\n</think>\n\n5"}, "message 2 holds thoughts (<think>)"),
            ({}, {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "not a JSON object"),
            ({}, {"tool_calls": [{"function": {"name": "f", "arguments": {}, "x": 1}}]}, "the key 'x'"),
            (
                {},
                {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                "'tool_calls', which the chat",
            ),
            ({}, {"tool_calls": "f()"}, "tool_calls of type str"),
        ],
    )
    def test_are_used_or_named(self, tokenizer, tmp_path, row, message, reason):
        record = {"messages": [MESSAGES[0], MESSAGES[1] | message]} | row
        assert reason in refusal(write(tmp_path / "x.jsonl", [record]), tokenizer)

    @pytest.mark.parametrize("message", [{"weight": 1}, {"train": True}, {"name": None, "tool_calls": None}])
    def test_those_that_change_nothing_are_taken(self, tokenizer, tmp_path, message):
        record = {"messages": [MESSAGES[0], MESSAGES[1] | message], "tools": [], "chat_template_kwargs": {}}
        (row,), _ = load(write(tmp_path / "x.jsonl", [record]), tokenizer)
        (same,) = render_batch(tokenizer, [("x", MESSAGES)])
        assert row.tokens.tolist() == same.tokens.tolist()

    def test_a_weight_of_a_user_turn(self, tokenizer, tmp_path):
        for weight, taken in ((0, True), (1, False)):
            path = write(
                tmp_path / "x.jsonl", [{"messages": [MESSAGES[0] | {"weight": weight}, MESSAGES[1]]}]
            )
            if taken:
                load(path, tokenizer)
            else:
                assert "message 1 has weight 1" in refusal(path, tokenizer)

    @pytest.mark.parametrize(
        "content",
        [
            "a</think>b",
            "x<think>hm</think>y",
            "<think>a<think>b</think>c",
            "<think>a</think>b</think>c",
            "<think>a",
        ],
    )
    def test_thoughts_that_a_template_would_cut_are_refused(self, tokenizer, tmp_path, content):
        record = {"messages": [MESSAGES[0], {"role": "assistant", "content": content}]}
        message = refusal(write(tmp_path / "x.jsonl", [record]), tokenizer, enable_thinking=True)
        assert "must be one <think>...</think> at the beginning" in message

    def test_where_all_answers_carry_loss_none_of_them_is_empty(self, tokenizer, tmp_path):
        messages = [MESSAGES[0], {"role": "assistant", "content": " "}, *MESSAGES]
        path = write(tmp_path / "x.jsonl", [{"messages": messages}])
        assert ":1: message 2: empty answer" in refusal(path, tokenizer, loss_on="all")
        assert len(load(path, tokenizer)[0]) == 1  # no loss on it, where only the last answer has any
        messages[1]["weight"] = 0
        path = write(tmp_path / "x.jsonl", [{"messages": messages}])
        assert len(load(path, tokenizer, loss_on="all")[0]) == 1

    def test_thoughts_alone_are_no_answer(self, tokenizer, tmp_path):
        for answer in (
            {"content": "<think>\nhm\n</think>\n\n"},
            {"content": "", "reasoning_content": "hm"},
        ):
            record = {"messages": [MESSAGES[0], {"role": "assistant"} | answer]}
            message = refusal(write(tmp_path / "x.jsonl", [record]), tokenizer, enable_thinking=True)
            assert "empty answer" in message


class TestContainers:
    @pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
    def test_a_mark_of_utf8_and_empty_lines_at_the_end(self, tokenizer, tmp_path, name):
        path = write(tmp_path / name, [RECORDS["Alpaca"]])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n \r\n\n")
        rows, report = load(path, tokenizer)
        assert report.used == len(rows) == 1
        if name == "x.jsonl":
            assert len(list(read_records(str(path), None, []))) == report.lines == 1

    def test_an_empty_line_between_rows_is_a_bad_row(self, tokenizer, tmp_path):
        path = tmp_path / "x.jsonl"
        line = json.dumps(RECORDS["messages"]).encode() + b"\n"
        path.write_bytes(line + b"\n\n" + line)
        assert f"{path}:2: empty line" in refusal(path, tokenizer)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (json.dumps(RECORDS["messages"]).encode("utf-16"), "is UTF-16"),
            (json.dumps(RECORDS["messages"]).encode("utf-16-le"), "is UTF-16"),
            (json.dumps(RECORDS["messages"]).encode("utf-32"), "is UTF-32"),
            (b"PK\x03\x04....", "is a ZIP archive"),
            (b"BZh9....", "compressed by bzip2"),
            (b"ARROW1\0\0", "is an Arrow file"),
            (gzip.compress(b'{"text": "one word"}\n' * 5000)[:-9], "cannot be read"),
            (b"\x28\xb5\x2f\xfd....", "cannot be read"),
            (b"PAR1....PAR1", "Parquet cannot be read"),
            (b'[{"text": "a"}', "broken JSON list"),
            (b'[{"text": "a"} {"text": "b"}]', "no comma after the element"),
            (b'[{"text": "a"}]\n[{"text": "b"}]', "there is more after the JSON list"),
            (b"[" * 100_000, "broken JSON list"),
            (b"[1" + b"0" * 5000 + b"]", "broken JSON list"),
            (b'[{"text": "one word"}, 7]', ":2: is a JSON int, not an object"),
            (b"[]", "no usable row"),
            (b"", "no usable row"),
        ],
    )
    def test_what_is_not_rows_is_named(self, tokenizer, tmp_path, content, reason):
        path = tmp_path / "x.jsonl"
        path.write_bytes(content)
        assert reason in refusal(path, tokenizer)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", ":1: the first line of a CSV file must name"),
            (b"prompt,prompt\na,b\n", ":1: the first line"),
            (b"prompt,completion\nq,a,b\n", ":2: 3 cells, but the header names 2"),
            (b",prompt,completion\n0,q,a\n", "index=False"),
            (b'prompt,completion\nq,"a\n', "cannot be read"),
            (b'prompt,completion\nq,a\n"x "y" z",b\n', ":3: cannot be read"),
            (b"prompt,completion\nq,\xff\n", "not UTF-8"),
            (b"prompt,completion\n", "no usable row"),
        ],
    )
    def test_csv_that_cannot_be_read(self, tokenizer, tmp_path, content, reason):
        path = tmp_path / "x.csv"
        path.write_bytes(content)
        assert reason in refusal(path, tokenizer)

    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_separators_of_csv(self, tokenizer, tmp_path, separator):
        path = tmp_path / "x.csv"
        path.write_text(f'prompt{separator}completion\r\n"2, 3; 4\n5"{separator}six\r\n\r\n')
        (row,), _ = load(path, tokenizer)
        assert "2, 3; 4\n5" in tokenizer.decode(row.tokens)

    def test_parquet_of_several_formats_of_messages_drops_what_only_others_have(self, tmp_path):
        tool = {"type": "function", "function": {"name": "a", "parameters": {"x": {"type": "int"}}}}
        other = {"type": "function", "function": {"name": "b", "parameters": {"y": {"type": "int"}}}}
        rows = [{"messages": MESSAGES, "tools": [tool]}, {"messages": MESSAGES, "tools": [other]}]
        path = write(tmp_path / "x.parquet", rows)
        assert [row for _, _, row in read_rows(path)] == rows

    def test_times_that_python_cannot_hold_are_one_line(self, tokenizer, tmp_path):
        table = pyarrow.table({"text": ["a"], "created_at": pyarrow.array([2**62], pyarrow.timestamp("ms"))})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        assert "x.parquet:1: Parquet cannot be read" in refusal(tmp_path / "x.parquet", tokenizer)

    def test_a_small_file_that_unpacks_to_an_endless_line_is_stopped(self, tokenizer, tmp_path):
        path = tmp_path / "x.jsonl.zst"
        path.write_bytes(pyarrow.compress(bytes(2 * 10**8), codec="zstd", asbytes=True))
        assert "line is longer than" in refusal(path, tokenizer)


class TestHubDatasets:
    def test_a_split_is_read_as_a_file_is(self, tokenizer, monkeypatch, capsys):
        asked = []

        def load_dataset(name, **options):
            asked.append((name, options))
            return iter([RECORDS["Alpaca"]] * 3)

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        rows, report = load("owner/name", tokenizer, limit=2, split="train")
        assert asked == [("owner/name", {"split": "train", "streaming": True, "revision": None})]
        assert len(rows) == 2
        assert report.kind == "Alpaca rows in the Hub's split train"
        assert "streaming owner/name" in capsys.readouterr().err

    def test_without_a_network_it_is_one_line(self, tokenizer):
        with pytest.raises(UserError, match=r"owner/name\[train\]:1: cannot be streamed") as error:
            load("owner/name", tokenizer, split="train")
        assert "\n" not in str(error.value)


def memory_to_read(path):
    """Bytes that a process needs to read this file of unusable rows, beyond those that it needs anyway."""
    code = (
        "import resource, sys\n"
        "from jaxlora.data.render import load_tokenizer\n"
        "from jaxlora.data.rows import load_rendered_rows\n"
        "from jaxlora.runtime.errors import UserError\n"
        "import pyarrow.parquet\n"
        "tokenizer = load_tokenizer('embedded:base')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    load_rendered_rows(sys.argv[1], tokenizer, max_length=100, on_bad_row='skip')\n"
        "except UserError as error:\n"
        "    assert 'no usable row' in str(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


def long_records():
    for number in range(40):
        letters = "abcdefghij"[number % 10] * 10_000_000
        yield {"messages": [{"role": "user", "content": letters}, MESSAGES[1]]}


def test_long_rows_are_not_held_together(tmp_path):
    path = tmp_path / "x.jsonl"
    with path.open("w") as file:
        for record in long_records():
            file.write(json.dumps(record) + "\n")
    assert memory_to_read(path) < 200 * 2**20  # 400 MB of letters


def test_a_small_parquet_file_of_long_rows_is_not_unpacked_at_once(tmp_path):
    path = tmp_path / "x.parquet"
    row = next(long_records())
    kind = pyarrow.Table.from_pylist([{"messages": MESSAGES}]).schema
    with pyarrow.parquet.ParquetWriter(path, kind, compression="zstd") as writer:
        writer.write_table(pyarrow.concat_tables([pyarrow.Table.from_pylist([row], kind)] * 40))
    assert path.stat().st_size < 100_000
    assert memory_to_read(path) < 200 * 2**20  # 400 MB of letters


def test_a_book_is_refused_before_it_is_tokenised(tokenizer, tmp_path):
    record = {"messages": [{"role": "user", "content": "word " * 400_000}, MESSAGES[1]]}
    message = refusal(write(tmp_path / "x.jsonl", [record]), tokenizer)
    longest = max(map(len, tokenizer.get_vocab()))
    assert (
        f":1: at least {(2_000_000 + len(ANSWER)) // longest} tokens, longer than data.max_length, 500"
        in message
    )
