"""One global batch, one loss, one gradient: however many devices hold it."""

import os
import subprocess
import sys

import numpy as np

PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lfm_jax.mmd import Gaussian, Polynomial, mixture, mmd2, within

draw = np.random.default_rng(0)
x, y = (draw.normal(size=(n, 6)).astype(np.float32) for n in (16, 24))
weight = draw.normal(size=(6, 6)).astype(np.float32)
labels = np.arange(16) % 4
kernel = mixture([Gaussian(bandwidth=2.0), Polynomial()])
result = {}
for devices in (1, 2, 8):
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    placement = NamedSharding(mesh, PartitionSpec("data"))
    for block in (0, 5):

        @jax.jit
        def value(weight, x, y, labels):
            dealt = within(x @ weight, kernel, block=block, strata=labels, num_strata=4)
            return mmd2(x @ weight, y, kernel, block=block) + dealt

        found = jax.value_and_grad(value)(weight, *jax.device_put((x, y, labels), placement))
        result[f"value_{devices}_{block}"], result[f"gradient_{devices}_{block}"] = found
np.savez(sys.argv[1], **result)
"""


def test_value_and_gradient_are_those_of_one_device(tmp_path):
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    out = tmp_path / "found.npz"
    subprocess.run([sys.executable, "-c", PROGRAM, str(out)], env=environment, check=True)
    found = np.load(out)
    for devices in (1, 2, 8):
        for block in (0, 5):
            key = f"{devices}_{block}"
            np.testing.assert_allclose(found[f"value_{key}"], found["value_1_0"], rtol=1e-5)
            wanted = found["gradient_1_0"]
            error = np.linalg.norm(found[f"gradient_{key}"] - wanted) / np.linalg.norm(wanted)
            assert error < 1e-6, (key, error)
