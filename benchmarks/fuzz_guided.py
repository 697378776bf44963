"""The parsers of this package under libFuzzer, which keeps what reaches new branches (atheris).

    pip install atheris
    python -m benchmarks.fuzz_guided --seconds 60

`benchmarks.fuzz` damages valid files with what it knows of their formats; this knows nothing and
learns from the branches of the code. One process a reader, its modules instrumented, started from
files that the other one made. Prints a count a reader; exits with 1 on a surprise.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Reader -> what is instrumented. numpy, Pillow and zipfile are others' to fuzz.
READERS = {
    "idx": ("lfm_jax.data.idx",),
    "label table (CSV)": ("lfm_jax.data.folder",),
    "label table (JSON)": ("lfm_jax.data.folder",),
    "record": ("lfm_jax.data.records", "lfm_jax.data.latents"),
    "npz reference": ("lfm_jax.evaluate", "lfm_jax.errors"),
    "pickled reference": ("lfm_jax.evaluate", "lfm_jax.errors"),
    "samples": ("lfm_jax.evaluate",),
}
_SEEDS = 200  # files to start from


def found(name: str, seconds: int) -> dict[str, Any]:
    """Inputs tried by libFuzzer in `seconds`, branches reached, and the surprise that ended it."""
    command = [sys.executable, "-m", "benchmarks.fuzz_guided", "--reader", name]
    done = subprocess.run(
        [*command, "--seconds", str(seconds)], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    runs = re.findall(r"Done (\d+) runs", said) or re.findall(r"^#(\d+)\t", said, re.M)
    reached = re.findall(r"cov: (\d+)", said)
    surprise = "" if done.returncode == 0 else said[-2000:]
    return {
        "tried": int(runs[-1]) if runs else 0,
        "branches": int(reached[-1]) if reached else 0,
        "surprises": [surprise] if surprise else [],
    }


def run(name: str, seconds: int) -> None:
    """libFuzzer on one reader, in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=list(READERS[name])):
        import lfm_jax.data
        import lfm_jax.evaluate  # noqa: F401
        from benchmarks import fuzz_readers

        folder = tempfile.TemporaryDirectory()
        readers = fuzz_readers.readers(Path(folder.name))
        reader = next(reader for reader in readers if reader.name == name)
    corpus = Path(folder.name) / "corpus"
    corpus.mkdir()
    dice = random.Random(0)
    for number in range(_SEEDS):
        (corpus / str(number)).write_bytes(reader.make(dice))

    def one(data: bytes) -> None:
        try:
            reader.read(data)
        except reader.allowed:
            pass

    limits = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=8192", "-max_len=20000"]
    artifacts = f"-artifact_prefix={folder.name}/"
    atheris.Setup([sys.argv[0], *limits, artifacts, "-verbosity=1", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="a reader")
    parser.add_argument("--reader", default="", help="this one alone, in this process")
    flags = parser.parse_args()
    if flags.reader:
        run(flags.reader, flags.seconds)
        return
    surprised = False
    for name in READERS:
        answer = found(name, flags.seconds)
        print(
            f"{name:20} {answer['tried']:,} inputs, {answer['branches']} branches",
            *answer["surprises"],
            sep="\n    ",
            flush=True,
        )
        surprised |= bool(answer["surprises"])
    sys.exit(int(surprised))


if __name__ == "__main__":
    main()
