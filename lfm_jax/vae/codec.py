"""A codec is what jobs see of an autoencoder: moments in, scaled latents out, images back.

Scaled latents are ``z = (sample - shift) * scale``; decoding undoes it, ``sample = z / scale +
shift``. A codec is a pytree whose leaves are the parameters, so it goes into `jax.jit` as an
argument and new weights do not compile again. `identity_codec` has the same interface in pixel
space, so that one training loop compares both.
"""

import hashlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lfm_jax.errors import UserError
from lfm_jax.vae.autoencoder import (
    LOGVAR_MIN,
    AnyArray,
    DiagonalGaussian,
    check_images,
    check_latents,
)
from lfm_jax.vae.slicing import decode_sliced, encode_sliced

_CACHE_BYTES = 1 << 25


@flax.struct.dataclass
class Codec:
    """An autoencoder with its parameters and latent scale; `model` None is the identity.

    Attributes:
        params: the autoencoder's parameters, a nested dict (empty for the identity).
        model: a Linen module with methods ``encode`` and ``decode``, or None.
        scale: latents are multiplied by it after the shift.
        shift: latents are reduced by it.
        channels: channels of the pixels, read by the identity only.
        decode_dtype: of the decoder's activations; encoding stays in the module's own.
        slice_size: images that are decoded at a time, so that a large batch needs the memory of a
            small one; 0 decides by the backend, as encoding does (`images_at_a_time`).
    """

    params: Any
    model: nn.Module | None = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)
    shift: float = flax.struct.field(pytree_node=False)
    channels: int = flax.struct.field(pytree_node=False, default=3)
    decode_dtype: str = flax.struct.field(pytree_node=False, default="float32")
    slice_size: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def factor(self) -> int:
        """How many pixels a latent is wide."""
        return 1 if self.model is None else self.model.factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.channels if self.model is None else self.model.latent_channels

    @property
    def image_channels(self) -> int:
        """Channels of the images that are encoded."""
        return self.channels if self.model is None else self.model.in_channels

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the encoder's parameters: the cache of latents depends on nothing else.

        The decoder is left out on purpose: a cache stays valid when only the decoder is finetuned.
        """
        if self.model is None:
            return hashlib.sha256(f"identity {self.channels}".encode()).hexdigest()
        return encoder_fingerprint(self.params)

    def encode_moments(self, images: Float[AnyArray, "b h w c"]) -> Float[Array, "b i j d"]:
        """Images in [-1, 1] to unscaled ``[mean, logvar]`` in the channels, float32."""
        if self.model is None:
            check_images(images.shape, factor=1, channels=self.channels)
            mean = jnp.asarray(images, jnp.float32)
            return DiagonalGaussian(mean=mean, logvar=jnp.full_like(mean, LOGVAR_MIN)).moments
        size = images_at_a_time(self.model, images.shape)
        return encode_sliced(self.model, self.params, images, slice_size=size).moments

    def decode(self, z: Float[AnyArray, "b h w c"]) -> Float[Array, "b i j d"]:
        """Scaled latents to images, about [-1, 1] and not clipped, float32."""
        z = jnp.asarray(z) / self.scale + self.shift
        if self.model is None:
            check_latents(z.shape, channels=self.channels)
            return z.astype(jnp.float32)
        model = self.model
        if self.decode_dtype != "float32":
            model = model.clone(dtype=jnp.dtype(self.decode_dtype))
        b, h, w, _ = z.shape
        size = images_at_a_time(model, (b, h * self.factor, w * self.factor, 0))
        return decode_sliced(model, self.params, z, slice_size=self.slice_size or size)


def images_at_a_time(model: nn.Module, shape: tuple[int, ...]) -> int:
    """How many images of a batch ``[b, h, w, c]`` are coded together where nobody says.

    All of them; on a CPU as few as keep their widest feature map in the cache (the SD VAE at
    256x256: one), which is faster there.
    """
    b, h, w, _ = shape
    if jax.default_backend() != "cpu":
        return b
    width = getattr(model, "block_out_channels", (64,))[0]
    return min(b, max(1, _CACHE_BYTES // (4 * width * h * w)) * jax.device_count())


def make_codec(
    model: nn.Module,
    params: Any,
    *,
    scale: float | None = None,
    shift: float | None = None,
    decode_dtype: str = "float32",
    slice_size: int = 0,
) -> Codec:
    """A codec of this autoencoder; scale and shift default to the family's own (the module's)."""
    its_scale = model.scaling_factor if scale is None else scale
    its_shift = model.shift_factor if shift is None else shift
    if not its_scale > 0:
        raise UserError(f"scale: {its_scale}, but the latent scale must be positive")
    return Codec(
        params=params,
        model=model,
        scale=float(its_scale),
        shift=float(its_shift),
        decode_dtype=decode_dtype,
        slice_size=slice_size,
    )


def identity_codec(channels: int) -> Codec:
    """Pixel space: the moments of an image are the image itself, with a logvar of -30."""
    return Codec(params={}, model=None, scale=1.0, shift=0.0, channels=channels)


def measure_scale(moments: Float[AnyArray, "n h w d"]) -> tuple[float, float]:
    """Scale and shift that give latents mean 0 and variance 1 over all elements.

    The variance is that of posterior samples: the means' own plus the posterior's average. (Latent
    diffusion measures its 0.18215 so, without the shift.)
    """
    mean, logvar = np.split(np.asarray(moments, np.float64), 2, axis=-1)
    variance = mean.var() + np.exp(np.clip(logvar, -30.0, 20.0)).mean()
    return float(1.0 / np.sqrt(max(variance, 1e-12))), float(mean.mean())


def encoder_fingerprint(params: Any) -> str:
    """sha256 (hex) over names, shapes and float32 values of all parameters but the decoder's."""
    digest = hashlib.sha256()
    flat, _ = jax.tree_util.tree_flatten_with_path(
        {k: v for k, v in params.items() if k not in ("decoder", "post_quant_conv")}
    )
    for path, leaf in sorted(flat, key=lambda item: jax.tree_util.keystr(item[0])):
        value = np.ascontiguousarray(np.asarray(leaf, np.float32))
        digest.update(f"{jax.tree_util.keystr(path)} {value.shape}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()


def from_uint8(images: UInt8[AnyArray, "b h w c"]) -> Float[Array, "b h w c"]:
    """Bytes to [-1, 1]: ``x / 127.5 - 1``."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[AnyArray, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """[-1, 1] to bytes: ``round(clip((x + 1) * 127.5, 0, 255))``."""
    return jnp.round(jnp.clip((jnp.asarray(images) + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)
