"""The metrics of a training between two logs, and what is said of steps that are not finite."""

from collections import deque
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from lfm_jax import sharding
from lfm_jax.state import Batch, Metrics
from lfm_jax.writers import write_json

_MOST_SKIPPED = 100  # updates in a row without a finite gradient: nothing is being learned
_SPIKE = 10.0  # robust standard deviations above the median of the losses before
_NAMED = 8  # examples of a bad batch that fit into a message


class Curve:
    """The metrics of the steps since the last log, and what to say about bad ones."""

    def __init__(
        self,
        name: str,
        logs: epath.Path,
        manager: Any,
        saved: dict[str, Any],
        *,
        skips: bool,
    ):
        self.loss: float | None = saved.get("loss")  # as it was last logged
        self._window: list[dict[str, float]] = saved.get("window", [])
        self._skipped: int = saved.get("skipped", 0)
        self._name, self._logs, self._manager, self._skips = name, logs, manager, skips
        self._pending: list[tuple[int, Metrics, Batch]] = []
        self._recent: deque[float] = deque(maxlen=200)
        self._in_a_row = 0

    def add(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Keep a step's metrics, still on the device, and which examples it saw."""
        told = {key: batch[key] for key in ("index", "position") if key in batch}
        self._pending.append((step, metrics, told))

    def fetch(self) -> None:
        """Wait for the steps so far; raises `FloatingPointError` on one that is not finite."""
        values = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, told), metrics in zip(self._pending, values, strict=True):
            metrics = {key: float(value) for key, value in metrics.items()}
            if metrics.pop("finite"):
                self._in_a_row = 0
                self._tell_spike(step, metrics["loss"])
                self._window.append(metrics)
                continue
            self._skipped += 1
            self._in_a_row += 1
            if not self._skips or self._in_a_row > _MOST_SKIPPED:
                raise FloatingPointError(self._bad_step(step, metrics, told))
            logging.warning("%s: step %d is not finite and was left out", self._name, step)
        self._pending = []

    def close_window(self) -> dict[str, float]:
        """Means over the window; a new one begins."""
        steps, self._window = self._window, []
        if not steps:  # every one was left out
            return {"loss": float("nan"), **self.counts()}
        means = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
        self.loss = means["loss"]
        return {**means, "loss_max": max(step["loss"] for step in steps), **self.counts()}

    def counts(self) -> dict[str, int]:
        """How many steps were left out, where that is allowed."""
        return {"skipped": self._skipped} if self._skips else {}

    def to_json(self) -> dict[str, Any]:
        """What a resumed run needs to log the same curve."""
        return {"loss": self.loss, "window": self._window, "skipped": self._skipped}

    def _tell_spike(self, step: int, loss: float) -> None:
        if len(self._recent) >= 50:
            middle = float(np.median(self._recent))
            spread = 1.4826 * float(np.median(np.abs(np.array(self._recent) - middle)))
            if loss > middle + _SPIKE * max(spread, 1e-3 * abs(middle)):
                logging.warning(
                    "%s: loss %g at step %d, the median before is %g",
                    *(self._name, loss, step, middle),
                )
        self._recent.append(loss)

    def _bad_step(self, step: int, metrics: dict[str, float], told: Batch) -> str:
        rows = {key: _local_rows(array) for key, array in told.items()}
        path = self._logs / f"nonfinite_{self._name}_{step}.json"
        if sharding.is_main_process():
            # As text where JSON has no number for it.
            bad = {key: str(value) for key, value in metrics.items()}
            write_json(path, {"step": step, **bad, **{k: v.tolist() for k, v in rows.items()}})
        self._manager.wait_until_finished()
        good = self._manager.latest_step()
        named = ", ".join(str(i) for i in rows.get("index", [])[:_NAMED])
        return (
            f"{self._name}: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g} at "
            f"step {step} on examples {named}, ... (all in {path}); "
            + (f"the newest good checkpoint is step {good}" if good else "no checkpoint before it")
            + ("" if self._skips else "; --config.train.nonfinite=skip leaves such steps out")
        )


def _local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch that this process holds."""
    return np.unique(np.concatenate([np.asarray(s.data) for s in array.addressable_shards]))
