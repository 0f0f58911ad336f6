"""What the tests of runs share: one undisturbed run, which all that are stopped or damaged must equal."""

from __future__ import annotations

import pytest
from helpers import kills


@pytest.fixture(scope="session")
def lab(tmp_path_factory, compiled) -> kills.Lab:
    return kills.Lab(tmp_path_factory.mktemp("lab"), compiled)
