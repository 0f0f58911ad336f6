"""What came from elsewhere is never run, no key is ever written, and no page carries foreign markup."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.bad_input import TEXTS, TRIED, tries
from helpers.study_fixtures import build_study, empty_pictures, make_report
from helpers.xla_flags import xla_flags
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from jaxlora.checkpoints.peft import SETTINGS, WEIGHTS
from jaxlora.data.mathml import text_to_html
from jaxlora.data.render import load_tokenizer
from jaxlora.data.review import review_page
from jaxlora.data.rows import load_rendered_rows
from jaxlora.parity.backend import Pass
from jaxlora.parity.recording import Settings, record
from jaxlora.runtime.pages import script_json
from jaxlora.runtime.text import holds_secret, without_secrets
from jaxlora.train.run_directory import RunDirectory

# --- Code ---------------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "code", "codeop"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "os.system", "os.popen", "yaml.load", "pandas.read_pickle", "tempfile.mktemp"}
SWITCHES = {"allow_pickle", "trust_remote_code", "shell"}
RUNS_PYTHON = {"jaxlora/cli.py"}  # a configuration file is Python, and is run


def offences(source: str, name: str) -> list[str]:
    """Every place where a source file could run what it was given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            for module in names:
                if module.partition(".")[0] in MODULES or (module == "runpy" and name not in RUNS_PYTHON):
                    found.append(f"{name}:{line}: imports {module}")
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call in BUILT_IN or call in CALLS:
                found.append(f"{name}:{line}: calls {call}")
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                if keyword.arg in SWITCHES and on:
                    found.append(f"{name}:{line}: {keyword.arg} is not false")
    return found


def test_nothing_unpickles_evaluates_or_trusts_remote_code(repository):
    files = [
        f for part in ("jaxlora", "launch", "tools", "configs") for f in (repository / part).rglob("*.py")
    ]
    assert len(files) > 60
    assert not [
        line
        for file in files
        for line in offences(file.read_text(encoding="utf-8"), file.relative_to(repository).as_posix())
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import numpy.lib as n; import marshal",
        "eval('1')",
        "torch.load('x')",
        "np.load('x', allow_pickle=True)",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=flag)",
        "subprocess.run('ls', shell=True)",
        "import runpy",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert offences(source, "x.py")


# --- Keys and tokens ----------------------------------------------------------------------------------------

CANARY = "canary0f0a0secret"
KEYS = {
    "HF_TOKEN": f"hf_{CANARY}0000001",
    "TINKER_API_KEY": f"tml-{CANARY}-0000002",
    "AWS_ACCESS_KEY_ID": f"AKIA{CANARY}03",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/+0000004",
    "AWS_SESSION_TOKEN": f"{CANARY}==0000005",
    "WANDB_API_KEY": f"{CANARY}0000006",
    "SERVICE_PASSWORD": f"{CANARY}0000007",
}


def holding_canary(folder: Path) -> list[str]:
    return [str(f) for f in folder.rglob("*") if f.is_file() and CANARY.encode() in f.read_bytes()]


