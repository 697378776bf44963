"""A small network that reads a semantic map from an image: the judge of semantic-to-image.

Four 3x3 convolutions, two of them at half the side, and the two scales joined for one product a
pixel. Trained with cross-entropy on real images and their maps, never on samples.
"""

from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer, UInt8
from tqdm import tqdm

_BATCH = 64


class SegmentationNet(nn.Module):
    """``x [b, h, w, c]`` on [-1, 1] -> logits ``[b, h, w, k]``; even sides."""

    num_classes: int
    width: int = 24

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w k"]:
        fine = nn.gelu(nn.Conv(self.width, (3, 3), name="fine1")(x))
        fine = nn.gelu(nn.Conv(self.width, (3, 3), name="fine2")(fine))
        b, h, w, c = fine.shape
        coarse = fine.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        for i in (1, 2):
            coarse = nn.gelu(nn.Conv(2 * self.width, (3, 3), name=f"coarse{i}")(coarse))
        coarse = jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)
        return nn.Dense(self.num_classes, name="head")(jnp.concatenate([fine, coarse], -1))


@flax.struct.dataclass
class Segmenter:
    """The network with its parameters."""

    params: Any
    model: SegmentationNet = flax.struct.field(pytree_node=False)


def train_segmenter(
    images: UInt8[np.ndarray, "n h w c"],
    maps: Integer[np.ndarray, "n h w"],
    *,
    num_classes: int,
    seed: int = 0,
    epochs: float | int = 4,
    learning_rate: float = 3e-3,
    progress: bool = True,
) -> Segmenter:
    """A `Segmenter` of these classes."""
    model = SegmentationNet(num_classes)
    params = model.init(jax.random.key(seed), _scaled(images[:1]))["params"]
    size = min(_BATCH, len(images))
    steps = max(int(epochs * len(images) / size), 1)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, learning_rate))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, ids):
        def loss(params):
            logits = cast(Array, model.apply({"params": params}, _scaled(x)))
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    random = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="segmenter", unit="step", disable=not progress):
        rows = random.choice(len(images), size, replace=False)
        params, state = step(params, state, images[rows], maps[rows].astype(np.int32))
    return Segmenter(params=params, model=model)


@jax.jit
def _ids(segmenter: Segmenter, images):
    logits = segmenter.model.apply({"params": segmenter.params}, _scaled(images))
    return cast(Array, logits).argmax(-1)


def segment(
    segmenter: Segmenter, images: UInt8[np.ndarray, "n h w c"]
) -> UInt8[np.ndarray, "n h w"]:
    """The most probable class of each pixel."""
    parts = [
        np.asarray(_ids(segmenter, images[i : i + _BATCH])).astype(np.uint8)
        for i in range(0, len(images), _BATCH)
    ]
    return np.concatenate(parts)


def _scaled(images: Any) -> Array:
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1
