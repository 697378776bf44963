"""Coding large batches in slices: images do not see each other in this network."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from lfm_jax.slicing import apply_sliced
from lfm_jax.vae.autoencoder import AnyArray, DiagonalGaussian


def decode_sliced(
    model: nn.Module, params: Any, z: Float[AnyArray, "b h w c"], *, slice_size: int = 4
) -> Float[Array, "b i j d"]:
    """Decode unscaled latents, ``slice_size`` images at a time."""
    return apply_sliced(
        lambda z: model.apply({"params": params}, z, method="decode"), z, slice_size=slice_size
    )


def encode_sliced(
    model: nn.Module, params: Any, images: Float[AnyArray, "b h w c"], *, slice_size: int = 4
) -> DiagonalGaussian:
    """The posterior of images in [-1, 1], ``slice_size`` at a time."""
    return apply_sliced(
        lambda x: model.apply({"params": params}, x, method="encode"), images, slice_size=slice_size
    )
