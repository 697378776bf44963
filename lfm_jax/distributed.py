"""Joining the processes of a run."""

import os

import jax


def initialize() -> None:
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
