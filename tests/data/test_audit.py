"""Promises of the audits: figures that can be counted by hand, and a page that its data cannot script."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from html.parser import HTMLParser

import pytest

from jaxlora.data.audit import OUTPUTS, audit, choose_rows, find_rendered, quality, token_statistics
from jaxlora.data.mathml import text_to_html
from jaxlora.data.render import load_tokenizer, prompt_messages, render_batch
from jaxlora.runtime.errors import UserError

ATTACKS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></article><iframe src=https://example.org></iframe>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    r"$\text{<script>alert(1)</script>}$",
    r"$\href{javascript:alert(1)}{x}$",
    r"$\style{background:url(https://example.org)}{x}$",
    r'$x" onclick="alert(1)$',
    r"\[ \mathrm{</math><script>alert(1)</script>} \]",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    r"$\text{&lt;script&gt;alert(1)&lt;/script&gt;}$",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded:base")


def row(i, problem, solution, expected="6", source="math"):
    messages = [*prompt_messages(problem), {"role": "assistant", "content": solution}]
    return {"row_id": f"id-{i}", "source": source, "expected_answer": expected, "messages": messages}


def write(folder, train, validation):
    (folder / "rendered").mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("val", validation)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"rendered/{name}.jsonl").write_text(text)
    return find_rendered(folder)


def plain(count, first=0):
    return [row(first + i, f"What is {i}?", "so " * (i % 9) + "\\boxed{6}") for i in range(count)]


def run(files, tokenizer, out, **options):
    defaults = {"seed": 0, "pack_rows": 100}
    return audit(files, tokenizer, "the tokenizer", out, **(defaults | options))


class Page(HTMLParser):
    """All elements with their attributes, and the texts of script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.inside = [], {"script": [], "style": []}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside in self.text:
            self.text[self.inside].append(data)

    def handle_endtag(self, tag):
        self.inside = None


