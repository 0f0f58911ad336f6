"""The lock files fit pyproject.toml, hold a hash for everything, and name no place to fetch from."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LOCKS = ("requirements.lock", "launch/tpu.lock", "launch/cuda.lock")


@pytest.fixture(scope="module")
def tool(repository) -> dict:
    return runpy.run_path(str(repository / "tools/lock.py"))


@pytest.fixture
def fresh_tool(repository) -> dict:
    return runpy.run_path(str(repository / "tools/lock.py"))


def test_they_fit_the_project(repository):
    done = subprocess.run(
        [sys.executable, str(repository / "tools/lock.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_one_version_and_hashes_and_no_address(repository, tool, name):
    text = (repository / name).read_text()
    pins = tool["pins"](text)
    assert len(pins) > 80
    assert all(hashes for _, hashes, _ in pins)
    assert not re.search(r"://|@ |--index|--find-links|--extra-index", text)


@pytest.mark.parametrize("name", LOCKS)
def test_what_the_installed_packages_need_is_locked(repository, tool, name):
    """The closure: the requirements of each locked package that is installed here in the same version."""
    pins = tool["pins"]((repository / name).read_text())
    locked = {
        tool["canonical"](pin.name): str(pin.specifier).removeprefix("==")
        for pin, _, _ in pins
        if pin.marker is None or pin.marker.evaluate()
    }
    seen = 0
    for package, version in locked.items():
        try:
            found = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        if found.version.partition("+")[0] != version:
            continue
        seen += 1
        for need in map(Requirement, found.requires or ()):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert tool["canonical"](need.name) in locked, f"{package} needs {need}"
                assert need.specifier.contains(locked[tool["canonical"](need.name)], prereleases=True)
    assert seen > 10


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: re.sub(r"jinja2==[^\n]*\n( .*\n)*", "", text), "jinja2"),
        (lambda text: re.sub(r"jinja2==\S+", "jinja2==2.0", text), "jinja2"),
        (lambda text: re.sub(r"(jinja2==\S+) \\\n( +--hash\S+( \\)?\n)+", r"\1\n", text), "no hash"),
        (lambda text: re.sub(r"jinja2==", "jinja2>=", text), "jinja2"),
        (
            lambda text: (
                text
                + "left-over==1.0 \\\n    --hash=sha256:"
                + "0" * 64
                + "\n    # via jaxlora (pyproject.toml)\n"
            ),
            "left-over",
        ),
        (lambda text: "", "nothing"),
    ],
)
def test_a_lock_file_that_does_not_fit_is_noticed(repository, tool, tmp_path, change, fault):
    file = tmp_path / "requirements.lock"
    whole = (repository / "requirements.lock").read_text()
    file.write_text(change(whole))
    assert file.read_text() != whole
    assert any(fault in line for line in tool["check"](Path(file), "test"))


def advisory(name: str, **affected) -> dict:
    package = {"ecosystem": "PyPI", "name": name}
    return {"id": "PYSEC-1", "summary": "a fault", "affected": [{"package": package, **affected}]}


def span(*events: dict[str, str]) -> dict:
    return {"ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}


# The lock file of these tests holds Some_Package 2.10.
APPLIES = {
    "in a range without an end": span({"introduced": "0"}),
    "before the mending one": span({"fixed": "2.11"}, {"introduced": "2.9"}),
    "the last one affected": span({"introduced": "1"}, {"last_affected": "2.10"}),
    "affected again": span({"introduced": "0"}, {"fixed": "1.5"}, {"introduced": "2.2"}),
    "listed": {"versions": ["2.1", "2.10"]},
}
DOES_NOT = {
    "mended": span({"introduced": "0"}, {"fixed": "2.10"}),
    "later than the last one affected": span({"introduced": "0"}, {"last_affected": "2.9"}),
    "not yet affected": span({"introduced": "3"}),
    "not listed": {"versions": ["2.1"]},
    "in numbers of another kind": {"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]},
}


def run_audit(tool, tmp_path, advisories: list[dict]) -> int:
    for name in LOCKS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some-package==2.10 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for i, one in enumerate(advisories):
            archive.writestr(f"PYSEC-{i}.json", json.dumps(one))
    tool["audit"].__globals__["ROOT"] = tmp_path
    return tool["audit"](tmp_path / "all.zip")


@pytest.mark.parametrize("affected", APPLIES.values(), ids=APPLIES)
def test_an_advisory_that_applies_is_named(fresh_tool, tmp_path, capsys, affected):
    assert run_audit(fresh_tool, tmp_path, [advisory("Some_Package", **affected)]) == 1
    assert "some-package 2.10: PYSEC-1 a fault" in capsys.readouterr().out


@pytest.mark.parametrize("affected", DOES_NOT.values(), ids=DOES_NOT)
def test_an_advisory_of_other_versions_is_not(fresh_tool, tmp_path, capsys, affected):
    withdrawn = advisory("some-package", **span({"introduced": "0"})) | {"withdrawn": "2026-01-01T00:00:00Z"}
    other = advisory("other-package", **span({"introduced": "0"}))
    assert run_audit(fresh_tool, tmp_path, [advisory("some-package", **affected), withdrawn, other]) == 0
    assert "1 versions of 1 packages, 3 advisories: 0 apply" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a zip"])
def test_what_is_no_archive_of_advisories_is_said(tool, tmp_path, repository, content):
    (tmp_path / "all.zip").write_bytes(content)
    words = [sys.executable, str(repository / "tools/lock.py"), "--audit", str(tmp_path / "all.zip")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "archive of advisories" in done.stderr
    assert "Traceback" not in done.stderr
