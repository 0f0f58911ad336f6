"""Promises of the embedded default: its data, its tokenizer, and the paths that lead to them."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxlora.data.render import SYSTEM_PROMPT
from jaxlora.embedded.corpus import pretraining_documents, pretraining_texts
from jaxlora.embedded.files import (
    ROWS,
    check_files,
    data_files,
    write_files,
)
from jaxlora.embedded.tokenizer import SPECIAL, THINK, VOCABULARY, tokenizer_files, train_sentencepiece
from jaxlora.embedded.word_problems import (
    LARGEST,
    SPLIT_PERCENT,
    conversation,
    problem,
    split_of,
)
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import embedded_path, resolve

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
TOKENIZER = AutoTokenizer.from_pretrained(str(embedded_path("base")))


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in embedded_path(f"data/{name}").read_text().splitlines()]


def canonical(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def equations(text: str) -> list[tuple[str, ...]]:
    return EQUATION.findall(re.sub(r"<<.*?>>", "", text))


def shipped() -> dict[str, dict[str, str]]:
    """For each split: canonical question -> worked solution."""
    splits = {"test": {canonical(row["question"]): row["answer"] for row in read("test.jsonl")}}
    for split in ("train", "val"):
        rows = read(f"{split}.jsonl")
        splits[split] = {canonical(r["messages"][1]["content"]): r["messages"][2]["content"] for r in rows}
    return splits


class TestThePathsLeadToShippedFiles:
    def test_embedded_paths_resolve_and_other_paths_are_left_alone(self):
        assert resolve("embedded:data/train.jsonl") == embedded_path("data/train.jsonl")
        assert (resolve("embedded:base") / "tokenizer.json").is_file()
        assert resolve("some/where") == Path("some/where")

    @pytest.mark.parametrize("name", ["nothing", "", "../errors.py", "data/tests.jsonl"])
    def test_an_unknown_name_is_an_error_that_lists_what_exists(self, name):
        with pytest.raises(UserError, match=r"embedded:base.*embedded:data/test\.jsonl"):
            resolve(f"embedded:{name}")


class TestTheShippedFilesAreReproduced:
    def test_the_data_byte_for_byte(self):
        check_files(data_files(), embedded_path("data"))

    def test_the_tokenizer_byte_for_byte(self):
        check_files(tokenizer_files(), embedded_path("base"))

    def test_a_changed_or_missing_file_is_noticed(self, tmp_path):
        write_files({"a": b"1", "b": b"2"}, tmp_path, overwrite=False)
        check_files({"a": b"1", "b": b"2"}, tmp_path)
        with pytest.raises(UserError, match="not what this script generates"):
            check_files({"a": b"1", "b": b"3"}, tmp_path)
        with pytest.raises(UserError, match="missing"):
            check_files({"c": b""}, tmp_path)

    def test_existing_files_are_kept_unless_asked(self, tmp_path):
        write_files({"a": b"1"}, tmp_path, overwrite=False)
        with pytest.raises(UserError, match="overwrite"):
            write_files({"new": b"", "a": b"2"}, tmp_path, overwrite=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
        write_files({"a": b"2"}, tmp_path, overwrite=True)
        assert (tmp_path / "a").read_bytes() == b"2"

    def test_the_tool_checks_the_data_and_explains_itself(self, repository):
        tool = [sys.executable, str(repository / "tools/make_word_problems.py")]
        run = subprocess.run([*tool, "--check"], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (0, "")
        assert "byte for byte" in run.stdout
        run = subprocess.run(tool, capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert run.stderr == "error: nothing to do: give --out DIR or --check\n"

    def test_everything_shipped_stays_small(self):
        assert sum(path.stat().st_size for path in embedded_path("data").iterdir()) < 1_200_000
        assert sum(path.stat().st_size for path in embedded_path("base").iterdir()) <= 8_000_000


class TestNoSplitKnowsAnother:
    def test_no_question_is_in_two_splits_or_twice_in_one(self):
        splits = shipped()
        assert {split: len(rows) for split, rows in splits.items()} == ROWS
        assert len(set().union(*splits.values())) == sum(ROWS.values())

    def test_no_chain_of_equations_is_in_two_splits_or_in_the_pretraining_corpus(self):
        chains = {s: {str(equations(text)) for text in rows.values()} for s, rows in shipped().items()}
        chains["pretrain"] = set()
        for document in pretraining_documents(seed=11, count=3000):
            text = document if isinstance(document, str) else document[-1]["content"]
            drill = isinstance(document, str) and "Question" not in document
            alone = text.splitlines() if drill else [text]
            chains["pretrain"] |= {str(equations(part)) for part in alone}
        names = list(chains)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                assert not chains[first] & chains[second] - {"[]"}, (first, second)

    def test_a_signature_has_exactly_one_split_whatever_the_seed(self):
        assert sum(SPLIT_PERCENT.values()) == 100
        for split in SPLIT_PERCENT:
            for seed in range(20):
                assert split_of(problem(random.Random(seed), split).signature) == split


class TestTheProblemsAreRight:
    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, 2**32), st.sampled_from(list(SPLIT_PERCENT)))
    def test_every_equation_holds_and_follows_from_the_one_before(self, seed, split):
        item = problem(random.Random(seed), split)
        numbers = [int(number) for number in re.findall(r"\d+", item.question)]
        value: int | None = None
        for i, step in enumerate(item.steps):
            assert step.equation == f"{step.left} {step.op} {step.right} = {step.result}"
            exact = {"+": step.left + step.right, "-": step.left - step.right, "*": step.left * step.right}
            if step.op == "/":
                assert step.result * step.right == step.left
            else:
                assert step.result == exact[step.op]
            assert 2 <= min(step.left, step.right, step.result) <= max(step.left, step.result) <= LARGEST
            if i == 0:
                assert step.left == numbers.pop(0)
            else:
                assert step.left == value
            assert step.right == numbers.pop(0)
            value = step.result
        assert numbers == []
        assert item.answer == value
        assert item.question.endswith("?")

    def test_shipped_rows_have_the_rendered_schema_and_its_row_id(self):
        for row in read("train.jsonl") + read("val.jsonl"):
            assert list(row) == ["row_id", "source", "expected_answer", "messages"]
            system, user, assistant = row["messages"]
            assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
            assert system["content"] == SYSTEM_PROMPT
            text = "\n".join([row["source"], user["content"], row["expected_answer"]])
            assert row["row_id"] == hashlib.sha256(text.encode()).hexdigest()[:20]
            box = re.findall(r"\\boxed\{(\d+)\}", assistant["content"])
            assert box == [row["expected_answer"]] == [equations(assistant["content"])[-1][3]]

    def test_the_benchmark_has_gsm8ks_schema(self):
        for row in read("test.jsonl"):
            assert list(row) == ["question", "answer"]
            reference = row["answer"].rsplit("####", 1)[1].strip()
            assert reference == equations(row["answer"])[-1][3]
            for left, right in re.findall(r"<<(.*?)=(\d+)>>", row["answer"]):
                a, op, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", left).groups()
                a, b = int(a), int(b)
                assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op] == int(right)


class TestThePretrainingCorpusLeavesTheFormatToFineTuning:
    def test_it_is_a_function_of_the_seed(self):
        first, again, other = (list(pretraining_documents(seed, 200)) for seed in (1, 1, 2))
        assert first == again != other

    def test_no_document_solves_a_problem_in_a_box(self):
        boxed = 0
        for document in pretraining_documents(seed=5, count=4000):
            text = document if isinstance(document, str) else "\n".join(m["content"] for m in document)
            assert SYSTEM_PROMPT not in text
            if "boxed" in text:
                boxed += 1
                assert not equations(text)
                assert "How many" not in text
        assert 0.02 < boxed / 4000 < 0.06

    def test_every_text_ends_with_the_end_of_text_token(self):
        texts = list(pretraining_texts(seed=5, count=100, tokenizer=TOKENIZER))
        ends = [TOKENIZER(text).input_ids[-1] for text in texts]
        assert set(ends) == {TOKENIZER.convert_tokens_to_ids("<|endoftext|>")}
        assert any("<|im_start|>assistant\n<think>\n\n</think>\n\n" in text for text in texts)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=60)
FAMILIAR = st.lists(
    st.sampled_from(
        ["Tom", " has", " 24", " apples", ".", "\n", "  ", "boxed{7}", "\\", "é", "日", "\t", " Q"]
    )
).map("".join)


class TestTheTokenizer:
    @settings(max_examples=300, deadline=None)
    @given(TEXT | FAMILIAR)
    def test_every_text_survives_a_round_trip(self, text):
        assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text

    def test_it_gives_the_ids_of_the_sentencepiece_model(self):
        model = train_sentencepiece()
        reference = sentencepiece.SentencePieceProcessor(model_proto=model)
        assert reference.get_piece_size() == len(TOKENIZER) == VOCABULARY
        texts = [SYSTEM_PROMPT, "héllo  wörld\n\n 日本 1234", " a", "grown-ups\there?"]
        for split in ("train", "val"):
            texts += [
                message["content"] for row in read(f"{split}.jsonl")[:200] for message in row["messages"]
            ]
        for text in texts:
            assert TOKENIZER(text).input_ids == reference.encode(text), text

    def test_the_chat_marks_are_single_tokens_and_digits_stand_alone(self):
        for token in SPECIAL + THINK:
            assert TOKENIZER.tokenize(f"Tom{token}Ben") == ["Tom", token, "Ben"]
        assert TOKENIZER.tokenize("12345") == list("12345")
        assert TOKENIZER.eos_token == "<|im_end|>"
        assert TOKENIZER.pad_token == "<|endoftext|>"

    def test_rows_are_short(self):
        lengths = []
        for row in read("train.jsonl"):
            text = TOKENIZER.apply_chat_template(row["messages"], tokenize=False, enable_thinking=False)
            lengths.append(len(TOKENIZER(text).input_ids))
        assert sum(lengths) / len(lengths) < 130
        assert max(lengths) <= 176

    def test_the_prompt_is_a_prefix_of_the_full_render_token_for_token(self):
        for seed in range(50):
            messages = conversation(problem(random.Random(seed), "train"), "boxed")
            full = TOKENIZER.apply_chat_template(messages, enable_thinking=False, return_dict=False)
            prompt = TOKENIZER.apply_chat_template(
                messages[:2], add_generation_prompt=True, enable_thinking=False, return_dict=False
            )
            assert full[: len(prompt)] == prompt
            assert len(full) > len(prompt)


TURN = st.tuples(
    st.sampled_from(["system", "user", "assistant"]),
    st.sampled_from(
        ["4", "a\n", "\n\nb", "<think>\nwhy\n</think>\n\nc", "</think>d", "<think>e", "\\boxed{1}", ""]
    ),
)


class TestTheChatTemplateIsQwen3s:
    @pytest.fixture(scope="class")
    def qwen3(self, shared):
        return AutoTokenizer.from_pretrained(str(shared / "data/qwen3-tokenizer"))

    @settings(max_examples=400, deadline=None)
    @given(
        turns=st.lists(TURN, min_size=1, max_size=6),
        prompt=st.booleans(),
        thinking=st.sampled_from([None, True, False]),
    )
    def test_any_conversation_renders_to_the_same_text(self, qwen3, turns, prompt, thinking):
        messages = [{"role": role, "content": content} for role, content in turns]
        options = {} if thinking is None else {"enable_thinking": thinking}
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
            for tokenizer in (qwen3, TOKENIZER)
        ]
        assert texts[0] == texts[1]

    def test_separate_reasoning_renders_to_the_same_text(self, qwen3):
        messages = [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2", "reasoning_content": "\nadd\n"},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "add again"},
        ]
        for part in (messages, messages[:2], messages[:3]):
            texts = [t.apply_chat_template(part, tokenize=False) for t in (qwen3, TOKENIZER)]
            assert texts[0] == texts[1]

    def test_an_unknown_role_is_refused(self):
        with pytest.raises(Exception, match="unknown role tool"):
            TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
