"""SIGKILL and SIGTERM at random moments, then the same command again, until it ends: is all equal?

Every attempt is a fork of one process that has imported everything, so that it costs a second or
two of CPU; it runs `lfm_jax.main` as a shell would. Half of the moments are uniform over the run's
CPU time, half are armed: the attempt dies when a temporary file or folder of the job is seen, which
is in the middle of an asynchronous save, of a shard, of a part of the samples, of an export. An
attempt that ends is compared with the undisturbed run: every array of the last checkpoint by its
sum, logged losses, bytes of shards, samples and releases, figures of the evaluation.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    f"--config={ROOT}/configs/digits.py:smoke",
    "--config.autoencoder.block_out_channels=(8, 8)",
    "--config.autoencoder.norm_groups=4",
    "--config.autoencoder.mid_attention=False",
    "--config.autoencoder.steps=12",
    "--config.encode.shard_size=200",
    "--config.model.hidden=16",
    "--config.model.depth=1",
    "--config.model.heads=1",
    "--config.train.steps=24",
    "--config.train.save_every=4",
    "--config.train.log_every=3",
    "--config.train.preview_every=0",
    "--config.sample.num_samples=24",
    "--config.sample.batch_size=4",
    "--config.sample.num_steps=2",
    "--config.evaluate.extractor=random",
    "--config.evaluate.metrics=('fd',)",
)
MOST_KILLS = 8  # a trial; then it may end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Killed:
    """A job of the matrix.

    Attributes:
        remove: what the job makes, removed from a copy of the finished run before a trial.
        writing: glob patterns of what is there only while the job writes, and its name in counts.
        outcome: of a finished workdir, what must be equal to the undisturbed run's.
    """

    remove: tuple[str, ...]
    writing: dict[str, str]
    outcome: Callable[[Path], Any]


def _trained(folder: str, job: str) -> Callable[[Path], Any]:
    def outcome(workdir: Path) -> Any:
        newest = max((p for p in (workdir / folder).iterdir() if p.name.isdigit()), key=_number)
        data = json.loads(next(p for p in (newest / "data").iterdir() if p.is_file()).read_text())
        lines = (workdir / f"logs/{job}.jsonl").read_text().splitlines()
        curve = [{k: json.loads(line)[k] for k in ("step", "loss", "grad_norm")} for line in lines]
        return {"step": newest.name, "data": data, "curve": curve, **_figures(workdir, job)}

    return outcome


def _number(path: Path) -> int:
    return int(path.name)


def _figures(workdir: Path, job: str) -> dict[str, Any]:
    result = json.loads((workdir / f"results/{job}.json").read_text())
    # orbax gives its data files random names.
    result["files"] = [f for f in result.get("files", []) if not f.startswith("0/")]
    timed = ("provenance", "seconds", "mfu", "data_wait")
    kept = {k: v for k, v in result.items() if k not in timed and "per_second" not in k}
    for split in kept.values():  # encode says how many shards were left to write
        if isinstance(split, dict):
            split.pop("shards_written", None)
    return {k: v for k, v in kept.items() if "_ms_" not in k}


def _bytes_of(pattern: str, job: str) -> Callable[[Path], Any]:
    def outcome(workdir: Path) -> Any:
        files = sorted(p for p in workdir.glob(pattern) if p.is_file())
        sums = {str(p.relative_to(workdir)): _sha256(p) for p in files}
        return {"sums": sums, **_figures(workdir, job)}

    return outcome


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _exported(workdir: Path) -> Any:
    import numpy as np
    import orbax.checkpoint as ocp

    params = ocp.StandardCheckpointer().restore(workdir / "release/0/params")
    digest = hashlib.sha256()

    def add(tree: Any) -> None:
        for key in sorted(tree):
            if isinstance(tree[key], dict):
                add(tree[key])
            else:
                digest.update(key.encode() + np.ascontiguousarray(tree[key]).tobytes())

    add(params)
    return {"orbax": digest.hexdigest(), **_bytes_of("release/*", "export")(workdir)}


_SAVE = "*.orbax-checkpoint-tmp*"
JOBS: dict[str, Killed] = {
    "train": Killed(
        remove=("checkpoints", "results/train.json", "logs/train*"),
        writing={f"checkpoints/{_SAVE}": "asynchronous save"},
        outcome=_trained("checkpoints", "train"),
    ),
    "autoencode": Killed(
        remove=("autoencoder", "results/autoencode.json", "logs/autoencode*"),
        writing={f"autoencoder/checkpoints/{_SAVE}": "asynchronous save"},
        outcome=_trained("autoencoder/checkpoints", "autoencode"),
    ),
    "encode": Killed(
        remove=("latents", "results/encode.json"),
        writing={"latents/train/.*.tmp": "shard write", "latents/train/.info-*": "description"},
        outcome=_bytes_of("latents/train/*", "encode"),
    ),
    "sample": Killed(
        remove=("samples", "results/sample.json"),
        writing={"samples/parts-*/*": "part of the samples", "samples/.*.tmp": "samples file"},
        outcome=_bytes_of("samples/samples.npz", "sample"),
    ),
    "evaluate": Killed(
        remove=("results/evaluate.json",),
        writing={"evaluation/*/*": "features on disk", "results/.*.tmp": "result file"},
        outcome=lambda workdir: _figures(workdir, "evaluate"),
    ),
    "export": Killed(
        remove=("release", "results/export.json"),
        writing={f"release*/{_SAVE}": "export", "release*/.*.tmp": "release file"},
        outcome=_exported,
    ),
}


# ---- attempts


def forked(work: Callable[[], Any], log: Path) -> int:
    """The pid of a copy of this process that does `work` and ends with its exit status."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def job_in_fork(workdir: Path, job: str, log: Path, extra: tuple[str, ...] = ()) -> int:
    from lfm_jax import main

    def work() -> None:
        # ml_collections looks for overrides there and not in what it is given.
        sys.argv = ["lfm_jax", *TINY, *extra, f"--workdir={workdir}", f"--job={job}"]
        main.main(main._parse_flags(sys.argv))

    return forked(work, log)


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait(pid: int) -> tuple[int, float]:
    """Exit status (negative: the signal) and CPU seconds."""
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def ended(pid: int) -> bool:
    """Whether the process has ended; it is not yet waited for."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return result is not None


def undisturbed(base: Path, job: str) -> tuple[Any, float]:
    """Outcome and CPU seconds of the job when nothing happens to it."""
    kept = base.parent / f"undisturbed-{job}.json"
    if kept.exists():
        known = json.loads(kept.read_text())
        return known["outcome"], known["seconds"]
    workdir = fresh(base, job)
    status, seconds = wait(job_in_fork(workdir, job, workdir / "log"))
    if status:
        raise SystemExit(f"{job} does not even end undisturbed:\n{(workdir / 'log').read_text()}")
    known = {"outcome": outcome(workdir, job), "seconds": seconds}
    kept.write_text(json.dumps(known))
    shutil.rmtree(workdir)
    return known["outcome"], seconds


def outcome(workdir: Path, job: str) -> Any:
    """In a fork: reading arrays back starts threads, which a process that forks must not have."""
    answer = workdir / "outcome.json"

    def work() -> None:
        answer.write_text(json.dumps(JOBS[job].outcome(workdir)))

    status, _ = wait(forked(work, workdir / "log-outcome"))
    if status:
        return {"error": (workdir / "log-outcome").read_text()[-2000:]}
    return json.loads(answer.read_text())


def fresh(base: Path, job: str) -> Path:
    """A copy of the finished run without what the job makes."""
    workdir = base.parent / f"trial-{job}"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(base, workdir)
    for pattern in JOBS[job].remove:
        for path in workdir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return workdir


def make_base(folder: Path) -> Path:
    """A finished tiny run in `folder`, made once."""
    base = folder / "base"
    for job in ("pipeline", "export"):
        if not (base / f"results/{job}.json").exists():
            status, _ = wait(job_in_fork(base, job, folder / "log"))
            if status:
                raise SystemExit((folder / "log").read_text()[-4000:])
    return base


def killing(
    pid: int, workdir: Path, job: str, number: int, after: float, dice: random.Random
) -> str | None:
    """Send the signal at the chosen moment; what was being written then, None if it was too late.

    Args:
        after: CPU seconds; negative: armed, at the first sight of a temporary file.
    """
    armed_at = None
    sights = dice.randint(1, 3)
    seen: set[str] = set()
    while not ended(pid):
        now = {str(p): name for pattern, name in JOBS[job].writing.items()
               for p in workdir.glob(pattern)}  # fmt: skip
        if after >= 0:
            due = cpu_seconds(pid) >= after
        else:
            seen |= set(now)
            if len(seen) >= sights and now and armed_at is None:
                armed_at = time.perf_counter() + dice.choice([0, 0, 0.002, 0.01, 0.03])
            due = armed_at is not None and time.perf_counter() >= armed_at
        if due:
            os.kill(pid, number)
            return next(iter(now.values()), "computing")
        time.sleep(0.002)
    return None


def trial(base: Path, job: str, number: int, dice: random.Random) -> dict[str, Any]:
    """Kill the job up to `MOST_KILLS` times, let it end, compare.

    Returns:
        "signals" (what was being written at each), "problem" (empty: it survived).
    """
    wanted, seconds = undisturbed(base, job)
    workdir = fresh(base, job)
    expected = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (75,)}[number]
    signals: list[str] = []
    for attempt in range(3 * MOST_KILLS):
        pid = job_in_fork(workdir, job, workdir / "log")
        hit = None
        if len(signals) < MOST_KILLS and attempt < 2 * MOST_KILLS:
            armed = dice.random() < 0.6
            after = -1.0 if armed else dice.uniform(0, 0.9 * seconds)
            hit = killing(pid, workdir, job, number, after, dice)
        status, _ = wait(pid)
        if hit is not None and status in expected:
            signals.append(hit)
        elif status:
            tail = (workdir / "log").read_text()[-1500:]
            return {"signals": signals, "problem": f"exit status {status}: {tail}"}
        else:
            found = outcome(workdir, job)
            problem = "" if found == wanted else f"unequal: {_difference(wanted, found)}"
            shutil.rmtree(workdir)
            return {"signals": signals, "problem": problem}
    return {"signals": signals, "problem": "it did not end"}


def _difference(wanted: Any, found: Any) -> str:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                return f"{key}: {_difference(wanted.get(key), found.get(key))}"
    return f"{str(wanted)[:300]} became {str(found)[:300]}"
