"""Ahead-of-time compilation: what a program takes on machines that this host does not have.

The ``libtpu`` wheel compiles for any TPU topology on a CPU host. From the compiled program come the
memory a chip needs and the collectives it takes part in; nothing is estimated. Collectives are
counted as often as they are executed: those in a loop times its trip count.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
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
_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class OutOfMemory(Exception):
    """The compiler found that the program does not fit.

    Attributes:
        needed, available: bytes a device, as far as the compiler says; else 0.
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"{needed} bytes needed, {available} available")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collectives:
    """What one device sends around in one kind of collective during one run of a program.

    Attributes:
        count: executions.
        bytes, elements: of the payloads: the larger side of each, operand or result.
    """

    count: int = 0
    bytes: int = 0
    elements: int = 0

    def __add__(self, other: "Collectives") -> "Collectives":
        return Collectives(
            count=self.count + other.count,
            bytes=self.bytes + other.bytes,
            elements=self.elements + other.elements,
        )

    def times(self, n: int) -> "Collectives":
        """The same, executed `n` times."""
        return Collectives(count=self.count * n, bytes=self.bytes * n, elements=self.elements * n)


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
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(*_sizes(str(error))) from error


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


# ---- collectives, read from the text of the optimised program


def collectives(hlo: str) -> dict[str, Collectives]:
    """What each kind of collective of a program moves; kinds that do not occur are left out.

    Args:
        hlo: ``compiled.as_text()``.
    """
    computations, entry = _computations(hlo)
    sizes = {
        name: shape
        for lines in computations.values()
        for name, shape, _ in (_split(line) for line in lines)
    }
    known: dict[str, dict[str, Collectives]] = {}

    def total(name: str) -> dict[str, Collectives]:
        if name not in known:
            sums: dict[str, Collectives] = {}
            for line in computations.get(name, ()):
                for kind, moved in _moved(line, sizes, name):
                    sums[kind] = sums.get(kind, Collectives()) + moved
                for called, trips in _calls(line, computations):
                    for kind, moved in total(called).items():
                        sums[kind] = sums.get(kind, Collectives()) + moved.times(trips)
            known[name] = sums
        return known[name]

    return total(entry)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Name to instruction lines, and the entry's name."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head and not line.startswith(" "):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None and " = " in line:
            lines.append(line.strip())
    return computations, entry


def _split(line: str) -> tuple[str, str, str]:
    """(name, shape, the rest from the operation's name on) of an instruction."""
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    return name.lstrip("%"), rest[:end], rest[end:].lstrip()


def _closing(text: str) -> int:
    """Just behind the parenthesis that closes the first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _moved(line: str, sizes: dict[str, str], computation: str) -> Iterator[tuple[str, Collectives]]:
    _, shape, rest = _split(line)
    operation = rest.partition("(")[0]
    kind = operation.removesuffix("-start")
    if kind not in _KINDS:
        return
    arguments = rest[len(operation) :]
    operands = re.findall(r"%([\w.\-]+)", arguments[: _closing(arguments)])
    given = [_size(sizes.get(operand, "")) for operand in operands]
    sent = tuple(sum(part) for part in zip(*given, strict=True)) or (0, 0)
    result = _size(shape)
    if operation != kind and kind != "all-reduce":
        # The tuple of an asynchronous start holds the operands too.
        result = tuple(a - b for a, b in zip(result, sent, strict=True))
    elements, size = max(sent, result, key=lambda pair: pair[1])
    # TPUs write a reduce-scatter as an all-reduce and a slice in one fused computation.
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    yield kind, Collectives(count=1, bytes=size, elements=elements)


def _size(shape: str) -> tuple[int, int]:
    """(elements, bytes) of the arrays in a shape's text."""
    elements = size = 0
    for dtype, sides in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", shape):
        count = math.prod(int(side) for side in sides.split(",") if side)
        bits = re.search(r"\d+", dtype)
        elements += count
        size += count * (int(bits[0]) if bits else 8) // 8
    return elements, size


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(computation, times) that an instruction runs; reducers of collectives are left out."""
    _, _, rest = _split(line)
    operation = rest.partition("(")[0]
    if operation.removesuffix("-start") in _KINDS or operation.endswith(("-done", "-update")):
        return
    trips = _trips(rest, computations) if operation == "while" else 1
    for key in ("calls", "to_apply", "body", "true_computation", "false_computation"):
        for called in re.findall(rf"\b{key}=%?([\w.\-]+)", rest):
            yield called, trips
    for branches in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", rest):
        for called in re.findall(r"%?([\w.\-]+)", branches):
            yield called, 1


def _trips(rest: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler says, else the constant its counter is compared with.

    A loop whose end depends on data counts once.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", rest)
    lines = computations.get(condition[1], []) if condition else []
    constants = [re.search(r"\bs32\[\]\S* constant\((\d+)\)", line) for line in lines]
    return max((int(found[1]) for found in constants if found), default=1)
