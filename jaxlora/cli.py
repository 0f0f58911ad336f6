"""The command line of a configuration: `--config FILE` and `--config.FIELD=VALUE`.

    jaxlora train --config tiny --config.lora.rank=16 --config.seed=1        # or --config path/to/own.py

The fields themselves are declared in `jaxlora.config`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import itertools
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxlora.config import RENAMED, RunConfig, allowed, closest, fields, from_dict, one_line, plain, to_dict
from jaxlora.runtime.errors import UserError

CONFIG_HELP = "Python file that defines get_config(), or the name of a shipped one, such as tiny"
SHIPPED = Path(__file__).parent / "configs"  # shipped with the package, found by name


def shipped_names() -> list[str]:
    """Names that `--config` accepts in place of a file."""
    files = (file.relative_to(SHIPPED).with_suffix("") for file in SHIPPED.rglob("*.py"))
    return sorted(file.as_posix() for file in files if not file.stem.startswith("_"))


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> RunConfig:
    """Run `get_config()` of a Python file and apply overrides such as `{"lora.rank": "16"}`.

    Args:
      path: a file, or the name of a configuration that ships with the package, such as `tiny`.

    Raises:
      UserError: the file is missing, has no `get_config`, or a value is not allowed.
    """
    file = Path(path)
    if not file.is_file() and str(path) in shipped_names():
        file = SHIPPED / f"{path}.py"
    if not file.is_file():
        names = ", ".join(shipped_names())
        raise UserError(f"--config: no file {str(path)!r}; give a Python file, or one of {names}")
    try:
        namespace = runpy.run_path(str(file))
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: cannot be run as Python: {type(error).__name__}: {error}") from None
    if not callable(namespace.get("get_config")):
        raise UserError(f"{path}: defines no get_config(); it must return a jaxlora.config.RunConfig")
    try:
        config = namespace["get_config"]()
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: get_config() failed: {type(error).__name__}: {error}") from None
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, not a RunConfig")
    return from_dict(with_overrides(to_dict(config), overrides or {}))


def with_overrides(values: dict[str, Any], overrides: dict[str, str]) -> dict[str, Any]:
    """Set fields of a configuration, given as nested values, by dotted name from text.

    Raises:
      UserError: there is no such field.
    """
    for name, text in overrides.items():
        _set(values, name, text)
    return values


def parse_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None):
    """Parse an entry point's own options together with `--config FILE` and `--config.FIELD=VALUE`.

    Returns `(config, options)`: a `RunConfig`, and argparse's namespace of the parser's own options.
    """
    parser.formatter_class = HelpFormatter
    parser.epilog = _epilog(sys.argv[1:] if argv is None else argv)
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)
    options, rest = parser.parse_known_args(argv)
    overrides: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--config."):
            known = [option for action in parser._actions for option in action.option_strings]
            close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
            advice = f"did you mean {close[0]}?" if close else "see --help"
            raise UserError(f"unknown option {word!r}; {advice}")
        name, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
        overrides[name] = value
    return load_config(options.config, overrides), options


def _epilog(argv: Sequence[str]) -> str:
    """The fields for `--help`, with the values of the configuration on the command line if it can be read."""
    heading, values = "configuration fields, each set with --config.FIELD=VALUE", None
    if "--help" in argv or "-h" in argv:
        words = [*argv, ""]
        for word, following in itertools.pairwise(words):
            given = following if word == "--config" else word.removeprefix("--config=")
            if word.startswith("--config=") or word == "--config":
                with contextlib.suppress(UserError):
                    values = to_dict(load_config(given))
                    heading += f", with the values of {given}"
    return f"{heading}:\n" + field_table(values)


class HelpFormatter(argparse.HelpFormatter):
    """Wraps at the terminal's width: paragraphs as a whole, each indented line (command, table) by itself."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(_folded(text, max(width, 20)))


def _folded(text: str, width: int) -> Iterator[str]:
    paragraph: list[str] = []
    for line in [*text.strip("\n").splitlines(), ""]:
        if line.strip() and not line[0].isspace():
            paragraph.append(line)
            continue
        yield from textwrap.wrap(" ".join(paragraph), width, break_on_hyphens=False)
        paragraph = []
        second = re.match(r"\s*\S+\s{2,}", line)  # up to the second column of a table
        column = second.end() if second else len(line) - len(line.lstrip()) + 4
        hanging = " " * (column if column <= width // 2 else 6)
        yield from textwrap.wrap(
            line, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
        ) or [""]


def field_table(values: dict[str, Any] | None = None) -> str:
    """One line per field for `--help`: name, allowed values, default and meaning.

    Args:
      values: of a configuration, as returned by `to_dict`, shown in place of the defaults.
    """
    lines = []
    for name, kind, default, text in fields():
        if values is not None:
            default = functools.reduce(lambda inner, part: inner[part], name.split("."), values)
            default = tuple(default) if isinstance(default, list) else default
        lines.append(f"  {name:<30} {text} [{allowed(kind)}; default {plain(default)}]")
    return "\n".join(lines)


def _set(values: dict[str, Any], name: str, text: str) -> None:
    *groups, leaf = RENAMED.get(name, name).split(".")
    place = values
    for group in groups:
        inner = place.get(group)
        if not isinstance(inner, dict):
            raise UserError(f"config.{name}: unknown field; {closest(name)}")
        place = inner
    if leaf not in place or isinstance(place[leaf], dict):
        raise UserError(f"config.{name}: unknown field; {closest(name)}")
    none = text.lower() == "none"
    if isinstance(place[leaf], list):
        place[leaf] = [] if none else text.split(",")
    else:
        place[leaf] = None if none else text
