"""Do hostile files ever raise anything but the errors that name them?

    python -m benchmarks.fuzz --examples 2000

Each reader gets damaged copies of valid files: bytes replaced, inserted, removed, cut, plain noise;
inside archives the damage lies behind checksums that fit, inside JSON any value becomes any other,
tensors change name, shape and kind. Nothing may come out but the documented errors, no signal (a
fork reads), and no memory beyond `MEMORY`: a header's claim is not a reason to allocate. For the
parsers of this package that decide byte by byte the damage is guided by coverage: what reaches new
lines is damaged again. Prints a count a reader; exits with 1 on a surprise.
"""

import argparse
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import fuzz_readers, fuzz_runs, fuzz_weights
from benchmarks.fuzz_damage import damaged
from benchmarks.fuzz_readers import Reader

MEMORY = 4 << 30  # bytes over what the process had
_KEPT = 3  # surprises a reader that are reported


def readers(folder: Path) -> Iterator[Reader]:
    """Every reader of files that others may have written or damaged."""
    # Weights first: they compute in their forks, for which no backend may have been started here.
    for module in (fuzz_weights, fuzz_readers, fuzz_runs):
        yield from module.readers(folder)


def fuzz(reader: Reader, examples: int, seed: int) -> dict[str, Any]:
    """Counts of inputs tried, refused by name and still readable, and surprises, in a fork.

    Returns:
        "tried", "refused", "accepted", "lines" (reached, where traced), "surprises" (texts).
    """
    answer, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(answer)
        try:
            found = _loop(reader, examples, seed, write)
        except BaseException as error:
            counts = {"tried": 0, "refused": 0, "accepted": 0}
            found = {**counts, "surprises": [f"the fuzzer itself: {error!r}"]}
        os.write(write, json.dumps(found).encode() + b"\n")
        os._exit(0)
    os.close(write)
    with open(answer, "rb") as stream:
        said = stream.read().splitlines()
    _, status = os.waitpid(pid, 0)
    if said and said[-1].startswith(b"{"):
        return json.loads(said[-1])
    reached = int(said[-1]) if said else 0
    text = f"input {reached} (seed {seed}) ended the process with status {status}"
    return {"tried": reached + 1, "refused": 0, "accepted": 0, "surprises": [text]}


def _loop(reader: Reader, examples: int, seed: int, progress: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # Pillow comments on damaged TIFF tags
    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + MEMORY, base + MEMORY))
    dice = random.Random(f"{seed} {reader.name}")
    corpus: list[bytes] = []
    lines: set[tuple[str, int]] = set()
    found = {"tried": 0, "refused": 0, "accepted": 0, "surprises": []}
    # A crash of the process leaves the number of its input; a pipe holds 64 KiB of them.
    every = max(1, examples // 4000)
    for number in range(examples):
        if number % every == 0:
            os.write(progress, b"%d\n" % number)
        data = damaged(dice.choice(corpus), dice) if corpus and dice.random() < 0.5 else None
        data = reader.make(dice) if data is None else data
        before = len(lines)
        if reader.traced:
            sys.settrace(_tracer(reader.traced, lines))
        try:
            reader.read(data)
            found["accepted"] += 1
        except reader.allowed:
            found["refused"] += 1
        except BaseException as error:
            found["surprises"].append(f"input {number}: {error!r}: {data[:80]!s}")
        finally:
            sys.settrace(None)
        found["tried"] += 1
        if len(lines) > before:
            corpus.append(data)
        if len(found["surprises"]) >= _KEPT:
            break
    return {**found, "lines": len(lines)}


def _tracer(files: tuple[str, ...], lines: set[tuple[str, int]]) -> Callable:
    def trace(frame: Any, event: str, argument: Any) -> Callable | None:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="malformed inputs a reader")
    parser.add_argument("--only", default="", help="regular expression of readers")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    surprised = False
    with tempfile.TemporaryDirectory() as folder:
        for reader in readers(Path(folder)):
            if not re.search(flags.only, reader.name):
                continue
            begin = time.perf_counter()
            found = fuzz(reader, max(1, int(flags.examples * reader.share)), flags.seed)
            seconds = time.perf_counter() - begin
            print(
                f"{reader.name:20} {found['tried']:,} inputs: {found['refused']:,} refused by "
                f"name, {found['accepted']:,} still readable, {seconds:.0f} s",
                *found["surprises"],
                sep="\n    ",
                flush=True,
            )
            surprised |= bool(found["surprises"])
    sys.exit(int(surprised))


if __name__ == "__main__":
    main()
