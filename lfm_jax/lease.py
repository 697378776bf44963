"""A lock for folders in a bucket, where there are no file locks: an object with a time in it.

The holder writes its name and until when it holds, and writes again before that time is over. A run
that ends badly leaves a lease that runs out by itself. Two that write at once both read after a
pause what is there: the later one has it, since an object is replaced as a whole.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from lfm_jax.errors import UserError

HOLDS = 120.0  # seconds a lease lasts; renewed after a third of it
_SETTLE = 1.0  # seconds after which a competitor's object would have replaced ours


@contextmanager
def held(
    path: epath.Path, job: str, *, holds: float = HOLDS, settle: float = _SETTLE
) -> Iterator[None]:
    """Hold the lease at `path` inside.

    Raises:
        UserError: another run holds it, naming that run and until when.
    """
    mine = f"process {os.getpid()} on {socket.gethostname()}, {job}"
    token = f"{mine} {time.time_ns()}"
    _refuse_if_taken(path, token)

    def write() -> None:
        lease = {"holder": mine, "token": token, "until": time.time() + holds}
        path.write_bytes(json.dumps(lease).encode())

    write()
    time.sleep(settle)
    _refuse_if_taken(path, token)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(holds / 3):
            write()

    renewer = threading.Thread(target=renew, name="lease", daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        path.unlink(missing_ok=True)


def _refuse_if_taken(path: epath.Path, token: str) -> None:
    if not path.exists():
        return
    try:
        lease = json.loads(path.read_bytes())
        holder, theirs, until = lease["holder"], lease["token"], float(lease["until"])
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return  # half of nothing: it holds no one back
    if theirs != token and until > time.time():
        raise UserError(
            f"--workdir={path.parent} is in use by {holder}; expected a workdir that no other run "
            f"is in: wait for it (a lease that is not renewed ends in {until - time.time():.0f} s)"
        )
