r"""Text with LaTeX in it as safe HTML: formulas as MathML, which browsers draw without any download.

    text_to_html(r"so $x < \frac{1}{2}$")     # Markup('so <math ...>...</math>')

`latex2mathml` converts; its tree is written out again here, with a list of allowed elements and attributes
and everything else escaped, because it lets markup through (`\text{<script>}`, `\href`). A formula that it
does not know is shown as it is, in a monospace font. A lone dollar sign is money, not a formula.
"""

from __future__ import annotations

import html
import re
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markupsafe import Markup, escape

# $$..$$, \[..\], \(..\), an environment, $..$ by the rule of pandoc (no space inside, no digit after),
# and a box outside any of these.
_FORMULA = re.compile(
    r"\$\$(?P<dollars>[^$]+)\$\$"
    r"|\\\[(?P<bracket>.+?)\\\]"
    r"|\\\((?P<paren>.+?)\\\)"
    r"|(?P<environment>\\begin\{(?P<name>align\*?|equation\*?|gather\*?|cases|[bpv]?matrix)\}.+?\\end\{(?P=name)\})"
    r"|(?<![\\$])\$(?P<dollar>[^\s$](?:[^$\n]{0,600}?[^\s$\\])?)\$(?!\d)"
    r"|(?P<box>\\boxed\{(?:[^{}\n]|\{(?:[^{}\n]|\{[^{}\n]*\})*\})*\})",
    re.DOTALL,
)
_DISPLAY = ("dollars", "bracket", "environment")
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
    """The text, escaped, with its formulas as MathML or, where that fails, as monospace source."""
    parts: list[Markup] = []
    end = 0
    for match in _FORMULA.finditer(text):
        kind = str(match.lastgroup)
        parts.append(escape(text[end : match.start()]))
        parts.append(formula_to_html(match[kind], match.group(), display=kind in _DISPLAY))
        end = match.end()
    parts.append(escape(text[end:]))
    return Markup("").join(parts)


def formula_to_html(latex: str, source: str, display: bool) -> Markup:
    """One formula; `source` is what stood in the text, and what is shown where conversion fails."""
    fallback = Markup("<code class=tex>{}</code>").format(source)
    if _depth_errs(latex):
        return fallback
    try:
        tree = convert_to_element(latex, display="block" if display else "inline")
        return Markup('<span class=formula title="{}">{}</span>').format(source, _to_html(tree))
    except Exception:  # the converter has no common error class; whatever stops it, the source is readable
        return fallback


def _depth_errs(latex: str) -> bool:
    r"""Whether braces are unbalanced, which the converter would take for empty arguments."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return True
    return depth != 0


def _to_html(element: Element) -> Markup:
    """The tree as markup in which only the listed elements and attributes can occur.

    Raises:
      ValueError: another element, or a command that the converter left as it is.
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
