"""The review page: rows of a dataset on one self-contained HTML page for a person to read.

    page = review_page(pack, inputs, special_tokens=["<|im_end|>"], seed=0)

The page needs no network and no library. It includes its own style and script, and its content security
policy allows only these two, by hash. Everything from the data is escaped by jinja2 or `jaxlora.data.mathml`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from jaxlora.data.mathml import text_to_html
from jaxlora.runtime.pages import content_policy


def review_page(
    pack: Sequence[dict[str, Any]], inputs: dict[str, Any], special_tokens: Sequence[str], seed: int
) -> str:
    """The HTML page for the rows of `jaxlora.data.audit.review_pack`."""
    environment = Environment(
        loader=PackageLoader("jaxlora.data", "templates"), autoescape=True, undefined=StrictUndefined
    )
    style = environment.loader.get_source(environment, "review.css")[0]  # type: ignore[union-attr]
    script = environment.loader.get_source(environment, "review.js")[0]  # type: ignore[union-attr]
    environment.filters["readable"] = text_to_html
    environment.filters["control"] = control_token_marker(special_tokens)
    return environment.get_template("review.html.j2").render(
        pack=pack,
        inputs=inputs,
        seed=seed,
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
    )


def control_token_marker(special_tokens: Sequence[str]) -> Callable[[str], Markup]:
    """A function that escapes a text and wraps its control tokens and line ends in markup of their own.

    Built once per page, because a tokenizer may have a hundred thousand special tokens.
    """
    splitter = re.compile("(" + "|".join(map(re.escape, [*special_tokens, "\n"])) + ")")
    marks = {token: Markup("<b class=control>{}</b>").format(token) for token in special_tokens}
    marks["\n"] = Markup("<i class=newline>↵</i>\n")
    return lambda text: Markup("").join(marks.get(piece) or escape(piece) for piece in splitter.split(text))
