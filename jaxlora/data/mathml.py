r"""Convert text with LaTeX to safe HTML; formulas become MathML, which browsers render without downloads.

    text_to_html(r"so $x < \frac{1}{2}$")     # Markup('so <math ...>...</math>')

`latex2mathml` does the conversion, but it lets markup through (`\text{<script>}`, `\href`). So its tree is
written out again here with only the listed elements and attributes, and everything else is escaped. A formula
that cannot be converted is shown as source in a monospace font. A lone dollar sign is money, not a formula.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markupsafe import Markup, escape

# Where a formula may begin: $$..$$, \[..\], \(..\), an environment, $..$, or a box outside all of these.
_OPENING = re.compile(
    r"\$\$|\\\[|\\\(|(?<![\\$])\$"
    r"|\\begin\{(?P<name>align\*?|equation\*?|gather\*?|cases|[bpv]?matrix)\}|(?=\\boxed\{)"
)
_CLOSING = {"\\[": "\\]", "\\(": "\\)"}
_DOLLARS = re.compile(r"\$\$(?P<inner>[^$]+)\$\$")
# Pandoc's rule: no space just inside, no digit after. Otherwise the dollar sign is money.
_DOLLAR = re.compile(r"\$(?P<inner>[^\s$](?:[^$\n]{0,600}?[^\s$\\])?)\$(?!\d)")
_BOX = re.compile(r"(?P<inner>\\boxed\{(?:[^{}\n]|\{(?:[^{}\n]|\{[^{}\n]*\})*\})*\})")
_SELF_CONTAINED = {
    "$$": _DOLLARS,
    "$": _DOLLAR,
    "": _BOX,
}  # none can search past the next `$` or the end of the line
LONGEST_FORMULA = 4000  # characters; the converter is worse than linear in time
# fmt: off
_ELEMENTS = {
    "math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup",
    "msubsup", "munder", "mover", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom",
    "menclose", "mmultiscripts", "mprescripts", "none",
}
_ATTRIBUTES = {
    "display", "displaystyle", "scriptlevel", "mathvariant", "stretchy", "fence", "form", "separator",
    "lspace", "rspace", "width", "height", "depth", "linethickness", "notation", "columnalign", "rowspacing",
    "columnspacing", "accent", "accentunder", "minsize", "maxsize", "movablelimits", "largeop", "symmetric",
    "columnlines", "rowlines",
}
# fmt: on


def text_to_html(text: str) -> Markup:
    """Escape the text and convert its formulas to MathML or, if that fails, to monospace source."""
    parts: list[Markup] = []
    end = 0
    for formula in _formulas(text):
        parts.append(escape(text[end : formula.start]))
        parts.append(formula_to_html(formula.inner, text[formula.start : formula.end], formula.display))
        end = formula.end
    parts.append(escape(text[end:]))
    return Markup("").join(parts)


@dataclass(frozen=True)
class _Formula:
    start: int
    end: int
    inner: str  # without delimiters, unless the converter needs them
    display: bool


def _formulas(text: str) -> Iterator[_Formula]:
    """The formulas from left to right, in time linear in the text.

    A single pattern for a whole formula would search to the end of the text from every unclosed opening.
    Here, a closing delimiter that was not found once is not searched for again.
    """
    position = 0
    absent: set[str] = set()  # closing delimiters that do not occur from here on
    while opening := _OPENING.search(text, position):
        start, mark = opening.start(), opening.group()
        position = start + 1
        if short := _SELF_CONTAINED.get(mark):
            if match := short.match(text, start):
                position = match.end()
                yield _Formula(start, position, match["inner"], display=mark == "$$")
            continue
        closing = f"\\end{{{opening['name']}}}" if opening["name"] else _CLOSING[mark]
        found = -1 if closing in absent else text.find(closing, opening.end() + 1)  # never empty
        if found < 0:
            absent.add(closing)
            continue
        position = found + len(closing)
        inner = text[start:position] if opening["name"] else text[opening.end() : found]
        yield _Formula(start, position, inner, display=mark != "\\(")


def formula_to_html(latex: str, source: str, display: bool) -> Markup:
    """Convert one formula; `source` is its original text, which is shown if conversion fails."""
    fallback = Markup("<code class=tex>{}</code>").format(source)
    if len(latex) > LONGEST_FORMULA or _is_unbalanced(latex):
        return fallback
    try:
        tree = convert_to_element(latex, display="block" if display else "inline")
        return Markup('<span class=formula title="{}">{}</span>').format(source, _to_html(tree))
    except Exception:  # the converter has no common error class; the source is always readable
        return fallback


def _is_unbalanced(latex: str) -> bool:
    """Whether braces are unbalanced; the converter would treat a missing one as an empty argument."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return True
    return depth != 0


def _to_html(element: Element) -> Markup:
    """Serialise the tree so that only the listed elements and attributes can occur.

    Raises:
      ValueError: an unlisted element, or a command that the converter left unconverted.
    """
    if element.tag not in _ELEMENTS:
        raise ValueError(f"element {element.tag}")
    text = html.unescape(element.text or "")  # the converter writes operators as character references
    if text.startswith("\\") and len(text) > 1:
        raise ValueError(f"command {text}")
    attributes = Markup("").join(
        Markup(' {}="{}"').format(name, value)
        for name, value in element.attrib.items()
        if name in _ATTRIBUTES
    )
    children = Markup("").join(_to_html(child) for child in element)
    tail = html.unescape(element.tail or "")
    return Markup("<{tag}{attributes}>{text}{children}</{tag}>{tail}").format(
        tag=element.tag, attributes=attributes, text=text, children=children, tail=tail
    )
