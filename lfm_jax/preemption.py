"""What happens on SIGTERM, the notice that the machine is about to be taken away.

Jobs made of work items (shards, batches of samples) stop at once, because what is finished is on
disk already; the training loop finishes its step and saves. Either way the exit status is 75 and
the same command goes on.

In multi-process runs jax's own notifier has the signal: orbax asks it, so that all processes of a
training run agree on a step. Jobs of work items run on there until they are killed.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from lfm_jax.errors import Preempted


@contextmanager
def stops_at_once(job: str) -> Iterator[None]:
    """Inside, SIGTERM raises `Preempted` wherever the main thread is."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"{job}: stopped; what is finished is kept, run the same command to go on")

    with _on_sigterm(stop):
        yield


@contextmanager
def asks_first() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM only sets what the yielded function answers."""
    flag = threading.Event()
    with _on_sigterm(lambda number, frame: flag.set()):
        yield flag.is_set


@contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # Only the main thread may set handlers; a job called from another one goes without.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
