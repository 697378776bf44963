"""Counts of faults as the figures of docs/results/reliability.json."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import figures

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
COMMAND = "python -m benchmarks.reliability {} --folder /tmp/reliability"


def figures_of(counts: dict[str, Any]) -> None:
    """Record every part that `counts` has."""
    if counts.get("kills"):
        _kills(counts["kills"])
    _faults(counts)
    if "fuzz" in counts:
        _fuzzing(counts["fuzz"], counts.get("guided", {}))
    if "overhead" in counts:
        _overhead(counts["overhead"])
    with open(RESULTS / "reliability_faults.json", "w") as file:
        json.dump(counts, file, indent=1)
        file.write("\n")


def _record(name: str, value: Any, op: str, bound: Any, part: str, note: str) -> None:
    figures.record("reliability", name, value, op, bound, COMMAND.format(part), note)


def _kills(jobs: dict[str, dict[str, int]]) -> None:
    moments: Counter = Counter()
    for entry in jobs.values():
        moments.update({key: n for key, n in entry.items() if key.startswith("while ")})
    found = list(jobs.values())
    note = (
        ", ".join(f"{job} {entry['signals']}" for job, entry in jobs.items())
        + f"; {sum(entry['trials'] for entry in found)} runs killed up to 8 times each; "
        + ", ".join(f"{n} {moment}" for moment, n in moments.most_common())
    )
    kills = sum(entry["signals"] for entry in found)
    _record("kills over all jobs", kills, ">=", 200, "kills", note)
    lost = sum(entry["lost"] for entry in found)
    name = "killed runs that did not end equal to the undisturbed one"
    _record(name, lost, "==", 0, "kills", note)
    train = jobs.get("train")
    if train:
        figures.record(
            "pipeline",
            "trainings resumed after kill -9 that did not end in bit-identical parameters",
            train["lost"],
            "==",
            0,
            COMMAND.format("kills"),
            f"{train['signals']} kills at random moments in {train['trials']} runs",
        )


def _faults(counts: dict[str, Any]) -> None:
    """All of them: name -> (how many, how many lost)."""
    faults = {
        f"{name} of {job}": (entry["signals"], entry["lost"])
        for part, name in (("kills", "SIGKILL"), ("terms", "SIGTERM"))
        for job, entry in counts.get(part, {}).items()
    }
    for part in ("storage", "restore"):
        for kind, entry in counts.get(part, {}).items():
            faults[kind] = (entry["faults"], entry["lost"])
    if not faults:
        return
    injected, lost = (sum(values) for values in zip(*faults.values(), strict=True))
    note = f"{injected} faults; " + ", ".join(f"{kind}: {n}" for kind, (n, _) in faults.items())
    name = "share of injected faults survived"
    _record(name, 1 - lost / injected, "==", 1.0, "kills|terms|storage|restore", note)


def _fuzzing(readers: dict[str, dict[str, int]], guided: dict[str, dict[str, int]]) -> None:
    every = [*readers.values(), *guided.values()]
    note = ", ".join(f"{name} {entry['tried']:,}" for name, entry in readers.items())
    if guided:
        told = ", ".join(f"{name} {entry['tried']:,}" for name, entry in guided.items())
        note += f"; guided by libFuzzer: {told}"
    tried = sum(entry["tried"] for entry in every)
    _record("malformed inputs tried", tried, ">=", 100_000, "fuzz|guided", note)
    name = "malformed inputs that raised anything undocumented"
    surprises = sum(entry["surprises"] for entry in every)
    _record(name, surprises, "==", 0, "fuzz|guided", note)


def _overhead(found: dict[str, float]) -> None:
    waited = f"{found['waited for']:+.1f} percent"
    if found["waited for"] < found["asynchronous"]:
        waited += ", which cannot be less: the difference of the two is noise"
    note = (
        f"a checkpoint every {found['steps']} steps of {1000 * found['step seconds']:.0f} ms "
        "(1.06 M parameters with Adam and EMA, 17 MB), on the cores that compute; waited for: "
        f"{waited}"
    )
    name = "overhead of async checkpointing on step time, percent"
    _record(name, found["asynchronous"], "<=", 3, "overhead", note)
