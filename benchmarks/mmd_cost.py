"""What a finetuning update costs: memory by number of steps, time against a flow-matching step.

python -m benchmarks.mmd_cost memory        XLA's own account of the compiled program
python -m benchmarks.mmd_cost speed         Fashion-MNIST's network, both steps in turn
python -m benchmarks.mmd_cost throughput    DiT-B/2 at N=4 and a global batch of 2,048: for a GPU
"""

import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from benchmarks.figures import record
from lfm_jax import mmd
from lfm_jax.flow import flow_matching_loss
from lfm_jax.jobs.mmd_features import SHAPES
from lfm_jax.models import count_params, create_model, forward_macs, init_params
from lfm_jax.models.macs import traced_macs
from lfm_jax.sharding import make_mesh
from lfm_jax.state import create_state, make_step
from lfm_jax.vae import AutoencoderKL, init_vae, make_codec

COMMAND = "python -m benchmarks.mmd_cost"
_EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2}
MIB = 2**20


def update_memory(model: Any, shape: tuple, batch: int, steps: int, solver: str) -> int:
    """Bytes of temporaries of the gradient of the MMD loss on raw latents.

    The features are free, so that what is counted is the generator.
    """
    rows = mmd.row_generator(model, [mmd.RawLatents()], shape, steps=(steps,), solver=solver)
    size = shape[0] * shape[1] * shape[2]
    space = mmd.Space(
        kernel=mmd.Gaussian(bandwidth=8.0), mean=jnp.zeros(size), scale=jnp.ones(size)
    )
    space = space.replace(attraction=mmd.mean_row(jnp.ones((4, size))))
    loss = mmd.mmd_loss(rows, {"raw": space})
    params = jax.eval_shape(functools.partial(init_params, model, latent_shape=shape),
                            jax.random.key(0))  # fmt: skip
    example = {"position": jax.ShapeDtypeStruct((batch,), jnp.uint32)}
    gradient = jax.jit(jax.grad(lambda p, b: loss(p, b, jax.random.key(0))[0]))
    return gradient.lower(params, example).compile().memory_analysis().temp_size_in_bytes


def memory(name: str = "DiT-S/2", batch: int = 64, side: int = 32, many: int = 8) -> None:
    """Peak at N = `many` over N = 1, less what a solve must keep."""
    model, shape = create_model(name), (side, side, 4)
    shapes = jax.eval_shape(functools.partial(init_params, model, latent_shape=shape),
                            jax.random.key(0))  # fmt: skip
    gradients = 4 * count_params(shapes)
    latents = many * batch * 4 * shape[0] * shape[1] * shape[2]
    for solver in tqdm(_EVALUATIONS, desc="memory", unit="solver"):
        one, several = (update_memory(model, shape, batch, n, solver) for n in (1, many))
        record(
            "mmd", f"peak memory of N={many} over N=1, less {many} latents and gradients, {solver}",
            (several - latents - gradients) / one, "<=", 1.15, f"{COMMAND} memory",
            f"{name}, batch {batch}, latents {side}x{side}x4: {one / MIB:.0f} MiB at N=1, "
            f"{several / MIB:.0f} at N={many}; {many} latents {latents / MIB:.0f}, a gradient "
            f"{gradients / MIB:.0f}; temporaries of the compiled program",
        )  # fmt: skip


