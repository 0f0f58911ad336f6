"""The lock files fit pyproject.toml, hold a hash for everything, and name no place to fetch from."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LOCKS = ("requirements.lock", "launch/tpu.lock", "launch/cuda.lock", "launch/rl.lock")


@pytest.fixture(scope="module")
def tool(repository) -> dict:
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
