"""One named mesh, and the rules that place arrays on it.

Axes: ``data`` replicates parameters, ``fsdp`` shards them, ``tensor`` shards the products
themselves; a batch is split over data x fsdp. Everything runs under `jax.jit` with global-batch
semantics, so a loss never spells out a collective, and a layout changes the speed of a run but not
what it computes.

A parameter's layout is that of the first rule whose regular expression is found in its path, else
it goes by size: the largest dimension over ``tensor``, the next one over ``fsdp`` (for a
transformer that is Megatron's column-then-row split), small arrays replicated, because gathering
them costs more than holding them. Optimizer moments and averages have their parameter's path as a
suffix and so its layout.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
_SMALL = 2**14  # elements; norms, biases and the like stay replicated

# (regular expression, one axis name or None a dimension)
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """The mesh ``(data, fsdp, tensor)``.

    Where the devices come in slices (TPU slices, GPU hosts) that only a slower network joins,
    ``data`` crosses that network first, ``fsdp`` only when ``data`` has too few parts, ``tensor``
    never.

    Args:
        data, fsdp, tensor: devices along each axis; data=-1 takes what the others leave.
        devices: default all devices of all processes.

    Raises:
        UserError: the axes do not multiply to the number of devices, or slices cut an axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = len(devices) // (fsdp * tensor)
    shape = (data, fsdp, tensor)
    flags = " ".join(f"--config.mesh.{k}={v}" for k, v in zip(AXES, shape, strict=True))
    if math.prod(shape) != len(devices):
        raise UserError(
            f"{flags}: expected a product of {len(devices)}, the number of devices "
            "(data=-1 takes what the others leave)"
        )
    # Auto: the networks are written for the compiler's own propagation of shardings.
    return Mesh(_arranged(shape, devices, flags), AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(shape: tuple[int, int, int], devices: list[Any], flags: str) -> np.ndarray:
    """The devices in the mesh's order, neighbours on an axis being close in the network."""
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = shape
    across = math.gcd(data, len(slices))
    rest = len(slices) // across
    if fsdp % rest or len(set(slices.values())) > 1:
        raise UserError(
            f"{flags}: {len(slices)} slices of {sorted(set(slices.values()))} devices; expected "
            "slices of one size and data x fsdp to be a multiple of their number"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // across, fsdp // rest, tensor),
        (across, rest, 1),
        devices,
        allow_split_physical_axes=True,
    )


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh | AbstractMesh, key: str, size: int) -> None:
    """Raise `UserError` unless a batch of `size` splits evenly over the mesh."""
    parts = batch_parts(mesh)
    if size % parts:
        lower, upper = size // parts * parts, -(-size // parts) * parts
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"--config.{key}={size}: expected a multiple of the {parts} devices that share a "
            f"batch ({near})"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data x fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def state_sharding(abstract: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Shardings for a pytree of arrays or `jax.ShapeDtypeStruct`; see the module.

    Args:
        rules: pairs such as ``("mlp_in/kernel", (None, "fsdp", "tensor"))``; axes that are not
            named for trailing dimensions are None.

    Raises:
        UserError: a rule that fits no array, names no axis, or whose axis does not divide.
    """
    used: set[str] = set()

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axes in rules:
            if re.search(pattern, name):
                used.add(pattern)
                _check_rule(mesh, pattern, axes, name, leaf.shape)
                return NamedSharding(mesh, P(*axes))
        return NamedSharding(mesh, _by_size(leaf.shape, mesh))

    placed = jax.tree_util.tree_map_with_path(place, abstract)
    for pattern, _ in rules:
        if pattern not in used:
            raise UserError(f"--config.mesh.rules: {pattern!r} is found in no parameter's path")
    return placed


def gathered(tree: Any, shardings: Any) -> Any:
    """Inside a program: arrays that lie as `shardings` say, made whole along ``fsdp``.

    Before they are used. Left to itself the compiler takes a parameter that is split like the
    batch for a split product, and sends activations around instead: of a DiT-XL/2 nine times as
    much as the parameters are.
    """

    def one(x: jax.Array, placed: NamedSharding) -> jax.Array:
        if "fsdp" not in placed.spec or placed.mesh.shape["fsdp"] == 1:
            return x
        spec = P(*(None if axis == "fsdp" else axis for axis in placed.spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(placed.mesh, spec))

    return jax.tree.map(one, tree, shardings)


def rules(value: Any) -> Rules:
    """The rules of a config's ``mesh.rules``, checked.

    Raises:
        UserError: not pairs of a regular expression and axes.
    """
    try:
        pairs = tuple((re.compile(pattern).pattern, tuple(axes)) for pattern, axes in value)
    except (TypeError, ValueError, re.error) as error:
        raise UserError(
            f"--config.mesh.rules={value}: expected pairs such as "
            f"(('mlp_in/kernel', (None, 'fsdp', 'tensor')),) ({error})"
        ) from error
    return pairs


def _by_size(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape) >= _SMALL:
        for axis in ("tensor", "fsdp"):
            if mesh.shape[axis] > 1:
                for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
                    if spec[i] is None and shape[i] % mesh.shape[axis] == 0:
                        spec[i] = axis
                        break
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def _check_rule(
    mesh: Mesh, pattern: str, axes: Sequence[str | None], name: str, shape: tuple[int, ...]
) -> None:
    rule = f"--config.mesh.rules: ({pattern!r}, {tuple(axes)!r})"
    named = [axis for axis in axes if axis is not None]
    if not set(named) <= set(AXES) or len(set(named)) < len(named):
        raise UserError(f"{rule}: expected each of {', '.join(AXES)} at most once, or None")
    if len(axes) > len(shape) or any(
        axis and size % mesh.shape[axis] for size, axis in zip(shape, axes, strict=False)
    ):
        raise UserError(
            f"{rule} does not divide {name} of shape {shape} on the mesh {dict(mesh.shape)}"
        )


def fetch(tree: Any) -> Any:
    """A pytree of device arrays as host numpy, gathered over processes where that is needed."""

    def one(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array.addressable_data(0) if array.is_fully_replicated else array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(one, tree)


def is_main_process() -> bool:
    """Whether this process writes logs, pictures and small files."""
    return jax.process_index() == 0
