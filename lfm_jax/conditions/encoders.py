"""The trained networks between a condition's arrays and the velocity network."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import normal
from jaxtyping import Array, Bool, Float, Int

from lfm_jax.models import layers

GRID = 90  # positions a side of the ``corners`` vocabulary: floor(sqrt(VOCABULARY))
VOCABULARY = 8192
FREQUENCIES = 6


class MapEncoder(nn.Module):
    """A map of class ids, one-hot, down to the latent's resolution and to a few channels.

    Attributes:
        num_classes: of the map.
        factor: pixels along a latent position's side.
        channels: of the result.
        kind: ``average``: halved by averaging until it fits, then one product without bias (what
            latent flow matching writes down, but leaves at its random start); ``patches``: all
            pixels of a position through a hidden layer and a 3x3 convolution.
        hidden: width of ``patches``.
    """

    num_classes: int
    factor: int
    channels: int
    kind: str = "patches"
    hidden: int = 64

    @nn.compact
    def __call__(self, picked: dict[str, Any], keep: Bool[Array, " b"]) -> Float[Array, "b i j k"]:
        """``picked["map"]`` uint8 ``[b, h, w]``; rows that are not kept have no class anywhere."""
        one_hot = jax.nn.one_hot(picked["map"], self.num_classes)
        one_hot = one_hot * keep[:, None, None, None]
        b, h, w, c = one_hot.shape
        f = self.factor
        if self.kind == "average":
            y = one_hot.reshape(b, h // f, f, w // f, f, c).mean((2, 4))
            return nn.Dense(self.channels, use_bias=False, name="out")(y)
        y = layers.patchify(one_hot, f)
        y = layers.gelu(layers.Dense(self.hidden, name="patch")(y))
        y = y.reshape(b, h // f, w // f, self.hidden)
        y = y + nn.gelu(nn.Conv(self.hidden, (3, 3), name="around")(y))
        return layers.Dense(self.channels, name="out")(y)


class LayoutEncoder(nn.Module):
    """Classed boxes as context tokens, through a pre-norm transformer.

    Attributes:
        num_classes, max_objects: of the layouts.
        scheme: ``boxes``: a token an object, its class's embedding plus a product with the
            sinusoids of its corners; ``corners``: three tokens an object (class, first corner,
            last corner, each a word of one vocabulary on a 90x90 grid) and two for the whole image,
            as in latent flow matching: 92 for 30 objects.
        width, depth, heads: of the transformer; the original has 512, 16, 8.
    """

    num_classes: int
    max_objects: int
    scheme: str = "boxes"
    width: int = 128
    depth: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, picked: dict[str, Any], keep: Bool[Array, " b"]) -> Float[Array, "b n d"]:
        """``boxes`` ``[b, m, 4]`` in [0, 1], ``classes`` ``[b, m]``, -1 for no object."""
        boxes, classes = jnp.asarray(picked["boxes"], jnp.float32), picked["classes"]
        classes = jnp.where(keep[:, None], classes, -1)
        embed = self._corners if self.scheme == "corners" else self._boxes
        x = embed(boxes, classes)
        for i in range(self.depth):
            x = self._block(x, i)
        return nn.LayerNorm(name="norm_out")(x)

    def _boxes(self, boxes: Float[Array, "b m 4"], classes: Int[Array, "b m"]) -> Array:
        present = (classes >= 0)[..., None]
        angles = boxes[..., None] * (np.pi * 2.0 ** np.arange(FREQUENCIES))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        where = layers.Dense(self.width, name="place")(waves.reshape(*boxes.shape[:2], -1))
        table = nn.Embed(
            self.num_classes + 1, self.width, embedding_init=normal(0.5), name="classes"
        )
        # The last row of the table stands for no object.
        return table(jnp.where(classes < 0, self.num_classes, classes)) + present * where

    def _corners(self, boxes: Float[Array, "b m 4"], classes: Int[Array, "b m"]) -> Array:
        words = corner_tokens(boxes, classes)
        table = nn.Embed(VOCABULARY, self.width, embedding_init=normal(0.02), name="words")
        place = self.param("place", normal(0.02), (words.shape[1], self.width))
        return table(words) + place

    def _block(self, x: Float[Array, "b n d"], i: int) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        y = nn.LayerNorm(name=f"norm1_{i}")(x)
        parts = jnp.split(layers.Dense(3 * d, name=f"qkv_{i}")(y), 3, axis=-1)
        q, k, v = (z.reshape(b, n, self.heads, d // self.heads) for z in parts)
        y = layers.attention(q, k, v).reshape(b, n, d)
        x = x + layers.Dense(d, name=f"attention_out_{i}")(y)
        y = layers.Dense(4 * d, name=f"mlp_in_{i}")(nn.LayerNorm(name=f"norm2_{i}")(x))
        return x + layers.Dense(d, name=f"mlp_out_{i}")(layers.gelu(y))


def corner_tokens(
    boxes: Float[Array, "b m 4"], classes: Int[Array, "b m"]
) -> Int[Array, "b 3*m+2"]:
    """Words of the ``corners`` scheme: three an object, then the two corners of the whole image.

    A corner (x, y) is ``90 row + column`` of its place on a 90x90 grid; the last word of the
    vocabulary stands for no object.
    """
    cells = jnp.clip(jnp.floor(boxes * GRID), 0, GRID - 1).astype(jnp.int32)
    first = cells[..., 1] * GRID + cells[..., 0]
    last = cells[..., 3] * GRID + cells[..., 2]
    words = jnp.stack([classes, first, last], axis=-1)
    words = jnp.where((classes < 0)[..., None], VOCABULARY - 1, words)
    b = words.shape[0]
    whole = jnp.broadcast_to(jnp.asarray([0, GRID * GRID - 1], words.dtype), (b, 2))
    return jnp.concatenate([words.reshape(b, -1), whole], axis=1)