def speed(batch: int = 32, turns: int = 9, calls: int = 8) -> None:
    """Update time over flow-matching step time, calls in turns, beside the closed form."""
    model = create_model("DiT", hidden=192, depth=8, heads=3, patch=2, num_classes=10)
    shape, key = (8, 8, 4), jax.random.key(0)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(16, 32, 64), layers_per_block=1,
        latent_channels=4, norm_groups=8,
    )  # fmt: skip
    codec = make_codec(vae, init_vae(vae, key, 32), scale=1.0, shift=0.0)
    maps = []
    for seed, sizes in enumerate(SHAPES["pixels"]):
        network = mmd.FeatureEncoder(num_classes=10, **sizes)
        params = network.init(jax.random.key(seed), jnp.zeros((1, 32, 32, 1)))["params"]
        extractor = mmd.pixel_extractor(network, params, size=32, channels=1, name=str(seed))
        maps.append(mmd.Decoded(codec=codec, extractor=extractor, name=str(seed),
                                entries=("features", "maps", "logits")))  # fmt: skip
    bank = _bank(maps, shape, 10)
    spaces = {name: mmd.make_space(rows, kernel="energy", joint=64.0, num_classes=10)
              for name, rows in bank.rows.items()}  # fmt: skip
    example = {
        "moments": jnp.zeros((batch, *shape[:2], 2 * shape[2]), jnp.float16),
        "label": jnp.arange(batch) % 10,
        "position": jnp.arange(batch, dtype=jnp.uint32),
    }
    plain = _timer(model, flow_matching_loss(model, scale=1.0, num_classes=10), shape, example)
    forward = forward_macs(model, shape)
    features = traced_macs(
        lambda z: mmd.all_features(maps, z, None, None),
        jax.ShapeDtypeStruct((1, *shape), "float32"),
    )
    for steps in (1, 2, 4):
        rows = mmd.row_generator(model, maps, shape, num_classes=10, steps=(steps,), kept=steps)
        loss = mmd.mmd_loss(rows, spaces, bank=bank, bank_rows=4096, groups=8)
        update = _timer(model, loss, shape, example)
        ratios = [
            sum(update() for _ in range(calls)) / sum(plain() for _ in range(calls))
            for _ in range(turns)
        ]
        predicted = (3 * steps * forward + 2 * features) / (3 * forward)
        record(
            "mmd", f"an update at N={steps} over a flow-matching step", statistics.median(ratios),
            "report", None, f"{COMMAND} speed",
            f"batch {batch}, predicted {predicted:.2f} by the closed form, measured "
            f"{min(ratios):.2f} to {max(ratios):.2f} over {turns} turns of {calls} calls; decoder "
            f"and three feature networks are {features / forward:.2f} forward passes",
        )  # fmt: skip


def throughput(
    name: str = "DiT-B/2", batch: int = 2048, side: int = 32, chunks: int = 16, steps: int = 4
) -> float:
    """Updates a second in latent features, a chunk of the batch in memory at a time."""
    classes, shape = 1000, (side, side, 4)
    model = create_model(name, num_classes=classes, dtype="bfloat16")
    network = mmd.FeatureEncoder(num_classes=classes, levels=3)
    params = network.init(jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    maps = [mmd.LatentMaps(params=params, model=network)]
    bank = _bank(maps, shape, classes)
    spaces = {key: mmd.make_space(rows, kernel="energy", joint=64.0, num_classes=classes)
              for key, rows in bank.rows.items()}  # fmt: skip
    rows = mmd.row_generator(model, maps, shape, num_classes=classes, steps=(steps,))
    loss = mmd.mmd_loss(rows, spaces, bank=bank, bank_rows=4096, chunks=chunks, groups=batch // 32)
    example = {
        "label": jnp.arange(batch) % classes,
        "position": jnp.arange(batch, dtype=jnp.uint32),
    }
    update = _timer(model, loss, shape, example)
    return 1 / statistics.median(update() for _ in range(5))


def on_accelerator() -> None:
    """`throughput` of the size that is asked for, and its record."""
    if jax.default_backend() == "cpu":
        sys.exit("throughput: an update of this size takes an accelerator; only CPUs are here")
    record(
        "mmd", "updates a second, DiT-B/2 at N=4, global batch 2,048", throughput(), "report", None,
        f"{COMMAND} throughput", "bfloat16, 32x32x4 latents, latent features, 16 chunks",
    )  # fmt: skip


def _bank(maps: list, shape: tuple, classes: int, count: int = 8192) -> mmd.Bank:
    latents = jax.random.normal(jax.random.key(1), (count, *shape))
    embed = jax.jit(lambda z: mmd.all_features(maps, z, None, None))
    parts = [embed(latents[i : i + 128]) for i in range(0, count, 128)]
    rows = {name: jax.device_get(jnp.concatenate([p[name] for p in parts])) for name in parts[0]}
    return mmd.make_bank(rows, jax.device_get(jnp.arange(count) % classes), num_classes=classes)


def _timer(model: Any, loss: Any, shape: tuple, example: dict) -> Any:
    tx = optax.adam(1e-4)
    init = functools.partial(init_params, model, jax.random.key(0), shape)
    state = create_state(init, tx, make_mesh(), ema=True)
    step = make_step(loss, tx, jax.random.key(0), ema_decay=0.99)
    held = {"state": step(state, example)[0]}

    def once() -> float:
        begin = time.perf_counter()
        held["state"], metrics = step(held["state"], example)
        jax.block_until_ready(metrics["loss"])
        return time.perf_counter() - begin

    once()
    return once


if __name__ == "__main__":
    {"memory": memory, "speed": speed, "throughput": on_accelerator}[sys.argv[1]]()
