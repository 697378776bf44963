"""Where measured figures go: ``docs/results/<topic>.json``, one record a figure, upserted by name.

A figure is written by the script that measured it. ``holds`` is computed from value, op and bound
and recomputed by a test, so that no table of the README can say more than was measured.
"""

import json
import math
import operator
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
TOPICS = (
    "pipeline",
    "vae",
    "backbones",
    "sampling",
    "evaluation",
    "mmd",
    "boundary",
    "conditions",
    "scale",
    "reliability",
    "quickstart",
)
_COMPARE = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "between": lambda value, bound: bound[0] <= value <= bound[1],
    "report": lambda value, bound: True,  # for information
}


def holds(value: float | bool, op: str, bound: Any) -> bool:
    """Whether ``value op bound``; a NaN holds nothing."""
    if isinstance(value, float) and math.isnan(value):
        return False
    return bool(_COMPARE[op](value, bound))


def device() -> str:
    """What this process measures on, in words."""
    import jax

    kind = jax.devices()[0].device_kind
    if kind == "cpu":
        return f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{jax.device_count()} x {kind}"


def record(
    topic: str,
    name: str,
    value: float | bool,
    op: str,
    bound: Any,
    command: str,
    note: str = "",
) -> bool:
    """Write one figure and return whether it holds.

    Args:
        topic: one of `TOPICS`, the file's name.
        name: of the figure; a record of the same name is replaced.
        value: what was measured.
        op: "<=", "<", ">=", ">", "==", "between" (bound is a pair) or "report" (bound is None).
        bound: what the value is held against.
        command: the command line that measures it again.
        note: what a reader must know to trust it (sample sizes, conditions, what limits it).
    """
    if topic not in TOPICS:
        raise ValueError(f"topic {topic!r}: expected one of {', '.join(TOPICS)}")
    value = value if isinstance(value, bool) else float(value)
    figure = {
        "name": name,
        "value": value,
        "op": op,
        "bound": bound,
        "holds": holds(value, op, bound),
        "command": command,
        "device": device(),
        "note": note,
    }
    path = RESULTS / f"{topic}.json"
    figures = json.loads(path.read_text())["figures"] if path.exists() else []
    names = [f["name"] for f in figures]
    if name in names:
        figures[names.index(name)] = figure
    else:
        figures.append(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"figures": figures}, indent=1) + "\n")
    temporary.replace(path)
    return figure["holds"]


def keep(topic: str, name: str, value: float | bool, op: str, bound: Any, *rest: str) -> bool:
    """`record`, and print it; `rest` is its command and note."""
    held = record(topic, name, value, op, bound, *rest)
    shown = value if isinstance(value, int) else f"{value:.6g}"
    sign, note = "ok " if held else "NOT", "".join(rest[1:])
    print(f"{sign} {name}: {shown} {op} {bound}  {note}", flush=True)
    return held
