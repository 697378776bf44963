"""Two Euler steps of a curved flow, before and after MMD finetuning: a picture of eight Gaussians.

    python -m benchmarks.mmd_toy

The flow is exact (the closed-form velocity of a mixture), so nothing but the step count is to
blame: two steps land between the modes. A small network added to the velocity is all that trains.
"""

import itertools
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.figures import RESULTS, record
from lfm_jax import mmd

RADIUS, STD = 2.0, 0.15
ANGLES = np.arange(8) * np.pi / 4
MEANS = RADIUS * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
COMMAND = "python -m benchmarks.mmd_toy"


@flax.struct.dataclass
class Toy:
    """The exact velocity of the mixture plus a network of three layers that starts at 0."""

    layers: Any
    t_max: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def network_calls(self) -> int:
        """One."""
        return 1

    def __call__(self, x, t):
        """``E[e - x0 | x_t = x]``, and the correction."""
        t = t[:, None]
        variance = ((1 - t) * STD) ** 2 + t**2
        offset = x[:, None] - (1 - t)[..., None] * MEANS[None]
        share = jax.nn.softmax(-(offset**2).sum(-1) / (2 * variance), axis=-1)
        slope = (t - (1 - t) * STD**2) / variance
        exact = (share[..., None] * (slope[..., None] * offset - MEANS[None])).sum(1)
        h = jnp.concatenate([x, t], axis=1)
        for weight, bias in self.layers[:-1]:
            h = jax.nn.silu(h @ weight + bias)
        weight, bias = self.layers[-1]
        return exact + h @ weight + bias


def new_layers(seed: int = 0, width: int = 64) -> list:
    """Weights and biases; the last layer is 0."""
    draw = np.random.default_rng(seed)
    sizes = (3, width, width, 2)
    layers = [
        (draw.normal(size=(a, b)) / np.sqrt(a), np.zeros(b)) for a, b in itertools.pairwise(sizes)
    ]
    layers[-1] = (0 * layers[-1][0], layers[-1][1])
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), layers)


def target_rows(count: int, seed: int = 7) -> np.ndarray:
    """Points of the mixture."""
    draw = np.random.default_rng(seed)
    return (MEANS[draw.integers(8, size=count)] + STD * draw.normal(size=(count, 2))).astype("f4")


def land(layers: list, noise: Any, *, num_steps: int = 2, differentiable: bool = False) -> Any:
    """Where `noise` ends after `num_steps` Euler steps."""
    return mmd.generate(
        Toy(layers=layers), noise, num_steps=num_steps, differentiable=differentiable
    )[0]


def untuned(count: int, *, num_steps: int = 2, seed: int = 3) -> np.ndarray:
    """Samples of the exact flow."""
    noise = jax.random.normal(jax.random.key(seed), (count, 2))
    return np.asarray(land(new_layers(), noise, num_steps=num_steps))


def finetune(
    *, seed: int = 0, steps: int = 2000, batch: int = 512, width: int = 128, count: int = 2000
) -> np.ndarray:
    """Samples of two steps after finetuning."""
    kernel = mmd.make_kernel("gaussian", bandwidth=1.0, factors=(0.1, 0.3, 1.0))
    rows = jnp.asarray(target_rows(20_000, seed=1))
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def step(layers, state, key):
        keys = jax.random.split(key, 2)

        def loss(layers):
            x = land(layers, jax.random.normal(keys[0], (batch, 2)), differentiable=True)
            y = rows[jax.random.randint(keys[1], (4 * batch,), 0, len(rows))]
            return mmd.mmd2(x, y, kernel, real_term=0.0)

        updates, state = tx.update(jax.grad(loss)(layers), state)
        return optax.apply_updates(layers, updates), state

    layers = new_layers(seed, width)
    state = tx.init(layers)
    for i in range(steps):
        layers, state = step(layers, state, jax.random.fold_in(jax.random.key(seed), i))
    return np.asarray(land(layers, jax.random.normal(jax.random.key(3), (count, 2))))


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "data": target_rows(2000),
        "exact flow, 100 steps": untuned(2000, num_steps=100),
        "exact flow, 2 steps": untuned(2000),
        "finetuned, 2 steps": finetune(),
    }
    kernel = mmd.Gaussian(bandwidth=0.5)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), constrained_layout=True)
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        axis.plot(*points.T, ".", ms=2, alpha=0.4)
        axis.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    path = Path(RESULTS) / "mmd" / "toy.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    data = jnp.asarray(target_rows(2000, seed=5))
    distances = {
        name: float(mmd.mmd2(jnp.asarray(points), data, kernel)) for name, points in panels.items()
    }
    ratio = distances["finetuned, 2 steps"] / distances["exact flow, 2 steps"]
    note = ", ".join(f"{name}: {value:.5f}" for name, value in distances.items())
    record(
        "mmd", "2-D toy: MMD^2 of two Euler steps after finetuning over before", ratio, "<=", 0.05,
        COMMAND, f"MMD^2, Gaussian kernel of bandwidth 0.5, 2,000 points: {note}",
    )  # fmt: skip
    print(note)


if __name__ == "__main__":
    main()
