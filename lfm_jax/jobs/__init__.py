"""The verbs of the command line, a file each.

A job module has ``inputs(config, workdir) -> dict``, everything its result depends on as JSON, and
``run(config, workdir) -> dict``, which does the work and returns the figures. What it leaves on
disk so that a killed run goes on, ``clean(config, workdir)`` removes once the result is written.
"""

import copy
import importlib
import os
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lfm_jax import preemption
from lfm_jax.errors import UserError, near
from lfm_jax.lock import held
from lfm_jax.workdir import Workdir, claim, write_result

# name -> (module, what it does in a line)
JOBS: dict[str, tuple[str, str]] = {
    "pipeline": ("pipeline", "what is missing of the five stages below, in order"),
    "autoencode": ("autoencode", "train the small KL autoencoder"),
    "encode": ("encode", "write the latent cache"),
    "train": ("train", "train the velocity network on the cache"),
    "sample": ("sample", "solve the flow, decode, write samples.npz and a grid"),
    "evaluate": ("evaluate", "measure the samples against held-out real images"),
    "edit": ("edit", "move images across the boundary of an attribute, without training"),
    "reconstruct": ("reconstruct", "judge the autoencoder: PSNR, SSIM, rFD, a picture"),
    "classifier": ("classify", "train the classifier of noisy latents, for classifier guidance"),
    "diagnose": ("diagnose", "bound, likelihood, inversion and cost of the trained flow"),
    "reference": ("reference", "write the statistics of real images for later comparisons"),
    "compare": ("compare", "show this run and others side by side on one HTML page"),
    "convert": ("convert", "fill the network with another project's weights"),
    "compile": ("compile", "say what a step takes on a TPU slice, without having one"),
    "export": ("export", "write a release that plain orbax and safetensors open anywhere"),
}


def run_job(name: str, config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Run one job in a workdir and write its result file.

    Raises:
        UserError: an unknown job, or a workdir that another run is in or another config's.
    """
    if name not in JOBS:
        raise UserError(f"--job={name}{near(name, JOBS)}: expected one of {', '.join(JOBS)}")
    if not workdir.strip():
        raise UserError("--workdir is empty: expected a folder, such as runs/digits")
    folder = Workdir(epath.Path(workdir).expanduser())
    job = importlib.import_module(f"lfm_jax.jobs.{JOBS[name][0]}")
    origin = importlib.import_module("lfm_jax.jobs.origin")
    with preemption.stops_at_once(name), held(folder, name):
        claim(folder, config)
        config = copy.deepcopy(config)  # the caller's own stays as it is
        for section, key in ((config, "init"), (config.sample, "weak")):
            section[key] = section[key] and os.path.expanduser(section[key])
        origin.adopt(config, folder)
        return finish(job, name, config, folder, job.run(config, folder))


def finish(
    job: Any, name: str, config: ConfigDict, workdir: Workdir, figures: dict[str, Any]
) -> dict[str, Any]:
    """Write a job's result file; then what it kept in case it was killed is no longer needed."""
    result = write_result(workdir, name, config, job.inputs(config, workdir), figures)
    if hasattr(job, "clean"):
        job.clean(config, workdir)
    return result
