"""What a compiled program sends between devices, read from the text of its optimised HLO.

Collectives are counted as often as they are executed: those in a loop times its trip count.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


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
