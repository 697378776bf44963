"""Seconds of a finetuning, over all the processes that went on with it."""

import dataclasses
import json
import time
from typing import Any

from etils import epath

from lfm_jax import checkpoints, sharding
from lfm_jax.workdir import Workdir
from lfm_jax.writers import write_json


@dataclasses.dataclass(frozen=True)
class Clock:
    """What earlier processes took and when this one began.

    Attributes:
        path: of the file between them.
        record: what the run depends on (that of `fit`); seconds of another run do not count.
        earlier: seconds.
        begin: by `time.perf_counter`.
    """

    path: epath.Path
    record: dict[str, Any]
    earlier: float
    begin: float

    def seconds(self) -> float:
        """So far."""
        return self.earlier + time.perf_counter() - self.begin

    def keep(self) -> None:
        """Write it down for whoever goes on; a killed process loses what came after."""
        if sharding.is_main_process():
            write_json(self.path, {"record": self.record, "seconds": self.seconds()})


def start(workdir: Workdir, record: dict[str, Any]) -> Clock:
    """A clock that goes on from the seconds of a run that left a state, or from 0."""
    path, earlier = workdir.logs / "seconds.json", 0.0
    if checkpoints.latest_step(workdir.root / "finetune") is not None:
        try:
            logged = json.loads(path.read_text())
            earlier = float(logged["seconds"]) if logged["record"] == record else 0.0
        except (OSError, ValueError, KeyError, TypeError):
            pass  # of a run before there was such a file
    return Clock(path=path, record=record, earlier=earlier, begin=time.perf_counter())
