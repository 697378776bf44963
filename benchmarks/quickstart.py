"""A new user's first hour: a fresh clone, a fresh environment, the README's commands as they are.

    python -m benchmarks.quickstart [--folder=/tmp/first_hour]
    python -m benchmarks.quickstart --smoke     # this environment, small runs, nothing recorded

The commands come out of README.md's code blocks, so that a README that no longer runs is found.
Those that need images or machines of one's own are told apart by `ABSENT`. Logs stay in the folder.
Figures go to docs/results/quickstart.json.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.figures import record

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.quickstart"
_BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
# Parts of commands that a fresh machine cannot run, or that take an hour or more.
ABSENT = ("/images", "launch/test.sh", "fashion_mnist", "/absolute/path")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the code blocks of a page."""
    return [(match[1], match[2]) for match in _BLOCK.finditer(text)]


def steps(text: str) -> list[tuple[str, str]]:
    """What a reader of the page types, in order: (language, command or program)."""
    found = []
    for language, content in blocks(text):
        if language == "python":
            found.append((language, content))
            continue
        joined = content.replace("\\\n", " ")
        lines = [line.partition("  #")[0].strip() for line in joined.splitlines()]
        found += [(language, line) for line in lines if line and not line.startswith("#")]
    return [(kind, what) for kind, what in found if not any(word in what for word in ABSENT)]


def clone(folder: Path) -> Path:
    """A fresh clone of what is committed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target = folder / "lfm_jax"
    subprocess.run(["git", "clone", "-q", "--no-local", str(ROOT), str(target)], check=True)
    return target


def typed(kind: str, what: str, checkout: Path, log: Path, smoke: bool) -> tuple[bool, float]:
    """Whether a step ended well, and its seconds; what it said is in the log."""
    if smoke and what.startswith("bash launch/local.sh"):
        # Not the launcher: it would install the clone into this environment.
        what = "python -m lfm_jax.main --config=configs/digits.py:smoke --workdir=runs/digits"
    command = ["bash", "-c", f"source .venv/bin/activate 2>/dev/null; {what}"]
    if kind == "python":
        command = [str(checkout / ".venv/bin/python"), "-c", what]
    start = time.perf_counter()
    with log.open("w") as out:
        done = subprocess.run(
            command, cwd=checkout, stdout=out, stderr=subprocess.STDOUT, env=clean(), check=False
        )
    return done.returncode == 0, time.perf_counter() - start


def clean() -> dict[str, str]:
    """The environment without what this project, or a Python environment, has set."""
    ours = ("JAX_", "XLA_", "LFM_", "PYTHON", "VIRTUAL_ENV", "TF_", "GLIBC_TUNABLES")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def install(checkout: Path) -> float:
    """Seconds to make .venv as the launchers do."""
    start = time.perf_counter()
    script = "set -euo pipefail; source launch/venv.sh; ensure_venv"
    subprocess.run(["bash", "-c", script], cwd=checkout, check=True, env=clean())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="/tmp/first_hour")
    parser.add_argument("--smoke", action="store_true")
    flags = parser.parse_args()
    folder = Path(flags.folder)
    start = time.perf_counter()
    checkout = clone(folder)
    if flags.smoke:
        (checkout / ".venv").symlink_to(Path(sys.prefix))
        installed = 0.0
    else:
        installed = install(checkout)
    outcomes = []
    todo = steps((checkout / "README.md").read_text())
    for number, (kind, what) in enumerate(tqdm(todo, unit="step")):
        log = folder / f"step_{number}.log"
        good, seconds = typed(kind, what, checkout, log, flags.smoke)
        first = what.strip().splitlines()[0]
        outcomes.append((first, good, seconds))
        tqdm.write(f"{'ok  ' if good else 'FAIL'} {seconds:7.1f} s  {first}  ({log})")
    failed = [first for first, good, _ in outcomes if not good]
    if flags.smoke:
        sys.exit(len(failed))
    whole = time.perf_counter() - start
    told = "; ".join(f"{first}: {seconds:.0f} s" for first, _, seconds in outcomes)
    record(
        "quickstart", "README's commands and programs that fail on a fresh clone", len(failed),
        "==", 0, COMMAND, "; ".join(failed) or told,
    )  # fmt: skip
    run = next(s for first, _, s in outcomes if first.startswith("bash launch/local.sh"))
    record(
        "quickstart", "clone to measured samples of digits, minutes", (installed + run) / 60,
        "report", None, COMMAND, f"installation {installed:.0f} s, the run {run:.0f} s",
    )  # fmt: skip
    record(
        "quickstart", "everything in the README that a fresh machine can run, minutes", whole / 60,
        "report", None, COMMAND, told,
    )  # fmt: skip


if __name__ == "__main__":
    main()
