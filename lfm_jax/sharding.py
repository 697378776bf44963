"""One named mesh, and the rules that place arrays on it.

Axes: ``data`` replicates parameters, ``fsdp`` shards them; a batch is split over both. Everything
runs under `jax.jit` with global-batch semantics, so a loss never spells out a collective. Sharding
is inferred by size: of each large array the largest dimension that ``fsdp`` divides is split, small
ones are replicated, because gathering them costs more than holding them.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")
_SMALL = 2**14  # elements; norms, biases and the like stay replicated


def initialize_distributed() -> None:
    """Join the other processes of this run, if the environment says that there are any.

    Must be called before the first use of a device. Slurm, GKE and TPU pods are recognised by jax
    itself; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name the run.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and "JAX_NUM_PROCESSES" in os.environ:
        jax.distributed.initialize(
            address,
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 or "," in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    ):
        jax.distributed.initialize()


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """The mesh ``(data, fsdp)`` over all devices of all processes.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    if data == -1:
        data = devices // fsdp
    if data * fsdp != devices:
        raise UserError(
            f"--config.mesh.data={data} --config.mesh.fsdp={fsdp}: expected a product of "
            f"{devices}, the number of devices (data=-1 takes what fsdp leaves)"
        )
    # Auto: the networks are written for the compiler's own propagation of shardings.
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch(mesh: Mesh, key: str, size: int) -> None:
    """Raise `UserError` unless a batch of `size` splits evenly over the mesh's devices."""
    if size % mesh.size:
        lower, upper = size // mesh.size * mesh.size, -(-size // mesh.size) * mesh.size
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"--config.{key}={size}: expected a multiple of the {mesh.size} devices ({near})"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def state_sharding(abstract: Any, mesh: Mesh) -> Any:
    """Shardings for a pytree of arrays or `jax.ShapeDtypeStruct`, by size (see the module)."""
    size = mesh.shape["fsdp"]

    def place(leaf) -> NamedSharding:
        shape = leaf.shape
        if size == 1 or np.prod(shape, dtype=np.int64) < _SMALL:
            return replicated(mesh)
        for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
            if shape[axis] % size == 0:
                return NamedSharding(mesh, P(*([None] * axis), "fsdp"))
        return replicated(mesh)

    return jax.tree.map(place, abstract)


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
