"""The tests are laid out as tests/README.md says: a folder a promise, and helpers in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NO_TESTS = {"fixtures", "helpers", "__pycache__"}
TESTS = Path(__file__).resolve().parents[1]
MODULES = sorted(TESTS.rglob("test_*.py"))


def imported(source: str) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it, also in the programs that it holds as text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^\s*(?:from|import)\s+([\w.]+)", node.value, re.MULTILINE)


def is_of_a_test(name: str) -> bool:
    return any(part.startswith("test_") or part == "conftest" for part in name.split("."))


def test_no_test_module_is_imported():
    found = {
        str(file.relative_to(TESTS)): names
        for file in [*MODULES, *TESTS.glob("helpers/*.py")]
        if (names := [name for name in imported(file.read_text()) if is_of_a_test(name)])
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import {name}",
        "from {name} import our_model",
        "from numerics.{name} import our_model",
        "from numerics import {name}",
        "def late():\n    from . import {name}",
        "CODE = '''\nimport sys\nfrom {name} import our_model\n'''",
    ],
)
def test_an_import_of_a_test_module_is_seen(source):
    assert any(map(is_of_a_test, imported(source.format(name="test_model"))))
    assert not any(map(is_of_a_test, imported(source.format(name="rows"))))


def test_every_folder_is_on_the_page_and_holds_tests():
    folders = {entry.name for entry in TESTS.iterdir() if entry.is_dir()} - NO_TESTS
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| ", (TESTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(folders) == sorted(rows)
    assert folders == {file.parent.name for file in MODULES}


def test_every_path_on_the_page_is_there():
    page = (TESTS / "README.md").read_text()
    for path in re.findall(r"[\w/]+\.py\b", page):
        assert any((root / path).is_file() for root in (TESTS, TESTS.parent)), path
    for path in re.findall(r"pytest (?:-[mn] \w+ )*(tests/\S+?)[`, ]", page):
        assert (TESTS.parent / path).exists(), path
    for name in re.findall(r"`helpers\.([\w.]+)`", page):
        module, _, function = name.partition(".")
        assert f"def {function}" in (TESTS / "helpers" / f"{module}.py").read_text(), name
    assert "test_packed_rows_do_not_see_each_other" in "".join(file.read_text() for file in MODULES)


def test_module_names_are_unique():
    """Pytest imports them by name alone."""
    names = [file.name for file in MODULES]
    assert len(set(names)) == len(names)


def test_each_layer_of_the_package_uses_only_what_stands_below_it(repository):
    """The contracts are in pyproject.toml; import-linter also sees imports inside functions."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


def test_no_function_of_the_package_or_the_tools_is_longer_than_sixty_lines():
    root, long = TESTS.parent, []
    for file in (
        path for folder in ("jaxlora", "tools", "launch") for path in root.glob(f"{folder}/**/*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    long.append(f"{file.relative_to(root)}: {node.name}, {lines}")
    assert long == []
