"""Runs side by side on one page: grids, curves against NFE and step, figures with provenance.

The page is a single file without scripts: pictures are embedded, curves are inline SVG, and it can
be mailed or put beside the results. Figures of runs that were judged by different pipelines,
references or counts stand under a warning, since the table would otherwise invite the comparison.
"""

import base64
import dataclasses
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lfm_jax.errors import UserError
from lfm_jax.writers import write_bytes

# Okabe and Ito's colours: told apart with any colour vision, on light and dark ground.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7700", "#7f7f7f")
# Figures that must agree before others may be compared.
CONDITIONS = (
    *("metric", "pipeline", "extractor_fingerprint"),
    *("reference", "num_samples", "jpeg_quality"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the page shows of one run.

    Attributes:
        name: the column's title.
        figures: numbers and provenance; nested mappings become dotted rows.
        grid: a PNG of samples, None if there is none.
        curves: title -> points ``(x, y)``; equal titles of several runs share a plot. A title
            "FD over NFE" labels the axes "NFE" and "FD".
    """

    name: str
    figures: Mapping[str, Any]
    grid: bytes | None = None
    curves: Mapping[str, Sequence[Sequence[float | int]]] = dataclasses.field(default_factory=dict)


def read_run(workdir: str | os.PathLike, *, name: str = "") -> RunSummary:
    """Summary of a workdir: ``results/evaluate.json`` and, if there, ``samples/grid.png`` and
    ``results/curves.json`` (title -> list of ``[x, y]``).

    Raises `UserError` if the run was not evaluated or its results are not JSON.
    """
    workdir = epath.Path(workdir)
    result = workdir / "results" / "evaluate.json"
    if not result.exists():
        raise UserError(
            f"compare.runs {workdir}: no results/evaluate.json; accepted: evaluated runs"
        )
    try:
        figures = json.loads(result.read_text())
        curves_file = workdir / "results" / "curves.json"
        curves = json.loads(curves_file.read_text()) if curves_file.exists() else {}
    except ValueError as error:
        raise UserError(f"compare.runs {workdir}: results are not JSON ({error})") from error
    grid = workdir / "samples" / "grid.png"
    return RunSummary(
        name=name or workdir.name,
        figures=figures,
        grid=grid.read_bytes() if grid.exists() else None,
        curves={k: [(float(x), float(y)) for x, y in v] for k, v in curves.items()},
    )


def write_compare(
    path: str | os.PathLike, runs: Sequence[RunSummary], *, title: str = "Runs compared"
) -> None:
    """Write `compare_html` to `path`, all or nothing; `UserError` without runs."""
    write_bytes(path, compare_html(runs, title=title).encode())


def compare_html(runs: Sequence[RunSummary], *, title: str = "Runs compared") -> str:
    """The whole page as text; `UserError` without runs."""
    if not runs:
        raise UserError("compare.runs: none; accepted: one or more evaluated working directories")
    titles = list(dict.fromkeys(t for run in runs for t in run.curves))
    plots = "".join(_plot(t, [(r.name, r.curves.get(t, ())) for r in runs]) for t in titles)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _warning(runs),
        '<h2>Samples</h2><div class="grids">',
        *(_grid(run, i) for i, run in enumerate(runs)),
        "</div>",
        f'<h2>Curves</h2><div class="plots">{plots}</div>' if plots else "",
        "<h2>Figures and what they depend on</h2>",
        _table(runs),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _flatten(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _warning(runs: Sequence[RunSummary]) -> str:
    differing = [
        key
        for key in CONDITIONS
        if len({json.dumps(r.figures.get(key), sort_keys=True, default=str) for r in runs}) > 1
    ]
    if not differing:
        return ""
    names = ", ".join(key.replace("_", " ") for key in differing)
    return (
        f'<p class="warning" role="alert"><strong>Not comparable:</strong> the runs differ in '
        f"{html.escape(names)}.</p>"
    )


def _grid(run: RunSummary, index: int) -> str:
    name = html.escape(run.name)
    swatch = f'<span class="swatch" style="background:{COLOURS[index % len(COLOURS)]}"></span>'
    if run.grid is None:
        body = '<p class="none">no grid</p>'
    else:
        data = base64.b64encode(run.grid).decode()
        body = f'<img alt="samples of {name}" src="data:image/png;base64,{data}">'
    return f"<figure>{body}<figcaption>{swatch}{name}</figcaption></figure>"


def _table(runs: Sequence[RunSummary]) -> str:
    columns = [_flatten(run.figures) for run in runs]
    keys = list(dict.fromkeys(k for column in columns for k in column))
    head = "".join(f'<th scope="col">{html.escape(run.name)}</th>' for run in runs)
    rows = []
    for key in keys:
        cells = [_text(column.get(key)) for column in columns]
        mark = ' class="differs"' if len(set(cells)) > 1 else ""
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr{mark}><th scope="row">{html.escape(key)}</th>{row}</tr>')
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">figure</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">Rows in bold differ between the runs.</p>'
    )


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) > 40 and " " not in text:  # a hash: its beginning identifies it
        return f'<span title="{html.escape(text)}">{html.escape(text[:16])}…</span>'
    return html.escape(text)


# ---- curves

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 62, 12, 34, 46


def _plot(title: str, lines: Sequence[tuple[str, Sequence[Sequence[float | int]]]]) -> str:
    """One SVG with a line per run; an axis is logarithmic where its values span over 20 times."""
    y_label, _, x_label = title.partition(" over ")
    finite = [
        [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for _, points in lines
    ]
    every = [point for points in finite for point in points]
    if not every:
        return ""
    to_x, x_ticks = _axis([x for x, _ in every], LEFT, WIDTH - RIGHT)
    to_y, y_ticks = _axis([y for _, y in every], HEIGHT - BOTTOM, TOP)
    marks = []
    for value in y_ticks:
        y = to_y(value)
        marks.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        marks.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x = to_x(value)
        marks.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
        )
    for i, points in enumerate(finite):
        colour = COLOURS[i % len(COLOURS)]
        places = [(to_x(x), to_y(y)) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        name = html.escape(lines[i][0])
        for (x, y), (u, v) in zip(places, sorted(points), strict=True):
            tip = f"<title>{name}: {u:g}, {v:.5g}</title>"
            marks.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{tip}</circle>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text class="title" x="{LEFT}" y="20">{html.escape(y_label)}</text>'
    )
    label = html.escape(title)
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg role="img" aria-label="{label}" {box}>{"".join(marks)}</svg>'


def _axis(values: Sequence[float | int], low: float | int, high: float | int):
    """``(position of a value, ticks)`` of an axis drawn from `low` to `high`."""
    smallest, largest = min(values), max(values)
    if smallest > 0 and largest / smallest > 20:
        first, last = math.log10(smallest), math.log10(largest)
        ticks = [
            digit * 10.0**power
            for power in range(math.floor(first), math.ceil(last) + 1)
            for digit in ((1, 2, 5) if last - first < 2.5 else (1,))
        ]
        scale = math.log10
    else:
        margin = 0.04 * (largest - smallest) or abs(largest) * 0.1 or 1.0
        first, last = smallest - margin, largest + margin
        step = 10.0 ** math.floor(math.log10((last - first) / 4))
        step *= next(s for s in (1, 2, 5, 10) if (last - first) / (step * s) <= 6)
        start = math.ceil(first / step)
        ticks = [round(i * step, 12) for i in range(start, math.floor(last / step) + 1)]
        scale = float

    def position(value: float | int) -> float:
        return low + (scale(value) - first) / (last - first) * (high - low)

    inside = sorted((low, high))
    return position, [t for t in ticks if inside[0] - 0.5 <= position(t) <= inside[1] + 0.5]


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --warn: #b3261e; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; }
main { max-width: 1200px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.warning { border-left: 4px solid var(--warn); background: var(--soft); padding: .6rem .9rem; }
.grids, .plots { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; } figure img { width: 100%; height: auto; image-rendering: pixelated; }
figcaption { margin-top: .4rem; font-weight: 600; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .45em; }
.none, .note { opacity: .7; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
svg .title { font-weight: 600; font-size: 13px; } svg .rule { stroke: var(--line); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tbody th { font-weight: 400; opacity: .85; white-space: nowrap; }
.differs th, .differs td { font-weight: 600; opacity: 1; }
"""
