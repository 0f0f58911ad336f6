"""What the tests of formats share: the tool that hands a run on, as a user starts it."""

from __future__ import annotations

import runpy
import sys

import pytest


@pytest.fixture
def export(repository, monkeypatch, capsys):
    """Run `tools/export.py` with these words; returns exit code, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(repository / "tools" / "export.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run
