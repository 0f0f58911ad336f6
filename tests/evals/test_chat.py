"""`jaxlora chat` and `jaxlora generate` say what the model says, and nothing else stands between the two."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import jaxlora.engine
from jaxlora import commands
from jaxlora.cli import load_config
from jaxlora.commands.generate import read_prompts
from jaxlora.generate import decode
from jaxlora.runtime.errors import UserError
from jaxlora.train.job import prepare
from jaxlora.train.loop import train

FIRST, SECOND = "Tom has 3 apples and buys 4 more. How many apples does Tom have?", "And with 2 more?"
BASE = ["--base", "--model", "embedded:base", "--max-new-tokens", "48"]
GREEDY = [*BASE, "--temperature", "0"]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Programs for eight simulated devices take three times as long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        wire, device = jaxlora.engine.wire, jax.devices()[:1]
        patch.setattr(jaxlora.engine, "wire", lambda source, mesh: wire(source, mesh, device))
        yield


@pytest.fixture(scope="module")
def engine(one_device):
    return jaxlora.load("embedded:base", "float32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps, at a rate that changes what the model says."""
    values = {
        "results_dir": tmp_path_factory.mktemp("results"), "data.train_rows": 16, "data.validation_rows": 4,
        "train.epochs": 1, "optim.peak_lr": 0.05, "optim.schedule": "constant", "seed": 2,
        "data.allow_ungated": True, "eval.after_training": False,
    }  # fmt: skip
    config = load_config("tiny", {name: str(value) for name, value in values.items()})
    train(prepare(config))
    return config.run_dir


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process with lines on its standard input; what it prints."""

    def call(*words: object, lines: tuple[str, ...] = ()):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        monkeypatch.setattr(sys, "argv", ["jaxlora", *map(str, words)])
        capsys.readouterr()
        assert commands.main() == 0
        return capsys.readouterr()

    return call


def greedy(trainer, *prompts):
    settings = {"max_new_tokens": 48, "temperature": 0, "stream": lambda *_: None}
    return [trainer.sample([prompt], **settings)[0].text for prompt in prompts]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# --- Chat ---------------------------------------------------------------------------------------------------


def test_each_answer_follows_from_the_whole_conversation(engine, call):
    base = engine.untrained()
    system = turn("system", "Be kind.")
    start = [system, turn("user", FIRST)]
    (first,) = greedy(base, start)
    (second,) = greedy(base, [*start, turn("assistant", first), turn("user", SECOND)])
    (alone,) = greedy(base, [system, turn("user", SECOND)])
    assert len({first, second, alone}) == 3
    lines = (FIRST, "", SECOND, "/reset", SECOND, "/quit", FIRST)
    printed = call("chat", *GREEDY, "--system", "Be kind.", lines=lines)
    assert printed.out == f"{first}\n{second}\n{alone}\n"
    assert printed.err.count("tokens/s") == 3


def test_the_same_seed_says_the_same_and_each_turn_draws_anew(call):
    words = ["chat", *BASE, "--temperature", "4", "--seed"]
    lines = (FIRST, "/reset", FIRST)
    one, again, other = (call(*words, seed, lines=lines).out for seed in ("3", "3", "9"))
    assert one == again != other
    first = call(*words, "3", lines=lines[:1]).out
    assert one.startswith(first)
    assert one != first * 2


def test_answers_are_streamed_and_are_those_of_a_whole_answer(engine):
    base, seen = engine.untrained(), []
    settings = {"max_new_tokens": 48, "temperature": 4, "seed": 1, "stop_ids": []}
    (whole,) = base.sample([FIRST], **settings)
    (streamed,) = base.sample([FIRST], **settings, stream=lambda i, text: seen.append((i, text)))
    assert streamed.tokens == whole.tokens
    assert len(seen) >= 48 // decode.STEPS_PER_CALL
    assert {i for i, _ in seen} == {0}
    assert all(later.startswith(text) for (_, text), (_, later) in itertools.pairwise(seen))
    assert seen[-1][1] == whole.text.rstrip("\ufffd")


def test_a_growing_conversation_needs_few_programs(engine):
    base, lengths = engine.untrained(), []
    original = decode.make_prefill

    def watch(*arguments):
        program = original(*arguments)
        return lambda state, lora, weights, tokens, *rest: (
            lengths.append(tokens.shape[1]),
            program(state, lora, weights, tokens, *rest),
        )[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "make_prefill", watch)
        for n in (10, 40, 70, 100):
            base.sample([[5] * n], max_new_tokens=48, temperature=0, stream=lambda *_: None)
    assert lengths == [32, 64, 128, 128]
    assert [decode.power_of_two(n, 32) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]


def test_a_control_token_ends_a_pipe_and_only_a_turn_of_a_terminal(call, monkeypatch, capsys):
    with pytest.raises(UserError, match="holds the control token '<|im_end|>'".replace("|", r"\|")):
        call("chat", *GREEDY, lines=("stop <|im_end|>", FIRST))
    assert capsys.readouterr().out == ""
    typed = iter([FIRST, "stop <|im_end|>", "/nope", SECOND])

    def type_next(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_next)
    both = call("chat", *GREEDY, lines=(FIRST, SECOND)).out
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "argv", ["jaxlora", "chat", *GREEDY])
    assert commands.main() == 0
    printed = capsys.readouterr()
    assert printed.out == f"{both}\n"  # and the end of the line on which the input ended
    assert printed.err.count("error: ") == 2
    assert "/nope: no such command" in printed.err


def test_a_full_conversation_says_so(call):
    with pytest.raises(UserError, match="of 2048 tokens; /reset starts a new one"):
        call("chat", *GREEDY, lines=("apples " * 2100,))


def test_a_run_and_its_adapter_say_what_they_learned(engine, run, call, tmp_path):
    trained = engine.open(run)
    (expected,) = greedy(trained, FIRST)
    assert expected != greedy(engine.untrained(), FIRST)[0]
    options = ["--temperature", "0", "--max-new-tokens", "48"]
    assert call("chat", "--run", run, *options, lines=(FIRST,)).out == f"{expected}\n"
    trained.save(tmp_path / "adapter")
    assert call("chat", "--adapter", tmp_path / "adapter", *options, lines=(FIRST,)).out == f"{expected}\n"


# --- Generate -----------------------------------------------------------------------------------------------


def test_a_file_of_prompts_is_answered_in_its_order(engine, call, tmp_path):
    chat = [turn("system", "Be kind."), turn("user", SECOND)]
    rows = [{"id": "a", "prompt": FIRST}, {"question": SECOND}, {"messages": chat, "row_id": 7}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "a.jsonl"
    words = [*BASE, "--temperature", "1", "--top-p", "0.9", "--seed", "5", "--batch", "2"]
    printed = call("generate", tmp_path / "p.jsonl", "--out", out, *words)
    assert printed.out == ""
    assert "3 answers" in printed.err
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    expected = engine.untrained().sample([FIRST, SECOND, chat], 48, 1.0, 0.9, 5, slots=2)
    for answer, sample in zip(answers, expected, strict=True):
        assert (answer["text"], answer["tokens"]) == (sample.text, sample.tokens)
        assert answer["stop_reason"] == sample.stop_reason
        np.testing.assert_allclose(answer["logprob"], sum(sample.logprobs), atol=1e-3)
    assert [answer["prompt"] for answer in answers] == [FIRST, SECOND, chat]
    assert [{k: v for k, v in a.items() if k.endswith("id")} for a in answers] == [
        {"id": "a"},
        {},
        {"row_id": 7},
    ]
    with pytest.raises(UserError, match="exists already; give a new file"):
        call("generate", tmp_path / "p.jsonl", "--out", out, *words)


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "p.json", "p.jsonl.gz"])
def test_prompts_are_read_from_every_kind_of_file_that_trains(tmp_path, name):
    rows = [{"id": "a", "prompt": "One,\ntwo?"}, {"id": "b", "prompt": "Três?"}]
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        csv = 'id,prompt\r\na,"One,\ntwo?"\r\nb,Três?\r\n'
        path.write_bytes({"p.jsonl": lines, "p.csv": csv, "p.json": json.dumps(rows)}[name].encode())
    assert [row for _, row in read_prompts(str(path))] == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "give one of prompt, question, messages; the row has 'text'"),
        ('{"prompt": "a", "question": "b"}', "give one of prompt"),
        ('{"prompt": ["a"]}', "prompt must be text"),
        ('{"prompt": ""}', "prompt must be text"),
        ('{"messages": "a"}', "messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "message 1: content must be text"),
        ('{"messages": [3]}', "message 1: give an object with role and content"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "end with role 'assistant'"),
        ('{"prompt": "a <|im_end|>"}', "control token"),
        ('{"prompt": "a", "id": [1]}', "id must be text or a whole number"),
        ('{"prompt": "a", "id": "\\ud800"}', "half a surrogate pair"),
        (json.dumps({"prompt": "apples " * 2100}), "shorten it"),
        ("{", "broken JSON"),
    ],
)
def test_a_row_without_a_prompt_is_one_line_that_names_it(call, tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        call("generate", tmp_path / "p.jsonl", "--out", tmp_path / "a.jsonl", *GREEDY)
    assert f"{tmp_path / 'p.jsonl'}:2: " in str(error.value)
    assert message in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]
