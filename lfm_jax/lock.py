"""One run at a time in a workdir: a lock of the kernel's, in a bucket a lease (`lfm_jax.lease`)."""

import datetime
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from absl import logging

from lfm_jax import lease
from lfm_jax.errors import UserError
from lfm_jax.workdir import Workdir, on_main_process


@contextmanager
def held(workdir: Workdir, job: str) -> Iterator[None]:
    """Keep other runs out of a workdir while one is in it.

    The lock is the kernel's (``flock``), so that it ends with its process, however that ends; the
    file only says who has it. In a bucket it is an object that is renewed (`lfm_jax.lease`).

    Raises:
        UserError: in every process of the run: another run has the workdir, or it cannot be
            written.
    """
    taken: list[int] = []
    with ExitStack() as leases:
        if "://" in os.fspath(workdir.root):
            on_main_process(lambda: leases.enter_context(lease.held(workdir.lock, job)))
            yield
            return
        on_main_process(lambda: taken.append(_lock(workdir, job)))
    try:
        yield
    finally:
        for handle in taken:
            # Before it is let go, or another run could wait for a file that is no longer there.
            workdir.lock.unlink(missing_ok=True)
            os.close(handle)


def _lock(workdir: Workdir, job: str) -> int:
    path = os.fspath(workdir.lock)
    try:
        workdir.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir.root}: {error.strerror}; expected a folder that can be written"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise UserError(
            f"--workdir={workdir.root} is in use by {holder}; expected a workdir that no other run "
            "is in: wait for it, or use another one"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        logging.warning("%s: this file system has no locks; keep other runs out yourself", path)
    if not _is_at(handle, path):  # it was released and removed between open and lock
        os.close(handle)
        return _lock(workdir, job)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, {job} since {now}".encode())
    return handle


def _is_at(handle: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)
