"""Bad input for the tests: how it is made, how it is given to a reader, and what must never happen then.

    refusal = attempt("config.json", load_model_config, folder)      # None: the input was taken

A reader takes an input or raises `UserError` with one short line. Any other exception fails the test, and so
does a reader that takes too long, starts a process, opens a connection, unpickles, or touches a file
outside the folders that it was given. `python tests/helpers/count_bad_input.py` prints how many were tried.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jaxlora.runtime.errors import UserError, one_line

SECONDS = 30  # for one input; a reader that is not done by then hangs
TRIED: Counter[str] = Counter()  # inputs by kind, in this process
_FACTOR = 10 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1


def tries(examples: int) -> settings:
    """So many examples of a property, ten times as many with HYPOTHESIS_PROFILE=thorough."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=examples * _FACTOR,
        derandomize=_FACTOR == 1,  # the default run tries the same inputs each time
        deadline=None,
        suppress_health_check=checks,
    )


# --- Giving it to a reader ----------------------------------------------------------------------------------


def attempt(kind: str, reader: Callable[..., Any], *values: Any, **named: Any) -> str | None:
    """Give one input to a reader; returns the line that refuses it, or None where it was taken."""
    TRIED[kind] += 1
    with _time_limit(), watched():
        try:
            reader(*values, **named)
        except UserError as error:
            line = one_line(error)
            assert line.strip(), "an error without words"
            assert line.isprintable(), line
            return line
    return None


def refused(kind: str, reader: Callable[..., Any], *values: Any, **named: Any) -> str:
    """As `attempt`, of an input that must be refused."""
    line = attempt(kind, reader, *values, **named)
    assert line is not None, f"taken: {kind} {values!r:.500}"
    return line


def run_script(kind: str, script: Path, words: Sequence[str]) -> int:
    """Run an entry point in this process, from `if __name__ == "__main__"` on; returns its exit code."""
    TRIED[kind] += 1
    before = sys.argv
    sys.argv = [str(script), *words]
    try:
        with _time_limit(), watched(), pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    return int(stopped.value.code or 0)


def assert_exit_2(kind: str, script: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The entry point refuses with exit code 2 and one line, without a traceback; returns the line."""
    capsys.readouterr()
    assert run_script(kind, script, words) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    last = shown.strip().splitlines()[-1]
    assert last.startswith("error: "), shown
    return last


@contextmanager
def _time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"the reader was not done after {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# --- What must never happen ---------------------------------------------------------------------------------

_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate")
_ALLOWED = (tempfile.gettempdir() + os.sep, "/dev/", "/proc/")  # to write to
_forbidden: list[str] | None = None
FORBIDDEN_NAME = "out-of-bounds"  # no reader may open a file below a folder of this name


@contextmanager
def watched() -> Iterator[None]:
    """Fail if, meanwhile, this process does what bad input must not make it do."""
    global _forbidden
    outer, _forbidden = _forbidden, []
    try:
        yield
        found = _forbidden
    finally:
        _forbidden = outer
    assert not found, found


def _audit(event: str, values: tuple[Any, ...]) -> None:
    if _forbidden is None:
        return
    if event == "subprocess.Popen" and values[0] == "git":
        return  # the manifest of a run asks for the commit
    if event in _NEVER:
        _forbidden.append(f"{event} {values!r:.200}")
    elif event == "open":
        path, _, flags = values
        changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        _note(event, path, changes)
    elif event in _CHANGES and values[-1] in (-1, None):  # not relative to an opened folder, as in rmtree
        _note(event, values[0], True)


def _note(event: str, path: Any, changes: bool) -> None:
    if _forbidden is None or not isinstance(path, str | bytes | os.PathLike):
        return
    name = os.path.abspath(os.fsdecode(path))
    if FORBIDDEN_NAME in name.split(os.sep):
        _forbidden.append(f"{event} {name}")
    elif (
        changes
        and not name.startswith(_ALLOWED)
        and not {"__pycache__", ".hypothesis"} & set(name.split(os.sep))
    ):
        _forbidden.append(f"{event} {name} for writing")


sys.addaudithook(_audit)


# --- Making it ----------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "\x00",
            "a\x00b",
            "\ud800",
            "\x1b]0;title\x07\x1b[2J",
            "line\nline",
            "[/red]",
            "[bold]",
            "../../etc/passwd",
            "/etc/passwd",
            "</script><img src=x onerror=alert(1)>",
            "{{ 7 * 7 }}",
            "٣",
            "a" * 10_000,
            "NaN",
            "1e999",
        ]
    ),
    st.text(max_size=20),
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, -(10**30), 10**4000]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3))
)


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """The JSON value with one to `most` places replaced, removed or added to."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(value))
        if not places:
            return draw(VALUES)
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            holder[key] = draw(VALUES)
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(VALUES)
        else:
            holder.insert(key, draw(VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every `(container, key)` of the value, at most 20 of each container."""
    keys = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    for key in keys[:20]:
        yield value, key
        yield from _places(value[key])


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut short, with bytes flipped, inserted or removed, or other bytes altogether."""
    way = draw(st.sampled_from(["cut", "flip", "insert", "remove", "other", "deep", "encoded"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if way == "cut":
        return content[:at]
    if way == "flip":
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if way == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    if way == "remove":
        return content[:at] + content[at + draw(st.integers(1, 50)) :]
    if way == "deep":
        return draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([100, 990, 100_000]))
    if way == "encoded":
        text = content.decode("utf-8", "replace")
        return text.encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])))
    return draw(st.binary(max_size=200))


def bad_json(value: Any) -> st.SearchStrategy[bytes]:
    """Bytes of a JSON file that is almost `value`."""
    content = json.dumps(value).encode()
    return st.one_of(changed(value).map(lambda other: json.dumps(other).encode()), damaged(content))
