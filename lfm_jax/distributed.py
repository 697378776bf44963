"""The processes of one run: how they find each other, agree, and end together.

The same command runs in every process. Who belongs to the run comes from the environment:

| where | what says so |
|---|---|
| anywhere | JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES, JAX_PROCESS_ID |
| Slurm | SLURM_NTASKS > 1; one task a GPU |
| TPU pods, GKE | TPU_WORKER_HOSTNAMES or MEGASCALE_COORDINATOR_ADDRESS, else the metadata server |

A run has no use for part of itself: whatever ends one process ends all of them, with one line and
within `LOST_AFTER` seconds (a process that cannot find the others: within `CONNECT_WITHIN`).
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from lfm_jax import aot, errors
from lfm_jax.errors import Failed, UserError

# Seconds; LFM_CONNECT_WITHIN and LFM_LOST_AFTER in the environment change them.
CONNECT_WITHIN = 300
LOST_AFTER = 60
_LINGER = 2.0


class _Apart(Failed):
    """The processes did not come together: there is nothing to take leave of."""


def initialize() -> None:
    """Join the other processes of this run, if the environment says that there are any.

    Must be called before the first use of a device.

    Raises:
        UserError: variables that contradict each other.
        Failed: the coordinator does not answer, or not all processes come.
    """
    aot.hush_libtpu()
    options = _from_environment(dict(os.environ))
    if options is None:
        return
    limit = _seconds("LFM_CONNECT_WITHIN", CONNECT_WITHIN)
    options |= {
        "initialization_timeout": limit + 30,
        "heartbeat_timeout_seconds": _seconds("LFM_LOST_AFTER", LOST_AFTER),
        "shutdown_timeout_seconds": _seconds("LFM_LOST_AFTER", LOST_AFTER),
    }
    # On a processor alone the collectives are gloo's; elsewhere the setting is not looked at.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = options.get("coordinator_address", "the cluster's coordinator")
    line = f"{address} did not bring the processes of this run together within {limit} s"
    # The runtime's own limit ends in an abort; this one comes before it.
    timer = threading.Timer(limit, _give_up, (line,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise _Apart(f"{line}: {str(error).splitlines()[0][:200]}") from error
    finally:
        timer.cancel()


def _give_up(line: str) -> None:
    print(f"lfm_jax: {line}", file=sys.stderr, flush=True)
    os._exit(errors.FAILED)


def _from_environment(env: dict[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, or None for a run of one process."""
    explicit = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in explicit if env.get(name)]
    if len(given) == 3:
        try:
            count, index = int(env[explicit[1]]), int(env[explicit[2]])
        except ValueError:
            count, index = 0, 0
        address = env[explicit[0]]
        if not 0 <= index < count or not address.rpartition(":")[2].isdigit():
            told = " ".join(f"{name}={env[name]}" for name in explicit)
            raise UserError(f"{told}: expected host:port, a count, and an index below the count")
        if count == 1:
            return None
        return {"coordinator_address": address, "num_processes": count, "process_id": index}
    if given:
        raise UserError(
            f"{given[0]} is set; expected all of {', '.join(explicit)}, or none where Slurm, GKE "
            "or a TPU pod says who takes part"
        )
    slurm = "SLURM_JOB_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1
    pod = "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env
    # What setup on a pod leaves behind: its hosts are told by the metadata server alone.
    return {} if slurm or pod or env.get("LFM_DISTRIBUTED") == "1" else None


def _seconds(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not (text.isdigit() and int(text) > 0):
        raise UserError(f"{name}={text}: expected a number of seconds")
    return int(text or default)


def agree(config: dict[str, Any], workdir: str) -> None:
    """Check that all processes were given the same config and workdir.

    Raises:
        UserError: they were not, in all processes; the message names process, field and values.
    """
    if jax.process_count() == 1:
        return
    told = json.dumps({"workdir": workdir, "config": config}, sort_keys=True).encode()
    size = int(np.max(multihost_utils.process_allgather(np.int32(len(told)))))
    padded = np.frombuffer(told.ljust(size), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    values = [_flat(json.loads(row.tobytes())) for row in rows]
    for process, value in enumerate(values):
        for key in sorted({*values[0], *value}):
            first, other = values[0].get(key), value.get(key)
            if first != other:
                raise UserError(
                    f"--{key}: process {process} was given {other!r}, process 0 {first!r}; "
                    "expected the same command in every process"
                )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


@contextmanager
def one_end_for_all() -> Iterator[None]:
    """Turn an end on purpose into one line and its exit status, and a lost process into the end.

    Alone, what is no such end is raised on. Among others it is printed, and the process ends at
    once: with the farewell that waits for all, those that wait for this one would wait for long.
    """
    try:
        yield
    except (Exception, errors.Preempted) as error:
        told = errors.ending(error)
        if told is not None and isinstance(error, _Apart):
            print(f"lfm_jax: {told[0]}", file=sys.stderr, flush=True)
            os._exit(told[1])
        if not several():
            if told is None:
                raise
            errors.end(*told)
        if told is not None and isinstance(error, errors.Preempted):
            # Agreed on by all: the farewell comes through.
            errors.end(*told)
        if told is None and _is_lost_peer(error):
            reason = " ".join(str(error).split())[:160]
            told = f"another process of this run is gone ({reason})", errors.FAILED
        _leave(error, told)


def _leave(error: BaseException, told: tuple[str, int] | None) -> NoReturn:
    index = jax.process_index()
    if told is None:
        traceback.print_exception(error)
    else:
        who = f"process {index}: " if index else ""
        print(f"lfm_jax: {who}{told[0]}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if index == 0:
        time.sleep(_LINGER)  # it keeps the run's book: the others end by themselves meanwhile
    os._exit(told[1] if told else errors.FAILED)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether an error of the runtime means that another process is gone."""
    text = str(error).lower()
    words = ("gloo", "connection closed", "connection reset", "heartbeat", "unavailable")
    words = (*words, "coordination", "deadline_exceeded", "barrier", "aborted")
    return isinstance(error, RuntimeError | ValueError) and any(word in text for word in words)


def several() -> bool:
    """Whether this run has other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1
