"""SIGKILL and SIGTERM at random moments, then the same command again, until it ends: is all equal?

Every attempt is a fork of one process that has imported everything, so that it costs a second or
two of CPU; it runs `lfm_jax.main` as a shell would. Some of the moments are uniform over the CPU
time of the job, the others are armed: the attempt dies when a temporary file or folder of the job
is seen, which is in the middle of an asynchronous save, of a shard, of a part of the samples, of an
export. Only what dies inside its job is counted: a killed job leaves its lock behind, a terminated
one exits with 75. An attempt that ends is compared with the undisturbed run.
"""

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

from benchmarks.reliability_jobs import JOBS, TINY

MOST_KILLS = 8  # a trial; then it may end
_ARMED = 0.6  # share of the moments


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


def main_in_fork(arguments: list[str], log: Path) -> int:
    from lfm_jax import main

    def work() -> None:
        # ml_collections looks for overrides there and not in what it is given.
        sys.argv = ["lfm_jax", *arguments]
        main.main(main._parse_flags(sys.argv))

    return forked(work, log)


def attempt(base: Path, workdir: Path, job: str) -> int:
    return main_in_fork(JOBS[job].command(base, workdir), workdir / "log")


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_job(pid: int, workdir: Path) -> bool:
    """Whether the process has the workdir's lock, or died with it."""
    try:
        return (workdir / "lock").read_text().startswith(f"process {pid} ")
    except FileNotFoundError:
        return False


def wait(pid: int) -> int:
    """Exit status; negative: the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended(pid: int) -> bool:
    """Whether the process has ended; it is not yet waited for."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return result is not None


def undisturbed(base: Path, job: str) -> tuple[Any, float]:
    """Outcome of the job when nothing happens to it, and its CPU seconds with compiled programs."""
    kept = base.parent / f"undisturbed-{job}.json"
    if kept.exists():
        known = json.loads(kept.read_text())
        return known["outcome"], known["seconds"]
    workdir = base.parent / f"trial-{job}"
    outcomes, seconds = [], 0.0
    for _ in range(2):  # the first one compiles
        JOBS[job].fresh(base, workdir)
        pid = attempt(base, workdir, job)
        began, last = None, 0.0
        while not ended(pid):
            last = cpu_seconds(pid)
            if began is None and in_job(pid, workdir):
                began = last
            time.sleep(0.01)
        if wait(pid):
            told = (workdir / "log").read_text()
            raise SystemExit(f"{job} does not even end undisturbed:\n{told}")
        seconds = last - (began or 0.0)
        outcomes.append(outcome(workdir, job))
    if outcomes[0] != outcomes[1]:
        raise SystemExit(f"{job} undisturbed: {_difference(*outcomes)}")
    kept.write_text(json.dumps({"outcome": outcomes[0], "seconds": seconds}))
    shutil.rmtree(workdir)
    return outcomes[0], seconds


def outcome(workdir: Path, job: str) -> Any:
    """In a fork: reading arrays back starts threads, which a process that forks must not have."""
    answer = workdir / "outcome.json"

    def work() -> None:
        answer.write_text(json.dumps(JOBS[job].outcome(workdir)))

    if wait(forked(work, workdir / "log-outcome")):
        return {"error": (workdir / "log-outcome").read_text()[-2000:]}
    return json.loads(answer.read_text())


def make_base(folder: Path) -> Path:
    """A finished tiny run in `folder`, made once."""
    base = folder / "base"
    for job in ("pipeline", "export"):
        if not (base / f"results/{job}.json").exists():
            arguments = [*TINY, f"--workdir={base}", f"--job={job}"]
            if wait(main_in_fork(arguments, folder / "log")):
                raise SystemExit((folder / "log").read_text()[-4000:])
    return base


def killing(
    pid: int, workdir: Path, job: str, number: int, after: float, dice: random.Random
) -> str | None:
    """Send the signal at the chosen moment; what was being written then, None if it was too late.

    Args:
        after: CPU seconds inside the job; negative: armed, at the first sight of a temporary file.
    """
    began, armed_at = None, None
    sights = dice.randint(1, 3)
    seen: set[str] = set()
    while not ended(pid):
        if began is None:
            began = cpu_seconds(pid) if in_job(pid, workdir) else None
            time.sleep(0.002)
            continue
        now = {str(p): name for pattern, name in JOBS[job].writing.items()
               for p in workdir.glob(pattern)}  # fmt: skip
        if after >= 0:
            due = cpu_seconds(pid) - began >= after
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
    workdir = base.parent / f"trial-{job}"
    JOBS[job].fresh(base, workdir)
    signals: list[str] = []
    for number_of_attempt in range(3 * MOST_KILLS):
        pid = attempt(base, workdir, job)
        moment = None
        if len(signals) < MOST_KILLS and number_of_attempt < 2 * MOST_KILLS:
            after = -1.0 if dice.random() < _ARMED else dice.uniform(0, 0.8 * seconds)
            moment = killing(pid, workdir, job, number, after, dice)
        status = wait(pid)
        hit = status == 75 if number == signal.SIGTERM else in_job(pid, workdir)
        if moment is not None and (hit or status == -number):
            signals += [moment] if hit else []
        elif status:
            tail = (workdir / "log").read_text()[-1500:]
            return {"signals": signals, "problem": f"exit status {status}: {tail}"}
        else:
            found = outcome(workdir, job)
            problem = "" if found == wanted else f"unequal: {_difference(wanted, found)}"
            if not problem:
                shutil.rmtree(workdir)
            return {"signals": signals, "problem": problem}
    return {"signals": signals, "problem": "it did not end"}


def _difference(wanted: Any, found: Any) -> str:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                return f"{key}: {_difference(wanted.get(key), found.get(key))}"
    return f"{str(wanted)[:300]} became {str(found)[:300]}"
