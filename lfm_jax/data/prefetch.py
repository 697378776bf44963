"""Move batches to the devices ahead of the step that needs them, in a thread of its own."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np


def prefetch(
    iterator: Iterator[dict[str, np.ndarray]], sharding: jax.sharding.Sharding, depth: int = 2
) -> Generator[dict[str, Any], None, None]:
    """Device batches of an iterator of host batches.

    The thread starts with the first `next`; `close()` (or garbage collection) stops it and waits
    for it. An exception of the iterator is raised where its batch would have come, and a finite
    iterator ends.

    Args:
        iterator: this process's host batches, arrays with a leading batch axis.
        sharding: of the global batch; each process gives its share of it.
        depth: batches kept ready on the devices.

    Returns:
        A generator of dicts of global `jax.Array`s.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in iterator:
                placed = {
                    name: jax.make_array_from_process_local_data(sharding, array)
                    for name, array in batch.items()
                }
                if not put(("batch", placed)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    worker = threading.Thread(target=work, name="prefetch", daemon=True)
    worker.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        worker.join()
