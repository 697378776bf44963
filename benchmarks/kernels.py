"""Where the time on a GPU goes, read from the trace that `jax.profiler` writes.

A trace has a process for each device and in it a thread for each stream, beside threads that tell
the same time again by module, operation and source line: only the streams are counted.
"""

import gzip
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """What one kind of kernel takes of a step; `op` is where most of it comes from."""

    kernel: str
    milliseconds: float
    share: float
    calls: float
    op: str


def kernel_costs(
    folder: str | os.PathLike[str], *, steps: int, top: int = 5
) -> tuple[list[Cost], float, float]:
    """The `top` kinds of kernel of the newest trace in `folder`, largest first.

    Kernels are of one kind that differ by the numbers at their names' end alone.

    Args:
        steps: how many the trace holds.

    Returns:
        The costs, the time in kernels a step, and that from the first one's start to the last
        one's end a step, in ms; the two times differ by what the device was idle.
    """
    found = sorted(Path(folder).rglob("*trace.json.gz"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no *trace.json.gz in {folder}")
    with gzip.open(found[-1]) as file:
        events = json.load(file)["traceEvents"]
    names = {(e["name"], e["pid"], e.get("tid")): e["args"]["name"] for e in events if named(e)}
    devices = {pid for (what, pid, _), name in names.items() if "/device:GPU" in name}
    streams = {
        (pid, tid)
        for (what, pid, tid), name in names.items()
        if what == "thread_name" and pid in devices and name.startswith("Stream #")
    }
    kernels = [e for e in events if e.get("ph") == "X" and (e.get("pid"), e.get("tid")) in streams]
    if not kernels:
        return [], 0.0, 0.0
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    ops: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in kernels:
        kind = re.sub(r"(?:[._]\d+)+$", "", event["name"])
        times[kind] += event["dur"]
        calls[kind] += 1
        args = event.get("args", {})
        op = args.get("name") or args.get("tf_op") or args.get("hlo_op") or ""
        ops[kind][op] += event["dur"]
    total = sum(times.values())
    costs = [
        Cost(
            kind,
            times[kind] / 1e3 / steps,
            times[kind] / total,
            calls[kind] / steps,
            max(ops[kind], key=ops[kind].__getitem__),
        )
        for kind in sorted(times, key=times.__getitem__, reverse=True)[:top]
    ]
    span = max(e["ts"] + e["dur"] for e in kernels) - min(e["ts"] for e in kernels)
    return costs, total / 1e3 / steps, span / 1e3 / steps


def named(event: dict) -> bool:
    """Whether it names a process or a thread."""
    return event.get("ph") == "M" and event.get("name") in ("process_name", "thread_name")


def table(costs: list[Cost], busy: float, span: float) -> str:
    """A Markdown table, and under it how much of the time kernels ran."""
    if not costs:
        return "the trace has no kernel of a GPU"
    lines = [
        "| kernel | ms a step | share | calls a step | most of it from |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.kernel[:60]} | {c.milliseconds:.2f} | {100 * c.share:.1f} % | {c.calls:g} "
        f"| {c.op[-60:]} |"
        for c in costs
    ]
    return "\n".join([*lines, f"kernels {busy:.1f} ms of {span:.1f} ms a step"])
