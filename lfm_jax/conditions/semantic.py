"""Semantic-to-image: the network sees, beside ``x_t``, an encoding of a map of class ids.

    channels  [ x_t | C(one-hot map) ]

(Dao et al. 2023, section 4.3, where C is "SpatialRescaler"). C is trained with the network. The
null condition is a map without any class.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Bool, Key, UInt8

from lfm_jax.conditions.condition import Arrays
from lfm_jax.conditions.encoders import MapEncoder
from lfm_jax.models.conditioning import Cond
from lfm_jax.vae import Codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Semantic:
    """See the module's docstring.

    Attributes:
        num_classes: of the maps.
        image_size: side of the maps in pixels.
        factor: pixels along a latent position's side.
        channels, kind, hidden: of the `MapEncoder`.
        drop: probability of the null condition in training.
        read: ``indices -> maps``; left out where the arrays are at hand already.
    """

    name: ClassVar[str] = "semantic"
    num_classes: int
    image_size: int
    factor: int
    channels: int = 16
    kind: str = "patches"
    hidden: int = 64
    drop: float = 0.0
    read: Callable[[np.ndarray], np.ndarray] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The map, a byte a pixel."""
        return {"map": ((self.image_size, self.image_size), "uint8")}

    def prepare(
        self, images: UInt8[np.ndarray, "n h w c"], indices: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The maps of these images."""
        assert self.read is not None  # who prepares has annotations to read
        return {"map": self.read(indices)}

    def encode(self, codec: Codec, images: Array, arrays: Arrays) -> Arrays:
        """Nothing: the map's encoder is trained, so that it cannot be cached."""
        return {}

    def pick(self, batch: Arrays, keys: Key[Array, " b"]) -> Arrays:
        """The map."""
        return self.first(batch)

    def first(self, arrays: Arrays) -> Arrays:
        """The map."""
        return {"map": arrays["map"]}

    def encoder(self) -> nn.Module:
        """The `MapEncoder`."""
        return MapEncoder(
            num_classes=self.num_classes,
            factor=self.factor,
            channels=self.channels,
            kind=self.kind,
            hidden=self.hidden,
        )

    def apply(self, params: Any, picked: Arrays, keep: Bool[Array, " b"]) -> Cond:
        """The encoded map as channels."""
        return Cond(spatial=self.encoder().apply({"params": params}, picked, keep))
