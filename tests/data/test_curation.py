"""Promises of the dataset's rules, written from their text: accept, identify, group, split, render."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.boxes import last_box
from jaxlora.data.curation import (
    REASONS,
    canonical_problem,
    is_prompt_wrapper,
    is_suspicious,
    normal_answer,
    problem_key,
    reject_reason,
    row_id,
    row_lines,
    split_by_problem,
)
from jaxlora.data.study_dataset import STUDY, differences

SUSPICIOUS = [
    "cannot spend more than",
    "cannot be accurately completed",
    "cannot be accurately provided",
    "cannot directly calculate or deduce",
    "doesn't align with the logical outcome",
    "i must provide an answer",
    "need for numerical or graphical methods",
    "without further clarification",
    "without further specific steps",
    "acknowledging the complexity",
    "more sophisticated mathematical approach",
    "set the value to 100",
    "strictly interpreting",
    "would technically not have any money left",
    "must be an integer",
    "seems to be looking for",
]
WRAPPERS = [
    "new problem:",
    "New problem :",
    "The new problem is: 3?",
    "the new problem is :",
    "Here is a new problem:",
    "here is a new problem\t:",
    "Write another problem",
    "another problem inspired by this one",
    "INSPIRED BY THIS ONE",
    "consider the next problem",
    "let the students",
    "solve this problem independently",
    "create a new problem",
    "reasoning skill for creating a new problem",
    "let's modify it to create a new problem",
    "this question is identical to the previous one",
    "Note: do not go over the length",
    "no similar problem needed",
]


class TestLastBox:
    @pytest.mark.parametrize(
        ("text", "box"),
        [
            (r"so \boxed{6}", "6"),
            (r"\boxed{1} then \boxed{2}.", "2"),
            (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
            (r"\boxed{\text{a} + {b}} tail }", r"\text{a} + {b}"),
            (r"\boxed{}", ""),
            (r"\boxed{a \boxed{b} c}", "b"),  # the last literal is the inner one
            (r"\boxed{1} and \boxed{2", None),  # an unclosed last box hides earlier ones
            (r"\boxed{1} and \boxed{\frac{2}{3}", None),
            (r"\boxed {6}", None),  # the literal has no space
            (r"\boxed 6", None),
            ("boxed{6}", None),
            ("no box", None),
            ("", None),
            ("\\boxed{1\n2}", "1\n2"),
        ],
    )
    def test_is_found_from_the_right_by_matching_braces(self, text, box):
        assert last_box(text) == box

    @given(st.text(alphabet="{}x\\", max_size=30))
    def test_agrees_with_counting_letter_by_letter(self, tail):
        depth, content, expected = 1, "", None
        for letter in tail:
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                expected = content
                break
            content += letter
        assert last_box("x \\boxed{" + tail) == expected


class TestAcceptance:
    @pytest.mark.parametrize(
        ("solution", "expected"),
        [
            (r"\boxed{6}", "6"),
            (r"\boxed{ 1 0 }", "10"),
            (r"\boxed{\left( 1, 2 \right)}", "(1,2)"),
            (r"\boxed{\tfrac{1}{2}}", r"\frac{1}{2}"),
            (r"\boxed{\frac 12}", r"\tfrac12"),
            ("\\boxed{a b\u3000c}", "abc"),
        ],
    )
    def test_equal_after_white_space_left_right_and_tfrac(self, solution, expected):
        assert reject_reason("p", solution, expected) is None

    @pytest.mark.parametrize(
        ("solution", "expected"),
        [
            (r"\boxed{6}", "7"),
            (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"),  # only \tfrac is rewritten
            (r"\boxed{0.5}", r"\frac{1}{2}"),
            (r"\boxed{X}", "x"),
            (r"\boxed{6}", ""),
            (r"\boxed{５}", "5"),  # answers are not folded, problems are
        ],
    )
    def test_anything_else_is_a_mismatch(self, solution, expected):
        assert reject_reason("p", solution, expected) == "boxed_mismatch"

    def test_missing_box(self):
        assert reject_reason("p", "the answer is 6", "6") == "missing_box"
        assert reject_reason("p", r"\boxed{6} \boxed{6", "6") == "missing_box"

    @pytest.mark.parametrize("phrase", SUSPICIOUS)
    def test_each_suspicious_phrase_in_any_case_and_inside_words(self, phrase):
        for text in (phrase, phrase.upper(), f"x{phrase}y"):
            assert is_suspicious(text)
            assert reject_reason("p", text + r" \boxed{6}", "6") == "suspicious_pattern"

    def test_there_are_sixteen_phrases_and_near_misses_pass(self):
        assert len(set(SUSPICIOUS)) == 16
        assert not is_suspicious("x must be\nan integer; cannot  spend more than")

    @pytest.mark.parametrize("phrase", WRAPPERS)
    def test_each_prompt_wrapper_in_any_case_anywhere(self, phrase):
        for text in (phrase, phrase.upper(), f"Some text. ({phrase} more"):
            assert is_prompt_wrapper(text)
            assert reject_reason(text, r"\boxed{6}", "6") == "problem_pattern"

    @pytest.mark.parametrize("text", ["Problem: 3?", "problem : 3?", " \n\tPROBLEM\n: 3?"])
    def test_a_problem_that_starts_with_problem_colon(self, text):
        assert is_prompt_wrapper(text)

    @pytest.mark.parametrize(
        "text",
        [
            "The problem: 3?",
            "Problems: 3?",
            "A renew problem: 3?",
            "outlet the students pass",
            "let the studentship",
            "uninspired by this one",
            "inspired by this onesie",
            "new problem, then: 3",
            "a problem needed",
        ],
    )
    def test_word_boundaries_and_the_start_are_kept(self, text):
        assert not is_prompt_wrapper(text)

    def test_the_first_failing_reason_wins(self):
        bad_problem, bad_text = "Problem: 1", "must be an integer"
        assert reject_reason(bad_problem, bad_text, "6") == REASONS[0] == "missing_box"
        assert reject_reason(bad_problem, bad_text + r"\boxed{5}", "6") == REASONS[1] == "boxed_mismatch"
        assert reject_reason(bad_problem, bad_text + r"\boxed{6}", "6") == REASONS[2] == "suspicious_pattern"
        assert reject_reason(bad_problem, r"\boxed{6}", "6") == REASONS[3] == "problem_pattern"
        assert reject_reason("1?", r"\boxed{6}", "6") is None

    def test_normal_form_removes_white_space_first(self):
        assert normal_answer("\\le ft( 1") == "(1"


class TestRowId:
    def test_is_the_known_id_of_a_known_row(self):
        problem = (
            "For what base is the representation of $285_{10}$ a four digit number whose final digit is odd?"
        )
        assert row_id("math", problem, "6") == "5c57a662df426e29b7de"

    def test_hashes_utf8_with_single_newlines_and_leaves_the_text_alone(self):
        text = "math\n é\r\n２ \n\\frac12"
        assert (
            row_id("math", " é\r\n２ ", "\\frac12") == hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]
        )


class TestLines:
    @given(st.text(), st.text(), st.text(), st.sampled_from(["gsm8k", "math", 'q"']))
    def test_are_what_json_writes_with_keys_in_order_and_non_ascii_kept(
        self, problem, solution, expected, source
    ):
        raw, rendered = row_lines(source, problem, solution, expected)
        system = "You are a careful math solver. Solve the problem step by step."
        system += " Put the final answer in \\boxed{}."
        head = {"row_id": row_id(source, problem, expected), "source": source}
        row = head | {"problem": problem, "generated_solution": solution, "expected_answer": expected}
        turns = [("system", system), ("user", problem), ("assistant", solution)]
        messages = [{"role": role, "content": content} for role, content in turns]
        assert raw == json.dumps(row, ensure_ascii=False)
        assert rendered == json.dumps(
            head | {"expected_answer": expected, "messages": messages}, ensure_ascii=False
        )
        assert "\n" not in raw + rendered

    def test_rendered_rows_are_as_much_longer_as_the_studys_files_say(self):
        files, rows = STUDY["files"], STUDY["split_rows"]
        raw, rendered = row_lines("math", "a", "b", "c")
        for part in ("train", "val"):
            extra = files[f"rendered/{part}.jsonl"]["bytes"] - files[f"raw/{part}.jsonl"]["bytes"]
            assert len(rendered) - len(raw) == extra / rows[part]["total"]


class TestCanonicalProblem:
    @pytest.mark.parametrize(
        "variant",
        [
            "What is 2+3?",
            "  what IS\t2+3?\n",
            "What\r\nis 2+3?",
            "What\u00a0is\u30002+3?",
            "Ｗｈａｔ ｉｓ ２＋３？",
            "What is ²+3?",  # NFKC folds superscripts too
        ],
    )
    def test_case_white_space_and_compatibility_forms_are_the_same_problem(self, variant):
        assert canonical_problem(variant) == "what is 2+3?"
        assert problem_key(variant) == problem_key("what is 2+3?")

    def test_ligatures_fold_and_look_alikes_of_other_alphabets_do_not(self):
        assert canonical_problem("ﬁnd") == "find"
        assert canonical_problem("wh\u0430t") != "what"  # Cyrillic a
        assert canonical_problem("2 + 3") != canonical_problem("2+3")

    def test_composed_and_decomposed_letters_are_the_same(self):
        assert canonical_problem("café") == canonical_problem("cafe\u0301")


def study_split(rows, seed=20260420):
    """The split as its text says it, with whole strings and no cleverness. `rows`: (source, problem)."""
    groups = {}
    for source in ("gsm8k", "math"):
        for index, (its_source, problem) in enumerate(rows):
            if its_source == source:
                text = " ".join(unicodedata.normalize("NFKC", problem).lower().strip().split())
                groups.setdefault(text, []).append(index)
    listed = list(groups.values())
    generator = random.Random(seed)
    generator.shuffle(listed)
    validation, train = [], []
    for group in listed:
        (validation if len(validation) < round(0.1 * len(rows)) else train).extend(group)
    generator.shuffle(train)
    generator.shuffle(validation)
    return train, validation


def package_split(rows):
    visits = []
    for source in ("gsm8k", "math"):
        indices = [i for i, row in enumerate(rows) if row[0] == source]
        visits.append((indices, [problem_key(rows[i][1]) for i in indices]))
    return split_by_problem(visits)


PROBLEMS = st.tuples(
    st.sampled_from(["gsm8k", "math"]),
    st.sampled_from(["a", "A ", "ａ", "b", " b", "c", "C\n", "d e", "d  E", "f", "g", "h", "ｈ"]),
)


class TestSplit:
    @given(st.lists(PROBLEMS, max_size=60))
    def test_is_the_split_of_the_text_row_by_row(self, rows):
        split = package_split(rows)
        assert (split.train, split.validation) == study_split(rows)

    @given(st.lists(PROBLEMS, max_size=60))
    def test_no_problem_straddles_and_no_row_is_lost(self, rows):
        split = package_split(rows)
        assert sorted(split.train + split.validation) == list(range(len(rows)))
        train = {canonical_problem(rows[i][1]) for i in split.train}
        validation = {canonical_problem(rows[i][1]) for i in split.validation}
        assert not train & validation
        assert (len(train), len(validation)) == (split.train_groups, split.validation_groups)

    def test_sources_are_visited_gsm8k_first_whatever_the_stream_order(self):
        rows = [("math", f"m{i}") for i in range(40)] + [("gsm8k", f"g{i}") for i in range(40)]
        split = package_split(rows)
        assert (split.train, split.validation) == study_split(rows)
        assert (split.train, split.validation) != (package_split(rows[::-1]).train, split.validation)

    def test_validation_stops_at_the_first_group_that_reaches_its_share(self):
        rows = [("math", f"p{i % 25}") for i in range(100)]  # groups of 4; 10 rows are wanted
        split = package_split(rows)
        assert len(split.validation) == 12
        assert split.validation_groups == 3


class TestStudyFigures:
    def test_are_those_of_the_reference(self, shared):
        reference = json.loads((shared / "reference/study.json").read_text())["dataset"]
        assert STUDY["files"] == reference["files"]
        for name in ("candidates", "accepted", "split_rows", "split_groups"):
            assert STUDY[name] == reference[name]
        hits = {f"{s}:{r}": n for s, reasons in STUDY["rejected"].items() for r, n in reasons.items() if n}
        assert hits == reference["rejected"]

    def test_add_up(self):
        for source in ("gsm8k", "math"):
            rejected = sum(STUDY["rejected"][source].values())
            assert STUDY["accepted"][source] == STUDY["candidates"][source] - rejected
            parts = STUDY["split_rows"]
            assert parts["train"][source] + parts["val"][source] == STUDY["accepted"][source]

    def test_differences_name_every_figure_that_is_not_the_studys(self):
        found = json.loads(json.dumps(STUDY))
        assert differences(found) == []
        found["accepted"]["math"] += 1
        found["files"]["raw/val.jsonl"]["sha256"] = "0" * 64
        del found["split_groups"]
        lines = differences(found)
        assert [line.split(":")[0] for line in lines] == [
            "accepted.math",
            "split_groups.train",
            "split_groups.val",
            "files.raw/val.jsonl.sha256",
        ]
