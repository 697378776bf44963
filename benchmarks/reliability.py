"""Faults injected and survived: kills, damaged storage, hostile files, other machines, async saves.

    python -m benchmarks.reliability kills --folder /tmp/reliability --kills 30
    python -m benchmarks.reliability terms --folder /tmp/reliability --kills 5
    python -m benchmarks.reliability storage --folder /tmp/reliability
    python -m benchmarks.reliability restore --folder /tmp/reliability
    python -m benchmarks.reliability fuzz --folder /tmp/reliability --examples 10000
    python -m benchmarks.reliability guided --folder /tmp/reliability
    python -m benchmarks.reliability overhead --folder /tmp/reliability
    python -m benchmarks.reliability record --folder /tmp/reliability

It runs for hours: counts add up in ``state.json`` of the folder after every trial, so that any
command may be stopped and given again, and kills are distributed over the jobs that have the
fewest. `record` writes the counts to docs/results/reliability.json, with every fault by kind in
docs/results/reliability_faults.json.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


class State:
    """Counts that survive this process."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "state.json"
        self.counts: dict[str, Any] = {}
        if self._path.exists():
            self.counts = json.loads(self._path.read_text())

    def add(self, part: str, key: str, **numbers: int) -> None:
        entry = self.counts.setdefault(part, {}).setdefault(key, {})
        for name, number in numbers.items():
            entry[name] = entry.get(name, 0) + number
        self.save()

    def put(self, part: str, key: str, value: Any) -> None:
        self.counts.setdefault(part, {})[key] = value
        self.save()

    def save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.counts, indent=1))
        temporary.replace(self._path)


def kills(state: State, flags: argparse.Namespace, number: int = signal.SIGKILL) -> None:
    # One thread a process and programs from disk: an attempt is then startup and little else.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(flags.folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "OMP_NUM_THREADS": "1",
    }
    from benchmarks import reliability_kills as matrix

    _import_everything(["pipeline", *(job.verb for job in matrix.JOBS.values())])
    part = {signal.SIGKILL: "kills", signal.SIGTERM: "terms"}[number]
    jobs = flags.jobs.split(",") if flags.jobs else list(matrix.JOBS)
    base = matrix.make_base(flags.folder)
    while True:
        done = {job: state.counts.get(part, {}).get(job, {}).get("signals", 0) for job in jobs}
        job = min(jobs, key=lambda name: done[name])
        if done[job] >= flags.kills:
            break
        trials = state.counts.get(part, {}).get(job, {}).get("trials", 0)
        dice = random.Random(f"{flags.seed} {part} {job} {trials}")
        found = matrix.trial(base, job, number, dice)
        moments = {f"while {name}": n for name, n in Counter(found["signals"]).items()}
        counts = {"trials": 1, "signals": len(found["signals"]), **moments}
        state.add(part, job, **counts, lost=int(bool(found["problem"])))
        print(f"{part} {job}: {found}", flush=True)
        if found["problem"]:
            problems = state.counts.setdefault("problems", [])
            problems.append({"job": job, "part": part, "trial": trials, **found})
            state.save()


def _import_everything(names: list[str]) -> None:
    """What the jobs import, without starting a backend: forks must find no threads of its."""
    import importlib

    import orbax.checkpoint  # noqa: F401
    import tensorboardX  # noqa: F401
    import tensorflow_datasets  # noqa: F401

    from lfm_jax import config_check, jobs, main  # noqa: F401
    from lfm_jax.jobs import mmd  # noqa: F401

    for name in names:
        importlib.import_module(f"lfm_jax.jobs.{jobs.JOBS[name][0]}")


def terms(state: State, flags: argparse.Namespace) -> None:
    kills(state, flags, signal.SIGTERM)


def storage(state: State, flags: argparse.Namespace) -> None:
    """Damaged files and full disks; another call draws other damage."""
    from benchmarks import reliability_storage as damage

    number = state.counts.get("rounds", {}).get("storage", 0)
    state.put("rounds", "storage", number + 1)
    for part, rounds in ((damage.checkpoints, 30), (damage.caches, 30), (damage.full_disks, 3)):
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            dice = random.Random(f"{flags.seed} {number} {part.__name__}")
            for kind, problem in part(Path(folder), dice, rounds):
                state.add("storage", kind, faults=1, lost=int(bool(problem)))
                if problem:
                    print(f"{kind}: {problem}", flush=True)
                    problems = state.counts.setdefault("problems", [])
                    problems.append({"part": "storage", "kind": kind, "problem": problem})
    state.save()


