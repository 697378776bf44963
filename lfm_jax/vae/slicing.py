"""Large batches by slices: the memory of a few images instead of all of them.

`jax.lax.map` runs one slice after the other inside one program, so that slicing works under
`jax.jit`. Images do not see each other in this network, so the result is that of the whole batch.

Slice k of n takes images k, k + n, k + 2n, ...: of a batch that is sharded over devices every slice
then lies on all of them, and nothing is sent about.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.vae.autoencoder import AnyArray, DiagonalGaussian


def apply_sliced(
    function: Callable[[Array], Any], x: Float[AnyArray, "b h w c"], *, slice_size: int
) -> Any:
    """``function(x)`` in slices of the batch; a last, smaller slice is filled up with zeros.

    Raises:
        UserError: the slice size is not positive.
    """
    if slice_size < 1:
        raise UserError(f"slice_size: {slice_size}, but it must be at least 1")
    batch = x.shape[0]
    if batch <= slice_size:
        return function(x)
    slices = -(-batch // slice_size)
    padding = ((0, slices * slice_size - batch), *(((0, 0),) * (x.ndim - 1)))
    x = jnp.pad(jnp.asarray(x), padding).reshape(slice_size, slices, *x.shape[1:])
    out = jax.lax.map(function, x.swapaxes(0, 1))
    return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(-1, *y.shape[2:])[:batch], out)


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
