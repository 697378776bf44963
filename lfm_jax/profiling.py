"""How long steps take, what they do meanwhile, and what the hardware could do at best.

MFU is ``images/s * FLOPs an image / peak``, the FLOPs by the network's closed form and without
recomputation, so that it compares runs and not compilers.
"""

import functools
import os
import queue
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

# Dense bf16 peaks of one chip in FLOP/s, as the vendors state them.
_PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "TPU v3": 123e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def stated_peak(device_kind: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, or None where it is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in device_kind), None)


def peak_flops() -> float:
    """Peak FLOP/s of all devices: the stated one, or on unknown hardware that of a large matmul."""
    kind = jax.devices()[0].device_kind
    peak = stated_peak(kind)
    if peak:
        return peak * jax.device_count()
    # Virtual CPU devices share the same cores.
    return _measured_matmul() * (1 if kind == "cpu" else jax.device_count())


@functools.cache
def _measured_matmul(side: int = 2048) -> float:
    """FLOP/s of the best of five square float32 products on one device."""
    x = jnp.ones((side, side))
    matmul = jax.jit(lambda a: a @ a)
    matmul(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


class StepTimes:
    """When each step was done on the device, seen by a thread of its own: the loop never waits."""

    def __init__(self) -> None:
        self._results: queue.Queue = queue.Queue()
        self._done: list[float] = []
        self._last: float | None = None
        threading.Thread(target=self._watch, name="step-times", daemon=True).start()

    def add(self, result: Any) -> None:
        """A step was dispatched; `result` is one of its outputs that no later step takes."""
        self._results.put(result)

    def window(self) -> dict[str, float]:
        """Percentiles in ms since the last window; only to be called when all steps are done."""
        self._results.join()
        done, self._done = self._done, []
        times = np.diff(done if self._last is None else [self._last, *done])
        self._last = done[-1] if done else self._last
        if not len(times):
            return {}
        return {f"step_ms_p{p}": 1e3 * float(np.percentile(times, p)) for p in (50, 95)}

    def pause(self) -> None:
        """What happened since the last step's end, such as a save, is no step's time."""
        self._last = time.perf_counter()

    def close(self) -> None:
        self._results.put(None)

    def _watch(self) -> None:
        while (result := self._results.get()) is not None:
            with suppress(Exception):  # the loop meets it too, and says so
                jax.block_until_ready(result)
            self._done.append(time.perf_counter())
            self._results.task_done()


class Trace:
    """A profile of the steps `first` to `last`, for TensorBoard (xplane) and Perfetto.

    Every process writes its own host's; a folder in a bucket gets a copy when the window ends.
    """

    def __init__(self, folder: epath.PathLike, steps: Sequence[int]):
        self._folder, self._local = epath.Path(folder), ""
        self._first, self._last = steps or (1, 0)

    def before(self, step: int) -> None:
        """Begin at the first step of the window."""
        if self._first <= step <= self._last and not self._local:
            remote = "://" in os.fspath(self._folder)
            self._local = tempfile.mkdtemp() if remote else os.fspath(self._folder)
            jax.profiler.start_trace(self._local, create_perfetto_trace=True)

    def after(self, step: int, result: Any) -> None:
        """End when the window's last step is done on the device."""
        if self._local and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if not self._local:
            return
        jax.profiler.stop_trace()
        if self._local != os.fspath(self._folder):
            for path in epath.Path(self._local).glob("**/*"):
                if path.is_file():
                    target = self._folder / path.relative_to(self._local)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.copy(target)
        self._local, self._last = "", 0