def restore(state: State, flags: argparse.Namespace) -> None:
    """Every pair of saver and reader, once a call."""
    from benchmarks import reliability_restore

    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        found = reliability_restore.matrix(Path(folder), flags.seed)
    for kind, (count, problems) in found.items():
        state.put("restore", kind, {"faults": count, "lost": len(problems)})
        for problem in problems:
            print(f"{kind}: {problem}", flush=True)


def fuzz(state: State, flags: argparse.Namespace) -> None:
    """Malformed inputs for every reader; another call generates others."""
    from benchmarks import fuzz as fuzzing

    number = state.counts.get("rounds", {}).get("fuzz", 0)
    state.put("rounds", "fuzz", number + 1)
    with tempfile.TemporaryDirectory() as folder:
        for reader in fuzzing.readers(Path(folder)):
            if not re.search(flags.only, reader.name):
                continue
            examples = max(1, int(flags.examples * reader.share))
            found = fuzzing.fuzz(reader, examples, 1000 * number + flags.seed)
            counts = {key: found[key] for key in ("tried", "refused", "accepted")}
            state.add("fuzz", reader.name, **counts, surprises=len(found["surprises"]))
            print(reader.name, found, flush=True)


def guided(state: State, flags: argparse.Namespace) -> None:
    """libFuzzer on the parsers of this package, `flags.seconds` each; needs atheris."""
    from benchmarks import fuzz_guided

    for name in fuzz_guided.READERS:
        if not re.search(flags.only, name):
            continue
        found = fuzz_guided.found(name, flags.seconds)
        counts = {"tried": found["tried"], "surprises": len(found["surprises"])}
        state.add("guided", name, **counts)
        print(name, found, flush=True)


def overhead(state: State, flags: argparse.Namespace) -> None:
    """Alternating windows; give it a quiet machine."""
    from benchmarks import reliability_overhead as measured

    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        times = measured.windows(Path(folder), steps=flags.steps, repeats=flags.repeats)
    for kind in measured.KINDS[1:]:
        state.put("overhead", kind, measured.overhead(times, kind))
    state.put("overhead", "steps", flags.steps)
    state.put("overhead", "step seconds", min(times["none"]) / flags.steps)
    print(state.counts["overhead"], flush=True)


def record(state: State, flags: argparse.Namespace) -> None:
    """The counts as figures, and all of them by kind beside."""
    from benchmarks import reliability_record

    counts: dict[str, Any] = {}
    for folder in (flags.folder, *flags.also):  # one a machine, or one a part
        for part, entries in State(folder).counts.items():
            if part != "problems":
                counts[part] = _added(counts.get(part, {}), entries, part == "overhead")
    reliability_record.figures_of(counts)


def _added(ours: Any, theirs: Any, replace: bool) -> Any:
    """Counts of two folders together; measurements are the later folder's."""
    if not isinstance(ours, dict):
        return theirs if replace else ours + theirs
    missing = {key: value for key, value in theirs.items() if key not in ours}
    both = {key: _added(ours[key], theirs[key], replace) for key in theirs if key in ours}
    return {**ours, **both, **missing}


def main() -> None:
    parts = {
        "kills": kills,
        "terms": terms,
        "storage": storage,
        "restore": restore,
        "fuzz": fuzz,
        "guided": guided,
        "overhead": overhead,
        "record": record,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--folder", type=Path, required=True, help="runs, programs and counts")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="more such, to record")
    parser.add_argument("--kills", type=int, default=30, help="at least this many a job")
    parser.add_argument("--jobs", default="", help="of the kill matrix; default all")
    parser.add_argument("--examples", type=int, default=10_000, help="malformed inputs a reader")
    parser.add_argument("--seconds", type=int, default=60, help="of libFuzzer, a reader")
    parser.add_argument("--only", default="", help="regular expression of readers to fuzz")
    parser.add_argument("--steps", type=int, default=200, help="of a window of the overhead")
    parser.add_argument("--repeats", type=int, default=8, help="windows of each kind")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    flags.folder = flags.folder.absolute()
    parts[flags.part](State(flags.folder), flags)
    sys.exit(0)


if __name__ == "__main__":
    main()
