"""The verbs of the command line, a file each.

A job module has ``inputs(config, workdir) -> dict``, everything its result depends on as JSON, and
``run(config, workdir) -> dict``, which does the work and returns the figures.
"""

import importlib
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lfm_jax.errors import UserError
from lfm_jax.workdir import Workdir, claim, write_result

# name -> (module, what it does in a line)
JOBS: dict[str, tuple[str, str]] = {
    "pipeline": ("pipeline", "what is missing of the five stages below, in order"),
    "autoencode": ("autoencode", "train the small KL autoencoder"),
    "encode": ("encode", "write the latent cache"),
    "train": ("train", "train the velocity network on the cache"),
    "sample": ("sample", "solve the flow, decode, write samples.npz and a grid"),
    "evaluate": ("evaluate", "measure the samples against held-out real images"),
    "reference": ("reference", "write the statistics of real images for later comparisons"),
    "compare": ("compare", "show this run and others side by side on one HTML page"),
    "convert": ("convert", "fill the network with another project's weights"),
    "export": ("export", "write a release that plain orbax and safetensors open anywhere"),
}


def run_job(name: str, config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Run one job in a workdir and write its result file.

    Raises:
        UserError: an unknown job, or a workdir that holds another config's run.
    """
    if name not in JOBS:
        raise UserError(f"--job={name}: expected one of {', '.join(JOBS)}")
    folder = Workdir(epath.Path(workdir))
    job = importlib.import_module(f"lfm_jax.jobs.{JOBS[name][0]}")
    claim(folder, config)
    figures = job.run(config, folder)
    return write_result(folder, name, config, job.inputs(config, folder), figures)
