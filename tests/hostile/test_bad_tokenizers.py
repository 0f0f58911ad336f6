"""Bad tokenizers and chat templates: no code of theirs runs, no loop or text of theirs grows for ever."""

from __future__ import annotations

import json
import mmap
import shutil
import time
from pathlib import Path

import pytest
from helpers.bad_input import FORBIDDEN_NAME, VALUES, assert_exit_2, attempt, bad_json, refused, tries
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data import render
from jaxlora.data.render import load_tokenizer, render_batch
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import embedded_path

BASE = embedded_path("base")
TOKENIZER = json.loads((BASE / "tokenizer.json").read_bytes())
SETTINGS = json.loads((BASE / "tokenizer_config.json").read_bytes())
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
FOLDER, TEMPLATE = "tokenizer folder", "chat template"


def make(folder: Path, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(BASE / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def use(folder: Path) -> None:
    (row,) = render_batch(load_tokenizer(folder), [("a", MESSAGES)])
    if isinstance(row, UserError):
        raise row
    assert 0 < row.prompt_length < len(row.tokens)


def test_the_tokenizer_that_is_changed_below_is_right(tmp_path):
    use(make(tmp_path / "t"))


class TestFolders:
    @tries(40)
    @given(bad_json(SETTINGS))
    def test_changed_settings(self, tmp_path, content):
        (make(tmp_path / "t") / "tokenizer_config.json").write_bytes(content)
        attempt(FOLDER, use, tmp_path / "t")

    @tries(40)
    @given(bad_json({key: value for key, value in TOKENIZER.items() if key != "model"}), st.booleans())
    def test_a_changed_tokenizer_file(self, tmp_path, content, with_model):
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            values = None
        if with_model and isinstance(values, dict):
            content = json.dumps(values | {"model": TOKENIZER["model"]}).encode()
        (make(tmp_path / "t") / "tokenizer.json").write_bytes(content)
        attempt(FOLDER, use, tmp_path / "t")

    @tries(20)
    @given(st.sampled_from(["vocab", "merges", "type", "unk_token"]), VALUES)
    def test_a_changed_vocabulary(self, tmp_path, key, value):
        changed = TOKENIZER | {"model": TOKENIZER["model"] | {key: value}}
        (make(tmp_path / "t") / "tokenizer.json").write_text(json.dumps(changed))
        attempt(FOLDER, use, tmp_path / "t")

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_missing_file(self, tmp_path, name):
        (make(tmp_path / "t") / name).unlink()
        refused(FOLDER, use, tmp_path / "t")

    @pytest.mark.parametrize(
        "settings",
        [
            {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}, "tokenizer_class": "Own"},
            {"auto_map": {"AutoTokenizer": ["o/n--tokenization.Own", None]}, "tokenizer_class": "Own"},
            {"auto_map": {"AutoTokenizer": ["tokenization.Own", "tokenization.Own"]}},
        ],
        ids=["own class", "of another repository", "known class"],
    )
    def test_code_that_it_brings_is_never_run(self, tmp_path, settings):
        folder = make(tmp_path / "t", **settings)
        ran = tmp_path / "ran"
        (folder / "tokenization.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
        attempt(FOLDER, use, folder)
        assert not ran.exists()

    @pytest.mark.parametrize(
        "key", ["tokenizer_file", "vocab_file", "merges_file", "chat_template_file", "name_or_path"]
    )
    def test_no_setting_leads_to_a_file_outside(self, tmp_path, key):
        outside = make(tmp_path / FORBIDDEN_NAME)
        secret = json.loads((outside / "tokenizer.json").read_bytes())
        secret["model"]["vocab"] = {"<private>": 0}
        secret["model"]["merges"], secret["added_tokens"] = [], []
        (outside / "tokenizer.json").write_text(json.dumps(secret))
        place = outside if key == "name_or_path" else outside / "tokenizer.json"
        folder = make(tmp_path / "t", **{key: str(place)})

        def tokens() -> None:
            assert "<private>" not in load_tokenizer(folder).get_vocab()

        attempt(FOLDER, tokens)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    def test_a_link_out_of_the_folder_is_not_followed(self, tmp_path, name):
        outside = tmp_path / FORBIDDEN_NAME
        outside.mkdir()
        (outside / name).write_bytes(
            b"{{ private }}" if name.endswith("jinja") else (BASE / name).read_bytes()
        )
        folder = make(tmp_path / "t")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside / name)
        refused(FOLDER, load_tokenizer, folder)

    @pytest.mark.parametrize("words", [["--config.model.tokenizer=FOLDER"], ["--config.model.path=FOLDER"]])
    def test_the_entry_point_ends_with_code_2(self, repository, tmp_path, capsys, words):
        (make(tmp_path / "t") / "tokenizer.json").write_text("{")
        words = [word.replace("FOLDER", str(tmp_path / "t")) for word in words]
        script = repository / "tools/preview.py"
        assert_exit_2(FOLDER, script, ["--config", str(repository / "configs/tiny.py"), *words], capsys)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self._TemplateReference__context }}{{ lipsum.__globals__['os'] }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "{{ '%s'.format.__self__.__class__ }}{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__init__.__globals__}').format(cycler) }}",
    "{{ messages | map(attribute='__class__') | list }}{{ messages | attr('__class__') }}",
    "{{ messages.append('x') }}",
    "{{ messages[0].update(role='system') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('true') }}",
    "{% extends '/etc/passwd' %}",
]
SECRETS = ("subclasses", "<module", "built-in", "<class", "__builtins__", "root:")
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(10 ** 12) %}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ ['a' * 10 ** 6] * 10 ** 6 }}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ 'a' | center(10 ** 11) }}",
    "{{ '%099999999999d' | format(1) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
]
USELESS = [
    "{{ nothing_of_this_name.x }}",
    "{% for %}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no system turn, please') }}",
    "{% if",
    "((" * 3000,
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{% if a %}" * 300 + "{% endif %}" * 300,
    "",
    "always the same",
    "{{ messages[0].content }}",
    "{{ '\\ud800' }}{{ messages }}",
    "{% if add_generation_prompt %}x{% else %}y{% endif %}",
]


