"""Equations become MathML when the site is built: no script, no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MATH = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>',
    re.DOTALL,
)


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs' hook: what pymdownx.arithmatex marked, rendered."""

    def rendered(match: re.Match) -> str:
        tex = html.unescape(match.group(3)).strip()
        return convert(tex, display="inline" if match.group(2) == "(" else "block")

    return _MATH.sub(rendered, content)
