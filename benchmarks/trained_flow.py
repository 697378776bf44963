"""A trained run on 1, 2 and 8 devices, and what ``--job=diagnose`` found of its flow.

    python -m benchmarks.trained_flow runs/fashion_mnist

Figures go to ``docs/results/sampling.json``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import figures

ROOT = Path(__file__).resolve().parent.parent


def keep(name: str, value: Any, op: str, bound: Any, note: str) -> None:
    """A figure of a trained run."""
    command = "python -m benchmarks.trained_flow runs/fashion_mnist"
    figures.keep("sampling", name, value, op, bound, command, note)


_ON_DEVICES = """
import dataclasses, json, sys
import jax, numpy as np
from etils import epath
from ml_collections import ConfigDict
from lfm_jax import checkpoints, config as config_lib, sharding
from lfm_jax.jobs.generate import Generator
from lfm_jax.workdir import Workdir

workdir, count = Workdir(epath.Path(sys.argv[1])), 16
told = json.loads(workdir.config.read_text())["config"]
config = config_lib.default_config()
for name, section in told.items():
    if isinstance(section, dict):
        for key, value in section.items():
            if key in config[name] and value is not None:
                config[name][key] = tuple(value) if isinstance(value, list) else value
params = checkpoints.load_params(workdir.checkpoints)
labels = (np.arange(count) % max(config.data.num_classes, 1)).astype(np.int32)
for solver, steps, tolerance in (("heun", 16, None), ("bosh3", 1, 1e-3), ("dopri5", 1, 1e-5)):
    config.sample.solver, config.sample.num_steps = solver, steps
    config.sample.rtol = config.sample.atol = tolerance
    made = {}
    for devices, batch in ((1, 16), (2, 8), (8, 16)):
        config.mesh.data = -1
        generator = dataclasses.replace(
            Generator.from_config(config, workdir),
            mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
        )
        parts = [
            generator(params, np.arange(s, s + batch), labels[s : s + batch])
            for s in range(0, count, batch)
        ]
        made[devices, batch] = [np.concatenate([part[i] for part in parts]) for i in (0, 1)]
        steps_taken = np.concatenate([part[2]["steps"] for part in parts]).tolist()
        print(solver, devices, batch, steps_taken, file=sys.stderr, flush=True)
    first = made[1, 16]
    levels = max(int(np.abs(m[0].astype(int) - first[0]).max()) for m in made.values())
    latents = max(float(np.abs(m[1] - first[1]).max()) for m in made.values())
    print(json.dumps([solver, steps, tolerance, levels, latents]), flush=True)
"""


def main(folder: str) -> None:
    """A trained run: images on 1, 2 and 8 devices, and what ``--job=diagnose`` found."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    lines = subprocess.run(
        [sys.executable, "-c", _ON_DEVICES, folder],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.splitlines()
    for line in lines:
        solver, steps, tolerance, levels, latents = json.loads(line)
        how = f"{solver}, rtol {tolerance:g}" if tolerance else f"{solver}, {steps} steps"
        keep(
            f"images on 1, 2 and 8 devices, {how}: largest difference in levels of 255",
            levels,
            "<=",
            1,
            f"16 guided samples in batches of 8 and 16; latents differ by at most {latents:.1e}",
        )
    found = json.loads((Path(folder) / "results" / "diagnose.json").read_text())
    told = f"{found['num_images']} held-out images, step {found['checkpoint_step']}"
    if "bound" in found:
        terms = found["bound"]
        for constant in ("sup_lipschitz", "int_one_sided"):
            keep(
                f"log of the Wasserstein bound on the trained model, by {constant}",
                terms[constant]["log_bound"],
                "report",
                None,
                f"{terms[constant]['verdict']}; {told}",
            )
    if "likelihood" in found:
        bits = found["likelihood"]
        keep(
            "bits per dimension of held-out latents",
            bits["bits_per_dim_unscaled"],
            "report",
            None,
            f"unscaled, {bits['trace']}, standard error {bits['standard_error']:.3f}; {told}",
        )
    if "inversion" in found:
        for row in found["inversion"]["rows"]:
            keep(
                f"inversion and back at {row['nfe']} NFE, error relative to the latents",
                row["relative"],
                "report",
                None,
                f"midpoint, {row['num_steps']} steps each way; {told}",
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