class TestTemplates:
    @pytest.mark.parametrize("template", ESCAPES, ids=lambda text: text[:40])
    def test_the_sandbox_holds(self, tmp_path, template):
        """Refused, or rendered without anything of Python in it; `watched` sees what it would do."""
        folder = make(tmp_path / "t", chat_template=template)
        before = json.dumps(MESSAGES)

        def show() -> None:
            text = render.chat_text(load_tokenizer(folder), MESSAGES, True)
            assert not any(secret in text for secret in SECRETS), text[:300]

        attempt(TEMPLATE, show)
        assert json.dumps(MESSAGES) == before

    @pytest.mark.parametrize("template", ENDLESS, ids=lambda text: text[:40])
    def test_a_loop_or_a_text_without_end_is_stopped(self, tmp_path, monkeypatch, template):
        monkeypatch.setattr(render, "TEMPLATE_SECONDS", 0.5)
        monkeypatch.setattr(render, "TEMPLATE_BYTES", 200 * 2**20)
        tokenizer = load_tokenizer(make(tmp_path / "t", chat_template=template))
        start = time.process_time()
        refused(TEMPLATE, render.chat_text, tokenizer, MESSAGES, True)
        assert time.process_time() - start < 5

    @pytest.mark.parametrize("template", USELESS, ids=lambda text: text[:40])
    def test_a_template_that_gives_no_loss_mask_is_refused(self, tmp_path, template):
        refused(TEMPLATE, use, make(tmp_path / "t", chat_template=template))

    @tries(150)
    @given(
        st.one_of(
            st.text("{}%#-~|().'\" abcendforifrange0123[]_messages\n", max_size=60),
            st.lists(
                st.sampled_from(
                    [
                        "{{",
                        "}}",
                        "{%",
                        "%}",
                        " for ",
                        " in ",
                        "messages",
                        " endfor ",
                        "|",
                        "tojson",
                        " if ",
                        " endif ",
                        "[0]",
                        ".content",
                        "'x'",
                        "(",
                        ")",
                    ]
                ),
                max_size=12,
            ).map("".join),
        )
    )
    def test_any_text_is_a_template_that_works_or_one_line(self, tmp_path, template):
        attempt(TEMPLATE, use, make(tmp_path / "t", chat_template=template))

    def test_the_limits_are_lifted_again(self, tmp_path):
        use(make(tmp_path / "t"))
        mmap.mmap(-1, 3 * render.TEMPLATE_BYTES).close()  # more than a template may have; never touched
