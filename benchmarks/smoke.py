"""Every experiment end to end in its `:smoke` size: does it run, and in how many seconds?

    python -m benchmarks.smoke [NAME ...]     # configs by name; all that start from images

A smoke run trains, encodes, samples and evaluates at tiny sizes on synthetic or few real images.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.figures import record

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("digits", "fashion_mnist", "imagenet", "celebahq", "ffhq", "lsun_bedroom", "lsun_church")


def seconds(name: str, folder: str) -> float:
    """Wall time of one smoke run, compilation and imports included.

    Raises:
        SystemExit: the run failed; its last lines are shown.
    """
    command = [sys.executable, "-m", "lfm_jax.main", f"--config=configs/{name}.py:smoke"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, f"--workdir={folder}/{name}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name}:smoke ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def main(names: list[str]) -> None:
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(names or NAMES, desc="smoke", unit="run"):
            times[name] = seconds(name, folder)
    shown = ", ".join(f"{name} {value:.0f}" for name, value in times.items())
    print(shown)
    if not names:
        record(
            "pipeline",
            "slowest `:smoke` run of an experiment, seconds",
            max(times.values()),
            "<=",
            60.0,
            "python -m benchmarks.smoke",
            f"seconds, imports and compilation included: {shown}",
        )


if __name__ == "__main__":
    main(sys.argv[1:])
