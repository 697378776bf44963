"""The tables of README.md and docs/, generated from docs/results/*.json.

    python -m benchmarks.tables            # rewrite every table in place
    python -m benchmarks.tables --check    # exit 1 and name the files that are out of step

A table stands between ``<!-- table: topic [topic ...] -->`` and ``<!-- end of table -->``. All
figures of the topics are in it, those that do not hold included.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, TOPICS

ROOT = RESULTS.parent.parent
_BLOCK = re.compile(r"(<!-- table: ([a-z ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """The Markdown files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def number(value: Any) -> str:
    """A figure as people read it: three digits that say something, thousands with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " to ".join(number(v) for v in value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def rows(topic: str) -> Iterator[str]:
    """One Markdown row a figure of the topic."""
    path = RESULTS / f"{topic}.json"
    if not path.exists():
        return
    for figure in json.loads(path.read_text())["figures"]:
        if figure["op"] == "report":
            asked, verdict = "", ""
        else:
            op = "" if figure["op"] == "between" else f"{figure['op']} "
            asked, verdict = op + number(figure["bound"]), "yes" if figure["holds"] else "**no**"
        name = figure["name"].replace("|", "\\|")
        yield f"| {name} | {number(figure['value'])} | {asked} | {verdict} |"


def table(topics: list[str]) -> str:
    """The table of the topics' figures, or a line that says there are none yet."""
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown:
        raise ValueError(f"topic {unknown[0]!r}: expected some of {', '.join(TOPICS)}")
    body = [row for topic in topics for row in rows(topic)]
    if not body:
        return f"No figure of {', '.join(topics)} has been measured yet.\n"
    sources = ", ".join(f"`docs/results/{topic}.json`" for topic in topics)
    head = ["", "| figure | measured | asked for | holds |", "|---|---|---|---|"]
    return "\n".join([*head, *body, "", f"Commands, devices and notes: {sources}.", ""])


def updated(text: str) -> str:
    """The page with every table made anew."""
    return _BLOCK.sub(lambda m: m.group(1) + table(m.group(2).split()) + m.group(3), text)


def main(arguments: list[str]) -> int:
    stale = []
    for page in pages():
        text = page.read_text()
        if (new := updated(text)) != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in arguments:
                page.write_text(new)
    if stale:
        verb = "out of step" if "--check" in arguments else "rewritten"
        print(f"{verb}: {', '.join(map(str, stale))}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
