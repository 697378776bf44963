"""The tables of README.md and docs/, generated from docs/results/*.json.

    python -m benchmarks.tables            # rewrite every table in place
    python -m benchmarks.tables --check    # exit 1 and name the files that are out of step

A table stands between one of these lines and ``<!-- end of table -->``:

    <!-- table: topic [topic ...] -->    all figures of the topics, those that do not hold included
    <!-- some: topic/name; topic/name -->   figures whose names begin so, where they have a bound
    <!-- picture: file; words -->        a picture of docs/, once it has been made
    <!-- claims -->                      the claims of the papers with their verdicts
    <!-- claim: letter -->               the figures of one of them
    <!-- estimates -->                   hours and bytes of the large recipes, by the closed form
    <!-- ablation -->                    one change at a time of the MMD finetuning
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import claims, estimates
from benchmarks.figures import RESULTS, TOPICS

ROOT = RESULTS.parent.parent
_BLOCK = re.compile(
    r"(<!-- (table|some|picture|claims|claim|estimates|ablation)(?:: ([^>]+))? -->\n)"
    r".*?(<!-- end of table -->)",
    re.DOTALL,
)
_HEAD = ["| figure | measured | bound | holds |", "|---|---|---|---|"]


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


def row(figure: dict[str, Any]) -> str:
    """One Markdown row a figure."""
    if figure["op"] == "report":
        asked, verdict = "", ""
    else:
        op = "" if figure["op"] == "between" else f"{figure['op']} "
        asked, verdict = op + number(figure["bound"]), "yes" if figure["holds"] else "**no**"
    name = figure["name"].replace("|", "\\|")
    return f"| {name} | {number(figure['value'])} | {asked} | {verdict} |"


def rows(topic: str) -> Iterator[str]:
    """The rows of all figures of the topic."""
    path = RESULTS / f"{topic}.json"
    if path.exists():
        yield from map(row, json.loads(path.read_text())["figures"])


def check_topics(topics: list[str]) -> None:
    """Raises a `ValueError` where one is not a topic of `benchmarks.figures`."""
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown:
        raise ValueError(f"topic {unknown[0]!r}: expected some of {', '.join(TOPICS)}")


def table(topics: list[str]) -> str:
    """The table of the topics' figures, or a line that says there are none yet."""
    check_topics(topics)
    body = [row for topic in topics for row in rows(topic)]
    if not body:
        return f"No figure of {', '.join(topics)} has been measured yet.\n"
    return "\n".join(
        ["", *_HEAD, *body, "", f"Commands, devices and notes: {_sources(topics)}.", ""]
    )


def _sources(topics: Iterable[str]) -> str:
    return ", ".join(f"`docs/results/{topic}.json`" for topic in dict.fromkeys(topics))


def some(wanted: str) -> str:
    """The figures with a bound whose names begin as told: ``topic/name; topic/name``."""
    tests = [claims.Test(*part.strip().split("/", 1)) for part in wanted.split(";")]
    check_topics([test.topic for test in tests])
    found = [f for test in tests for f in test.found() if f["op"] != "report"]
    lines = ["", *_HEAD, *map(row, found)] if found else ["", "Not measured yet."]
    return "\n".join([*lines, "", f"More: {_sources(test.topic for test in tests)}.", ""])


def picture(wanted: str) -> str:
    """A picture by its path in docs/ and its words, or a line that says it is not there yet."""
    file, words = (part.strip() for part in wanted.split(";", 1))
    if not (RESULTS.parent / file).exists():
        return f"\nNot drawn yet: {words}.\n"
    return f"\n![{words}]({file})\n"


def claim(letter: str) -> str:
    """The figures of a claim with what was noted of them, and its verdict."""
    chosen = next(c for c in claims.CLAIMS if c.letter == letter)
    lines = ["", f"Verdict: {claims.verdict(chosen)}."]
    told = [figure for test in chosen.tests for figure in test.found()]
    if told:
        lines += ["", *_HEAD, *map(row, told)]
    missing = [test for test in chosen.tests if not test.found()]
    if missing and told:
        prefix = f"claim ({letter}):"
        names = "; ".join(test.name.removeprefix(prefix).strip(" :") for test in missing)
        lines += ["", f"Not measured yet: {names}."]
    lines += ["", f"Commands, devices and notes: {_sources(test.topic for test in chosen.tests)}."]
    return "\n".join([*lines, ""])


def ablation() -> str:
    """Distances and accuracy after a shorter finetuning that differs in one thing."""
    path = RESULTS / "mmd" / "study.json"
    found = json.loads(path.read_text())["ablation"] if path.exists() else []
    if not found:
        return "\nNot measured yet.\n"
    lines = [
        "",
        "| N | change | FD, classifier | accuracy | FD, EffNet-Lite0 | FD, trained on |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        cells = [
            "" if each[key] is None else number(each[key])
            for key in ("classifier", "accuracy", "effnet", "trained")
        ]
        lines.append(f"| {each['N']} | {each['change']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def updated(text: str) -> str:
    """The page with every table made anew."""

    def block(match: re.Match) -> str:
        line, kind, what, end = match.groups()
        content = {
            "table": lambda: table(what.split()),
            "some": lambda: some(what),
            "picture": lambda: picture(what),
            "claims": lambda: "\n".join(["", *claims.summary(), ""]),
            "claim": lambda: claim(what),
            "estimates": lambda: "\n".join(["", *estimates.table(), ""]),
            "ablation": ablation,
        }[kind]()
        return line + content + end

    return _BLOCK.sub(block, text)


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
