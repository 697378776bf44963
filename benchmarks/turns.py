"""Two or more sides take turns on one machine, so that its moods meet them alike.

Every call is made twice and the second one counted: in the first, a side takes back the memory and
the cores that the other has just used, which no training loop does.
"""

import time
from collections.abc import Callable

import numpy as np


def take_turns(
    sides: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float | np.ndarray] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds of each side's counted calls, ``[repeats, ...]``, after a turn that compiles.

    Args:
        sides: what to call, by name; a call returns when its work is done.
        clock: the time now, or an array of several (wall and CPU, say), which stands last.
    """
    times: dict[str, list] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, call in sides.items():
            call()
            start = clock()
            call()
            if turn:
                times[name].append(clock() - start)
    return {name: np.asarray(kept) for name, kept in times.items()}
