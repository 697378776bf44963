"""Inpainting: the network sees, beside ``x_t``, the latent of the masked image and the mask.

    channels  [ x_t | z_masked | mask ],    z_masked = E(where(mask, fill, image)), mask = 1: hole

(Dao et al. 2023, section 4.3). The mask's channel is +1 in the hole and -1 outside: the nearest
pixel of each latent position as in the paper, or all of its pixels (``mask_channels="pixels"``, as
many channels as a latent position has pixels). The null condition is a hole everywhere.

Encoding the masked image belongs to the encode job: of each image `variants` masks and the means of
their masked latents are stored, and a visit picks one. What is not in the hole is known, so results
are put together from both (`composite`).
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from lfm_jax import rng
from lfm_jax.conditions import masks
from lfm_jax.conditions.condition import Arrays
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.layers import patchify
from lfm_jax.vae import Codec
from lfm_jax.vae.autoencoder import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpainting:
    """See the module's docstring.

    Attributes:
        masks: a choice of `lfm_jax.conditions.masks`.
        seed: of the masks.
        variants: masks an image.
        image_size: side in pixels.
        latent_shape: (h, w, c).
        scale, shift: of the latents.
        fill: value of the hole's pixels before encoding; -1 is black, as in the paper.
        mask_channels: ``nearest`` or ``pixels``.
        drop: probability of the null condition in training.
    """

    name: ClassVar[str] = "inpainting"
    masks: str
    image_size: int
    latent_shape: tuple[int, int, int]
    scale: float
    shift: float
    seed: int = 0
    variants: int = 1
    fill: float = -1.0
    mask_channels: str = "nearest"
    drop: float = 0.0

    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Packed masks and the masked images' mean latents (unscaled), `variants` of each."""
        packed = -(-(self.image_size**2) // 8)
        return {
            "mask": ((self.variants, packed), "uint8"),
            "masked": ((self.variants, *self.latent_shape), "float16"),
        }

    def prepare(
        self, images: UInt8[np.ndarray, "n h w c"], indices: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The packed masks."""
        drawn = masks.draw_masks(self.masks, self.seed, indices, self.variants, self.image_size)
        return {"mask": masks.pack(drawn)}

    def encode(self, codec: Codec, images: Float[Array, "n h w c"], arrays: Arrays) -> Arrays:
        """Mean latents of the masked images."""
        holes = self.unpacked(arrays["mask"])

        def one(hole: Bool[Array, "n h w"]) -> Float[Array, "n i j d"]:
            moments = codec.encode_moments(jnp.where(hole[..., None], self.fill, images))
            return moments[..., : codec.latent_channels]

        masked = jax.lax.map(one, jnp.moveaxis(holes, 1, 0))
        return {"masked": jnp.moveaxis(masked, 0, 1)}

    def pick(self, batch: Arrays, keys: Key[Array, " b"]) -> Arrays:
        """One of the variants."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        which = jnp.floor(rng.uniform(keys) * self.variants).astype(jnp.int32)
        return {name: _rows(batch[name], which) for name in ("mask", "masked")}

    def first(self, arrays: Arrays) -> Arrays:
        """The first variant."""
        return {name: arrays[name][:, 0] for name in ("mask", "masked")}

    def encoder(self) -> nn.Module | None:
        """None: the autoencoder is fixed."""
        return None

    def apply(self, params: Any, picked: Arrays, keep: Bool[Array, " b"]) -> Cond:
        """The masked latent and the mask as channels."""
        del params
        kept = keep[:, None, None, None]
        latents = (picked["masked"].astype(jnp.float32) - self.shift) * self.scale
        hole = self.unpacked(picked["mask"])[..., None]
        factor = self.image_size // self.latent_shape[0]
        if self.mask_channels == "nearest":
            hole = hole[:, ::factor, ::factor]
        else:
            height, width, _ = self.latent_shape
            hole = patchify(hole.astype(jnp.float32), factor)
            hole = hole.reshape(-1, height, width, factor**2)
        signs = jnp.where(hole > 0, 1.0, -1.0)
        channels = [jnp.where(kept, latents, 0.0), jnp.where(kept, signs, 1.0)]
        return Cond(spatial=jnp.concatenate(channels, axis=-1))

    def unpacked(self, packed: UInt8[AnyArray, "*n bytes"]) -> Bool[Array, "*n h w"]:
        """The masks again, on the device."""
        bits = (jnp.asarray(packed)[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)) & 1
        side = self.image_size
        flat = bits.reshape(*packed.shape[:-1], -1)[..., : side * side]
        return flat.reshape(*packed.shape[:-1], side, side).astype(bool)


def composite(
    generated: UInt8[np.ndarray, "n h w c"],
    truth: UInt8[np.ndarray, "n h w c"],
    hole: Bool[np.ndarray, "n h w"],
) -> UInt8[np.ndarray, "n h w c"]:
    """The generated pixels in the hole, the known ones elsewhere, bit for bit."""
    return np.where(hole[..., None], generated, truth)


def _rows(array: AnyArray, which: Array) -> Array:
    return jax.vmap(lambda row, k: row[k])(array, which)