class TestFigures:
    def test_quality_counts_every_hit(self, tokenizer, tmp_path):
        train = [
            *plain(6),
            row(10, "Problem: what?", "it must be an integer \\boxed{7}"),
            row(11, "What?", "no box", source="gsm8k"),
            row(12, "What?", "\\boxed{7}", expected=None),
        ]
        reports = run(write(tmp_path / "d", train, plain(3, 20)), tokenizer, tmp_path / "out")
        assert reports["quality"]["train"] == {
            "rows": 9,
            "rows_by_source": {"gsm8k": 1, "math": 8},
            "distinct_row_ids": 9,
            "rows_with_expected_answer": 8,
            "boxed_matches": 6,
            "boxed_match_rate": 0.75,
            "missing_box": 1,
            "boxed_mismatch": 1,
            "suspicious_hits": 1,
            "prompt_wrapper_hits": 1,
        }
        assert reports["quality"]["val"]["boxed_match_rate"] == 1.0
        assert reports["quality"]["all"]["rows"] == 12

    def test_token_counts_are_those_of_training(self, tokenizer, tmp_path):
        train, validation = plain(30), plain(5, 50)
        reports = run(write(tmp_path / "d", train, validation), tokenizer, tmp_path / "out")
        rendered = render_batch(tokenizer, [(row["row_id"], row["messages"]) for row in train])
        counts = [row.n_tokens for row in rendered]
        found = reports["tokens"]["train"]["with_system_prompt"]
        assert found["total"] == sum(counts)
        assert found["max"] == max(counts)
        assert found["mean"] == pytest.approx(statistics.fmean(counts))
        assert found["p50"] == statistics.median(counts)
        cost = reports["tokens"]["all"]["system_prompt_tokens_per_row"]
        bare = reports["tokens"]["train"]["without_system_prompt"]["total"]
        assert cost["min"] == cost["max"] == (sum(counts) - bare) / 30

    def test_with_the_real_tokenizer_the_system_prompt_costs_27_tokens_a_row(self, shared, tmp_path):
        files = write(tmp_path / "d", plain(10), plain(3, 20))
        reports = run(files, load_tokenizer(shared / "data/qwen3-tokenizer"), tmp_path / "out")
        assert reports["tokens"]["all"]["system_prompt_tokens_per_row"] == {"min": 27, "max": 27}

    def test_percentiles_and_histogram_of_known_numbers(self):
        found = token_statistics(list(range(1, 102)))
        assert (found["p50"], found["p90"], found["p95"]) == (51.0, 91.0, 96.0)
        assert found["histogram"] == [[0, 64, 63], [64, 128, 38]]
        assert found["total"] == 5151

    def test_rows_that_cannot_be_used_are_errors_with_file_and_line(self, tokenizer, tmp_path):
        files = write(tmp_path / "d", [*plain(2), row(3, "q", "")], plain(2))
        with pytest.raises(UserError, match=r"train.jsonl:3: empty answer"):
            run(files, tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_nothing_is_overwritten_unless_asked(self, tokenizer, tmp_path):
        files = write(tmp_path / "d", plain(4), plain(2, 10))
        run(files, tokenizer, tmp_path / "out")
        with pytest.raises(UserError, match="--overwrite"):
            run(files, tokenizer, tmp_path / "out")
        run(files, tokenizer, tmp_path / "out", overwrite=True)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(OUTPUTS)

    def test_no_expected_answers_is_no_rate(self):
        assert quality([])["boxed_match_rate"] is None


class TestReviewPack:
    def test_holds_100_seeded_rows_with_source_and_reason(self, tokenizer, tmp_path):
        train = [*plain(150), *(row(900 + i, "q", "no box") for i in range(50))]
        validation = plain(20, 300)
        files = write(tmp_path / "d", train, validation)
        run(files, tokenizer, tmp_path / "a")
        run(files, tokenizer, tmp_path / "b")
        run(files, tokenizer, tmp_path / "c", seed=1)
        text = (tmp_path / "a/review.jsonl").read_text()
        pack = [json.loads(line) for line in text.splitlines()]
        assert text == (tmp_path / "b/review.jsonl").read_text()
        assert text != (tmp_path / "c/review.jsonl").read_text()
        assert len(pack) == len({(row["split"], row["line"]) for row in pack}) == 100
        assert sum(row["reason"] == "flagged: missing_box" for row in pack) == 30
        assert {row["source"] for row in pack} == {"math"}
        for entry in pack:
            rows = train if entry["split"] == "train" else validation
            assert rows[entry["line"] - 1]["row_id"] == entry["row_id"]

    def test_a_small_dataset_gives_all_its_rows(self, tokenizer, tmp_path):
        pack = run(write(tmp_path / "d", plain(7), plain(2, 20)), tokenizer, tmp_path / "out")["review"]
        assert len(pack) == 9
        assert choose_rows([], 0, 100) == []

    def test_masked_and_learned_text_meet_at_the_answer(self, tokenizer, tmp_path):
        pack = run(write(tmp_path / "d", plain(3), plain(1, 9)), tokenizer, tmp_path / "out")["review"]
        for entry in pack:
            assert entry["masked_text"].endswith("</think>\n\n")
            assert "\\boxed{6}" in entry["learned_text"]
            assert entry["prompt_tokens"] + entry["answer_tokens"] > 20


class TestPage:
    @pytest.fixture(scope="class")
    def page(self, tokenizer, tmp_path_factory):
        folder = tmp_path_factory.mktemp("page")
        attacks = [
            row(i, f"{text} what?", f"{text} so $\\frac{{1}}{{2}}$, \\boxed{{{i}}}", text, source=text)
            for i, text in enumerate(ATTACKS)
        ]
        run(write(folder / "d", attacks, plain(2, 90)), tokenizer, folder / "out")
        return (folder / "out/review.html").read_text()

    def test_the_data_adds_no_element_but_mathml(self, page):
        parsed = Page(page)
        tags = [tag for tag, _ in parsed.elements]
        assert tags.count("script") == tags.count("style") == 1
        assert not {"iframe", "img", "svg", "object", "embed", "link", "base", "a", "form"} & set(tags)
        assert tags.count("article") == len(ATTACKS) + 2
        assert tags.count("mfrac") == len(ATTACKS)

    def test_no_element_carries_code_or_an_address(self, page):
        for tag, attributes in Page(page).elements:
            for name in attributes:
                assert not name.startswith("on"), (tag, name)
                assert name not in {"href", "src", "style", "srcdoc", "action", "xlink:href"}, (tag, name)

    def test_the_policy_allows_only_the_pages_own_script_and_style(self, page):
        parsed = Page(page)
        metas = [attributes for tag, attributes in parsed.elements if tag == "meta"]
        (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        for name in ("script", "style"):
            (text,) = parsed.text[name]
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{name}-src 'sha256-{digest}'" in policy
        assert "unsafe" not in policy

    def test_the_text_of_an_attack_can_be_read(self, page):
        assert "&lt;img src=x onerror=alert(1)&gt;" in page
        assert "{{ 7 * 7 }}" in page

    def test_both_sides_of_the_mask_are_marked_in_every_row(self, page):
        parsed = Page(page)
        classes = [a.get("class", "") for tag, a in parsed.elements if tag == "span"]
        assert classes.count("masked") == classes.count("learned") == len(ATTACKS) + 2 + 1  # and the legend


class TestFormulas:
    @pytest.mark.parametrize(
        ("text", "element"),
        [
            (r"$\frac{1}{2}$", "<mfrac>"),
            (r"\(x^2\)", "<msup>"),
            (r"\[\sqrt{2}\]", "<msqrt>"),
            (r"$$\sum_{i=1}^n i$$", 'display="block"'),
            (r"\begin{align*}a&=b\\c&=d\end{align*}", "<mtable"),
            (r"so \boxed{\frac{1}{2}}.", "<menclose"),
        ],
    )
    def test_become_mathml(self, text, element):
        assert element in text_to_html(text)

    @pytest.mark.parametrize(
        "text", ["He has $12 and $5.", "costs $5/$6 each", r"a \$5 bill and \$6", "$ 5 $", "$5-$6"]
    )
    def test_money_stays_text(self, text):
        assert text_to_html(text) == text

    def test_an_element_that_is_not_mathml_is_refused_whatever_the_converter_makes(self, monkeypatch):
        from xml.etree.ElementTree import Element, SubElement

        from jaxlora.data import mathml

        tree = Element("math")
        SubElement(tree, "script").text = "alert(1)"
        monkeypatch.setattr(mathml, "convert_to_element", lambda *_, **__: tree)
        assert text_to_html("$x$") == "<code class=tex>$x$</code>"

    @pytest.mark.parametrize("text", [r"$\frac{1$", r"$\unknowncommand{3}$", r"$}{$", r"$\left($"])
    def test_what_cannot_be_drawn_is_shown_as_it_is(self, text):
        assert text_to_html(text) == f"<code class=tex>{text}</code>"
