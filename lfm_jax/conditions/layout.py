"""Layout-to-image: classed boxes as context tokens of a network with cross-attention.

    tokens = T(classes, boxes)

(after the layout model of latent diffusion, Rombach et al. 2022, appendix D.3, which latent flow
matching carried along). T is a transformer that is trained with the network. The null condition is
a layout without objects. The order of the objects means nothing, and is shuffled at every visit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, UInt8

from lfm_jax import rng
from lfm_jax.conditions.condition import Arrays
from lfm_jax.conditions.encoders import LayoutEncoder
from lfm_jax.models.conditioning import Cond
from lfm_jax.vae import Codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """See the module's docstring.

    Attributes:
        num_classes, max_objects: of the layouts.
        scheme, width, depth, heads: of the `LayoutEncoder`.
        drop: probability of the null condition in training.
        read: ``indices -> {"boxes", "classes"}``; left out where the arrays are at hand already.
    """

    name: ClassVar[str] = "layout"
    num_classes: int
    max_objects: int
    scheme: str = "boxes"
    width: int = 128
    depth: int = 2
    heads: int = 4
    drop: float = 0.0
    read: Callable[[np.ndarray], dict[str, np.ndarray]] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Boxes in fractions of the image's sides, and their classes (-1: no object)."""
        rows = self.max_objects
        return {"boxes": ((rows, 4), "float32"), "classes": ((rows,), "int32")}

    def prepare(
        self, images: UInt8[np.ndarray, "n h w c"], indices: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The layouts of these images."""
        assert self.read is not None  # who prepares has annotations to read
        return self.read(indices)

    def encode(self, codec: Codec, images: Array, arrays: Arrays) -> Arrays:
        """Nothing: the layout's encoder is trained, so that it cannot be cached."""
        return {}

    def pick(self, batch: Arrays, keys: Key[Array, " b"]) -> Arrays:
        """The objects in another order."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        order = jnp.argsort(rng.uniform(keys, (self.max_objects,)), axis=1)
        return jax.vmap(lambda row, o: jax.tree.map(lambda a: a[o], row))(self.first(batch), order)

    def first(self, arrays: Arrays) -> Arrays:
        """The objects as they are listed."""
        return {"boxes": arrays["boxes"], "classes": arrays["classes"]}

    def encoder(self) -> nn.Module:
        """The `LayoutEncoder`."""
        return LayoutEncoder(
            num_classes=self.num_classes,
            max_objects=self.max_objects,
            scheme=self.scheme,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
        )

    def apply(self, params: Any, picked: Arrays, keep: Bool[Array, " b"]) -> Cond:
        """The tokens."""
        return Cond(tokens=self.encoder().apply({"params": params}, picked, keep))
