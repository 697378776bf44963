"""One sample, one noise, one image: whatever the batch and the number of devices."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lfm_jax import rng
from lfm_jax.flow import NetworkVelocity, classifier_free, sample
from lfm_jax.models import Cond, create_model, init_params

model = create_model("DiT", hidden=32, depth=2, heads=2, patch=2, num_classes=3)
shape = (8, 8, 2)
params = init_params(model, jax.random.key(0), shape)
# Fresh networks answer 0: their last layers start at zero.
leaves, tree = jax.tree.flatten(params)
keys = jax.random.split(jax.random.key(1), len(leaves))
params = tree.unflatten(
    # Weights twice as large make a flow that multiplies the rounding of another topology, and with
    # it whether a step is accepted, a thousandfold; trained ones do not.
    [p + 0.05 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)]
)
result = {}
for devices, batch in ((1, 8), (1, 4), (2, 8), (8, 8), (8, 16)):
    mesh = jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    placement = NamedSharding(mesh, PartitionSpec("data"))

    @jax.jit
    def program(params, index):
        noise = rng.normal(rng.stream_keys(jax.random.key(7), rng.Stream.SAMPLE, index), shape)
        noise = jax.lax.with_sharding_constraint(noise, placement)
        velocity = NetworkVelocity(params=params, model=model, cond=Cond(label=index % 3))
        guided = classifier_free(velocity, num_classes=3, scale=1.5)
        fixed, _ = sample(guided, noise, solver="heun", num_steps=4)
        adaptive, _ = sample(guided, noise, solver="dopri5", rtol=1e-5, atol=1e-5)
        return noise, fixed, adaptive

    parts = []
    for start in range(0, 16, batch):
        index = np.arange(start, start + batch, dtype=np.uint32)
        parts.append(program(params, jax.device_put(index, placement)))
    result[f"{devices}x{batch}"] = [
        np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(3)
    ]
np.savez(sys.argv[1], **{f"{k}_{i}": a for k, v in result.items() for i, a in enumerate(v)})
"""


def test_samples_agree_on_1_2_and_8_devices_and_for_any_batch(tmp_path):
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    environment["JAX_PLATFORMS"] = "cpu"
    out = tmp_path / "samples.npz"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(out)],
        env=environment,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    arrays = np.load(out)
    settings = sorted({name[:-2] for name in arrays.files})
    assert len(settings) == 5
    reference = [arrays[f"1x8_{i}"] for i in range(3)]
    assert reference[1].std() > 0.1
    assert np.abs(reference[1] - reference[0]).max() > 0.1  # the flow moves its noise
    for setting in settings:
        np.testing.assert_array_equal(arrays[f"{setting}_0"], reference[0])
        for i in (1, 2):
            # Of images in [-1, 1], one step of 8 bits is 2/255; 1/255 is half of it.
            np.testing.assert_allclose(arrays[f"{setting}_{i}"], reference[i], atol=1 / 255)
