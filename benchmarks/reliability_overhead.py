"""What an asynchronous checkpoint costs the steps around it.

Windows of `steps` updates of the digits' DiT alternate: without a checkpoint, with one begun at
their first step as the training loop does it (metrics fetched, arrays summed on the device), and
with one that is waited for. The overhead is that of a checkpoint every `steps` updates.
"""

import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("none", "asynchronous", "waited for")


def windows(folder: Path, *, steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every window, by kind."""
    import jax
    import jax.numpy as jnp
    from tqdm import tqdm

    from lfm_jax import checkpoints, flow, models, optim, sharding
    from lfm_jax.state import create_state, make_step

    model = models.create_model("DiT", hidden=96, depth=6, heads=3, patch=1, num_classes=10)
    key, mesh = jax.random.key(0), sharding.make_mesh()
    tx = optim.adamw(optim.learning_rate(1e-3, steps=1000), grad_clip=1.0)
    state = create_state(lambda: models.init_params(model, key, (4, 4, 4)), tx, mesh, ema=True)
    step = make_step(
        flow.flow_matching_loss(model, scale=1.0, num_classes=10), tx, key, ema_decay=0.999
    )
    rng = np.random.default_rng(0)
    batch = {
        "moments": jnp.asarray(rng.normal(size=(64, 4, 4, 8)).astype(np.float16)),
        "label": jnp.asarray(rng.integers(0, 10, 64), jnp.int32),
        "position": jnp.arange(64, dtype=jnp.uint32),
    }
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    number = 0
    with checkpoints.open_manager(folder, keep=2) as manager:
        for repeat in tqdm(range(repeats + 1), desc="overhead"):
            for kind in KINDS:
                begin = time.perf_counter()
                for i in range(steps):
                    state, metrics = step(state, batch)
                    if i == 0 and kind != "none":
                        jax.device_get(metrics)
                        number += 1
                        checkpoints.save(manager, number, state, data={}, config={})
                        if kind == "waited for":
                            manager.wait_until_finished()
                jax.block_until_ready(state)
                if repeat:  # the first round compiles
                    times[kind].append(time.perf_counter() - begin)
                manager.wait_until_finished()
    return times


def overhead(times: dict[str, list[float]], kind: str) -> float:
    """Percent over the windows without a checkpoint, by medians."""
    return 100 * (float(np.median(times[kind])) / float(np.median(times["none"])) - 1)
