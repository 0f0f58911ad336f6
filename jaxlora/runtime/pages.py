"""Self-contained HTML pages: common parts of every page of the package.

    page_style()                        # the style sheet of reports
    content_policy(style, script)       # allows only these two and inline pictures
    script_json(value)                  # data for a script element that cannot end the element

A page loads nothing. Text from a model or a data set is escaped by Jinja, or set as `textContent`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup


def page_style() -> str:
    """The style sheet of reports."""
    return (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")


def content_policy(style: str, script: str) -> str:
    """The content security policy of a page with one inline style and one script, given by their hashes."""
    return (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )


def script_json(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
