"""Images read ahead of the device: in a thread, or decoded and cropped in worker processes.

A photograph costs a core some 10 ms to decode and crop, an accelerator encodes hundreds in that
time: sources of files want processes. They are spawned, not forked (JAX has threads), open the
source for themselves, and end with the process that started them.
"""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from lfm_jax.data.images import open_images
from lfm_jax.data.source import ImageSource
from lfm_jax.errors import UserError

IN_MEMORY = ("digits", "idx", "synthetic")  # kinds of sources with nothing to decode
_WORTH_IT = 4096  # images; for fewer the processes' start takes longer than the work
_MOST = 16

_SOURCE: ImageSource | None = None  # of a worker process


def choose_workers(workers: int, kind: str, count: int) -> int:
    """How many processes to start; -1 decides by the machine's cores and the kind of source."""
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0))
    few = kind in IN_MEMORY or count < _WORTH_IT
    return 0 if few or cores < 2 else min(cores, _MOST)


def batches_ahead(
    source: ImageSource,
    batches: Sequence[np.ndarray],
    *,
    workers: int = 0,
    options: dict[str, Any] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """``source.batch(indices)`` for each of `batches`, in order, read ahead.

    Args:
        source: the images.
        batches: the indices of each batch, integers.
        workers: processes; 0 reads ahead in one thread.
        options: of `open_images`, with which each process opens `source` for itself.

    Raises:
        UserError: an image that cannot be read; a process that was killed.
    """
    pool: Executor
    if workers:
        assert options is not None  # a process cannot be handed `source`
        pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_open,
            initargs=(options,),
        )
        read, depth = _read, 2 * workers
    else:
        pool, read, depth = ThreadPoolExecutor(1, "read-ahead"), source.batch, 2
    try:
        yield from _in_order(pool, read, batches, depth)
    except BrokenProcessPool as error:
        raise UserError(
            f"encode.workers={workers}: a reading process was killed; expected memory for all of "
            "them: fewer workers or a smaller encode.batch_size"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: Executor, read: Callable[..., Any], batches: Sequence[np.ndarray], depth: int
) -> Iterator[dict[str, np.ndarray]]:
    waiting: collections.deque[Future] = collections.deque()
    for indices in batches:
        waiting.append(pool.submit(read, indices))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _open(options: dict[str, Any]) -> None:
    """In a new worker: open the source, and end when the parent does, however that ends."""
    global _SOURCE
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _SOURCE = open_images(**options)


def _read(indices: np.ndarray) -> dict[str, np.ndarray]:
    assert _SOURCE is not None
    return _SOURCE.batch(indices)