@pytest.mark.slow
def test_a_run_and_its_evaluation_write_and_print_no_key(repository, tmp_path):
    """A real tiny run with keys in its environment, and on its command line where that is accepted."""
    fields = {
        "results_dir": tmp_path / "results",
        "data.train_rows": 8,
        "data.validation_rows": 2,
        "train.epochs": 1,
        "eval.problems": 2,
        "eval.max_new_tokens": 4,
        "eval.batch_rows": 2,
    }
    script = repository / "launch/train.py"
    words = [sys.executable, str(script), "--config", str(repository / "configs/tiny.py")]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    environment = os.environ | KEYS | {"XLA_FLAGS": xla_flags(devices=1)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results/tiny-all_layer-seed-0/evaluation/predictions.jsonl").is_file()
    assert CANARY not in done.stdout + done.stderr
    assert not holding_canary(tmp_path)

    for key in KEYS.values():
        again = [*words, f"--config.results_dir={tmp_path / key.replace('/', '_')}", f"--config.prefix={key}"]
        if key == next(iter(KEYS.values())):
            done = subprocess.run(again, capture_output=True, text=True, timeout=500, env=environment)
            assert done.returncode == 2
            assert CANARY not in done.stdout + done.stderr
        TRIED["key or token"] += 1
    assert not [path for path in tmp_path.rglob("*") if CANARY in path.name]


def test_the_command_and_the_trace_of_a_failure_are_recorded_without_keys(tmp_path, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    text = " ".join(f"--option={value} https://me:{value}@host/x?key={value}" for value in KEYS.values())
    (tmp_path / "manifest.json").write_text("{}")  # a run that is still there
    run = SimpleNamespace(path=tmp_path, _names=dict, _identity=dict)
    RunDirectory.write_failure(run, "training", 3, ValueError(text), f"Traceback\n{text}")
    assert "training" in (tmp_path / "failure.json").read_text()
    assert not holding_canary(tmp_path)
    assert CANARY not in without_secrets(text)
    TRIED["key or token"] += len(KEYS)


class Trainer:
    """A service that answers with ones, and writes what a local one writes: the path of its base."""

    def forward(self, rows):
        return Pass([np.full(row.n_tokens, -1, np.float32) for row in rows], 1.0)

    forward_backward = forward

    def optim_step(self, adam):
        pass

    def save(self, name):
        return name

    def sample(self, checkpoint, prompts, limit, end):
        return [[end] for _ in prompts]

    def fetch(self, checkpoint, folder):
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(b"weights")
        settings = {"r": 8, "base_model_name_or_path": f"/home/me/{KEYS['HF_TOKEN']}"}
        (folder / SETTINGS).write_text(json.dumps(settings))


def test_a_recording_holds_no_key(tmp_path, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    backend = SimpleNamespace(create=lambda *_: Trainer(), describe=lambda: {"trainer": "test"})
    rows, _ = load_rendered_rows("embedded:data/val.jsonl", load_tokenizer("embedded:base"), max_length=500)
    record(backend, rows, Settings(), tmp_path / "parity.json", "base", 3)
    assert (tmp_path / "parity.json").is_file()
    assert not holding_canary(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "aB3" * 10,
        "tml-" + "x" * 20,
        "ghp_" + "a" * 36,
        "AKIA" + "ABCD" * 4,
        "s3://user:word@bucket/x",
        "https://h/x?sig=abc",
    ],
)
def test_well_known_forms_of_keys_are_found_without_the_environment(text):
    assert holds_secret(f"before {text} after")
    assert without_secrets(f"before {text} after").startswith("before ")


@tries(200)
@given(st.one_of(TEXTS, st.text(max_size=200)))
def test_ordinary_text_is_left_as_it_is(text):
    if "://" not in text and "_" not in text and "-" not in text:
        assert without_secrets(text) == text


# --- Pages --------------------------------------------------------------------------------------------------

HOSTILE = (
    "\"'></script></pre></td><script>alert(1)</script><img src=x onerror=alert(2)><!-- {{ 7 * 7 }} &lt; "
)
NAME = "<img src=x onerror=alert(3)>"  # of a folder, so without slashes
QUIET = "harmless"


class Structure(HTMLParser):
    """The elements of a page with the names of their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text.append(data)


def write_report(root: Path, mark: str, name: str) -> str:
    """The report of a study whose every text is `mark`, and one of whose runs is called after `name`."""
    build_study(root, seeds=(0,))
    run = root / "test-all_layer-seed-0"
    run.rename(root / f"test-{name}-seed-0")
    encoded = json.dumps(mark)[1:-1]
    for file in [*root.rglob("*.json"), *root.rglob("*.jsonl")]:
        text = file.read_text(encoding="utf-8")
        if name in str(file):
            text = text.replace("all_layer", json.dumps(name)[1:-1])
        for value in (
            "openai/gsm8k",
            "Qwen/Qwen3-8B",
            "0123abcd",
            "0.10.2",
            "train.jsonl",
            "what is",
            "Add them up",
        ):
            text = text.replace(value, encoded)
        file.write_text(text, encoding="utf-8")
    broken = root / "test-attention_only-seed-0"
    (broken / "summary.json").unlink()
    (broken / "failure.json").write_text(json.dumps({"error": mark, "stage": mark, "trace": mark}))
    make_report(root)
    return (root / "report/report.html").read_text(encoding="utf-8")


def test_a_report_of_hostile_texts_has_the_elements_of_a_harmless_one(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.study.figures.draw_figures", empty_pictures)
    monkeypatch.setattr("jaxlora.study.comparison.bootstrap_interval", lambda *_: None)
    hostile = write_report(tmp_path / "one", HOSTILE, NAME)
    harmless = write_report(tmp_path / "other", QUIET, QUIET)
    assert Structure(hostile).elements == Structure(harmless).elements
    assert "alert(1)" in hostile  # it is there, as text
    assert str(escape(NAME)) in hostile
    TRIED["page of hostile texts"] += 1


def entry(mark: str) -> dict:
    return {
        "number": 1,
        "reason": mark,
        "split": mark,
        "line": 1,
        "row_id": mark,
        "source": mark,
        "expected_answer": mark,
        "box": mark,
        "flags": [mark],
        "prompt_tokens": 1,
        "answer_tokens": 1,
        "messages": [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}],
        "masked_text": mark,
        "learned_text": mark,
    }


def write_review(mark: str) -> str:
    inputs = {mark: {"path": mark, "sha256": mark}}
    return review_page([entry(mark)], inputs, [f"<|{mark}|>"], 0)


def test_a_review_page_of_hostile_texts_has_the_elements_of_a_harmless_one():
    hostile, harmless = write_review(HOSTILE), write_review(QUIET)
    assert Structure(hostile).elements == Structure(harmless).elements
    assert "alert(1)" in "".join(Structure(hostile).text)
    TRIED["page of hostile texts"] += 1


MATHML = {"span", "code", "math", "none"}


@tries(250)
@given(
    st.one_of(
        TEXTS,
        st.text("\\<>&'\"$(){}[]^_ abcx12\n", max_size=60),
        st.lists(
            st.sampled_from(
                [
                    "$",
                    "\\(",
                    "\\)",
                    "\\text{",
                    "}",
                    "\\href{",
                    "<script>",
                    "javascript:",
                    "onerror=",
                    "\\frac{",
                    "{",
                    "\\boxed{",
                    "\\class{",
                    "'\"",
                    "&lt;",
                    "$$",
                    "x",
                    "\\unicode{60}",
                    "\\style{",
                ]
            ),
            max_size=14,
        ).map("".join),
    )
)
def test_formulas_add_only_mathml_and_carry_no_code(text):
    TRIED["formula"] += 1
    for tag, attributes in Structure(str(text_to_html(text))).elements:
        assert tag in MATHML or tag.startswith("m"), tag
        assert tag not in {"main", "map", "mark", "marquee", "menu", "meta", "meter"}
        assert not {"href", "src", "style", "xlink:href", "action"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]


@tries(200)
@given(st.recursive(TEXTS, lambda inner: st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5))
def test_json_in_a_page_never_ends_its_element(value):
    TRIED["page of hostile texts"] += 1
    text = str(script_json(value))
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


def test_markup_in_names_does_not_disturb_the_terminal(repository, tmp_path, capsys):
    """Rich reads `[/red]` as markup: paths, ids and reasons must be printed as they are."""
    from helpers.bad_input import run_script

    folder = tmp_path / "[/red]"
    folder.mkdir(parents=True)
    rows = folder / "[bold].jsonl"
    row = json.loads((repository / "jaxlora/embedded/data/val.jsonl").read_text().splitlines()[0])
    rows.write_text(json.dumps(row | {"row_id": "[/green]"}) + "\n[]\n")
    shutil.copytree(repository / "jaxlora/embedded/base", folder / "base")
    words = ["--config", str(repository / "configs/tiny.py"), f"--config.data.train_path={rows}"]
    words += [f"--config.model.path={folder / 'base'}", "--config.data.on_bad_row=skip", "--rows", "2"]
    assert run_script("terminal markup", repository / "tools/preview.py", words) == 0
    assert "[/green]" in capsys.readouterr().out
    words = [
        *words[:-2],
        f"--config.data.validation_path={rows}",
        f"--config.results_dir={folder}",
        "--dry-run",
    ]
    words += ["--config.data.allow_ungated=true", "--config.train.batch_rows=1"]
    assert run_script("terminal markup", repository / "launch/train.py", words) == 0
    assert "[/red]" in capsys.readouterr().err.replace("\n", "")
