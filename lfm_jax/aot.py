"""Ahead-of-time compilation: what a program takes on machines that this host does not have.

The ``libtpu`` wheel compiles for any TPU topology on a CPU host. From the compiled program come the
memory a chip needs and the collectives it takes part in (`lfm_jax.collectives`); nothing is
estimated.
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from lfm_jax.errors import UserError

GIB = 2**30
# Memory of one device as the vendors state it; the compiler keeps a few percent for itself.
_HBM = {
    "TPU v2": 8 * GIB,
    "TPU v3": 16 * GIB,
    "TPU v4": 32 * GIB,
    "TPU v5 lite": 16 * GIB,
    "TPU v5p": 95 * GIB,
    "TPU v5": 95 * GIB,
    "TPU v6 lite": 32 * GIB,
}
_EXAMPLES = "v4:2x2x4, v5e:4x4, v5p:2x2x4 or v6e:16x16"


class OutOfMemory(Exception):
    """The compiler found that the program does not fit.

    Attributes:
        needed, available: bytes a device, as far as the compiler says; else 0.
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"{needed} bytes needed, {available} available")
        self.needed, self.available = needed, available


# ---- devices that are not there


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Compile-only devices of a TPU topology such as ``v5p:2x2x4``.

    Args:
        name: generation, colon, chips along each axis of a slice.
        slices: how many such slices, joined by the data-centre network.

    Raises:
        UserError: libtpu is not installed, or there is no such topology.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--config.compile.topology={name}: needs the libtpu wheel; pip install "
            "'lfm_jax[tpu]', or leave the topology unset for the local devices"
        )
    hush_libtpu()
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--config.compile.topology={name}: expected a TPU slice such as {_EXAMPLES} ({reason})"
        ) from error


def hush_libtpu() -> None:
    """Keep libtpu from asking a machine without TPUs what its TPUs are, and from complaining."""
    if any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0", "/dev/vfio/vfio")):
        return
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def device_memory(device: Any) -> int | None:
    """Bytes that programs on this device may use; None where there is no limit of its own."""
    if device.platform == "tpu":
        for kind, size in _HBM.items():
            if kind in device.device_kind:
                return size
    try:
        return device.memory_stats()["bytes_limit"]
    except (AttributeError, KeyError, TypeError, jax.errors.JaxRuntimeError):
        return None


# ---- memory


def compile_lowered(lowered: Any) -> Any:
    """``lowered.compile()``.

    Raises:
        OutOfMemory: the program does not fit into the devices' memory.
    """
    try:
        with _kept_out_of_cache():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(*_sizes(str(error))) from error


@contextmanager
def _kept_out_of_cache() -> Iterator[None]:
    """No entry in jax's persistent cache: one for devices that are not there can be written but
    never read, so that every later compilation of it would warn."""
    name = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, seconds)


def _sizes(message: str) -> tuple[int, int]:
    """(needed, available) bytes from the two forms of the compiler's message."""
    for form in (
        r"\(([\d.]+)([KMG])\) exceeds available \w+ \(([\d.]+)([KMG])\)",
        r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG])",
    ):
        found = re.search(form, message)
        if found:
            unit = {"K": 2**10, "M": 2**20, "G": 2**30}
            a, b, c, d = found.groups()
            return int(float(a) * unit[b]), int(float(c) * unit[d])
    return 0, 0


def memory(compiled: Any) -> dict[str, int]:
    """Bytes a device: arguments, outputs, aliased (outputs in the arguments' place), temporaries,
    code, and the peak of all."""
    stats = compiled.memory_analysis()
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = parts["arguments"] + parts["temporaries"] + parts["outputs"] - parts["aliased"]
    peak = getattr(stats, "peak_memory_in_bytes", 0) or total
    return {**parts, "peak": peak + parts["code"]}


def argument_bytes(tree: Any) -> int:
    """Bytes a device of arrays or `jax.ShapeDtypeStruct`s with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
