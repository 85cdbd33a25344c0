"""Equations become MathML, so that no page needs a script for them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the equations of a page.

    Raises:
        ValueError: An equation has a command that is not understood.
    """

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match["latex"]).replace(r"\arg\min", r"\argmin")
        result = convert(latex, display="block" if match["tag"] == "div" else "inline")
        if re.search(r"\\[a-zA-Z]", result):
            raise ValueError(f"latex2mathml does not know a command in the equation {latex!r}")
        return result

    return EQUATION.sub(mathml, content)
