"""TAESD, the tiny autoencoder: a preview decoder for Stable Diffusion's latents.

Plain 3x3 convolutions and ReLU, no norms, distilled from the SD VAE by Ollin Boer Bohan
(github.com/madebyollin/taesd). Its latents already are the *scaled* latents of the SD VAE, so its
own scale is 1 and ``make_codec(tiny, params).decode`` takes what a flow samples. The encoder is
deterministic: its posterior has a logvar of -30.

Layout of the parameters: ``encoder/layers_0/kernel``, ``encoder/layers_1/conv_0/kernel``: the
layers are numbered as in diffusers' ``AutoencoderTiny``, and so are the layers without parameters.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lfm_jax.vae import layers
from lfm_jax.vae.autoencoder import (
    LOGVAR_MIN,
    AnyArray,
    DiagonalGaussian,
    check_images,
    check_latents,
)


class TinyBlock(nn.Module):
    """``relu(x + conv(relu(conv(relu(conv(x))))))``."""

    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        options = {"dtype": self.dtype, "precision": self.precision}
        h = nn.relu(layers.Conv(x.shape[-1], **options, name="conv_0")(x))
        h = nn.relu(layers.Conv(x.shape[-1], **options, name="conv_2")(h))
        return nn.relu(x + layers.Conv(x.shape[-1], **options, name="conv_4")(h))


class TinyEncoder(nn.Module):
    """Images in [-1, 1] to latents."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    latent_channels: int
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        options = {"dtype": self.dtype, "precision": self.precision}
        x = (x + 1) / 2
        layer = 0
        for level, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            down = {"stride": 2, "use_bias": False} if level else {}
            x = layers.Conv(width, **down, **options, name=f"layers_{layer}")(x)
            for i in range(blocks):
                x = TinyBlock(**options, name=f"layers_{layer + 1 + i}")(x)
            layer += 1 + blocks
        return layers.Conv(self.latent_channels, **options, name=f"layers_{layer}")(x)


class TinyDecoder(nn.Module):
    """Latents to images in about [-1, 1]."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    out_channels: int
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        options = {"dtype": self.dtype, "precision": self.precision}
        x = jnp.tanh(z / 3) * 3
        x = nn.relu(layers.Conv(self.widths[0], **options, name="layers_0")(x))
        layer = 2
        last = len(self.widths) - 1
        for level, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for i in range(blocks):
                x = TinyBlock(**options, name=f"layers_{layer + i}")(x)
            layer += blocks
            if level < last:
                x = layers.upsample_nearest(x)
                conv = layers.Conv(width, use_bias=False, **options, name=f"layers_{layer + 1}")
                layer += 2
            else:
                conv = layers.Conv(self.out_channels, **options, name=f"layers_{layer}")
            x = conv(x)
        return x * 2 - 1


class AutoencoderTiny(nn.Module):
    """TAESD with the interface of `AutoencoderKL`: ``encode`` and ``decode``, factor 8.

    Attributes:
        in_channels: channels of the images.
        out_channels: channels of the decoded images.
        latent_channels: channels of the latents.
        encoder_widths: width of each level; all levels must be equally wide.
        decoder_widths: the same for the decoder.
        encoder_blocks: residual blocks a level, from the finest.
        decoder_blocks: residual blocks a level, from the coarsest.
        scaling_factor: 1: its latents are the scaled ones.
        shift_factor: 0.
        dtype: of the activations.
        precision: of the convolutions.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    decoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    dtype: Any = jnp.float32
    precision: str | None = None

    @property
    def factor(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.encoder_widths) - 1)

    def setup(self):
        options = {"dtype": self.dtype, "precision": self.precision}
        self.encoder = TinyEncoder(
            self.encoder_widths, self.encoder_blocks, self.latent_channels, **options
        )
        self.decoder = TinyDecoder(
            self.decoder_widths, self.decoder_blocks, self.out_channels, **options
        )

    def encode(self, images: Float[AnyArray, "b h w c"]) -> DiagonalGaussian:
        """Images in [-1, 1] to latents as a posterior without width.

        Raises:
            UserError: a side is not a multiple of `factor`, or the channels are not `in_channels`.
        """
        check_images(images.shape, factor=self.factor, channels=self.in_channels)
        mean = self.encoder(jnp.asarray(images)).astype(jnp.float32)
        return DiagonalGaussian(mean=mean, logvar=jnp.full_like(mean, LOGVAR_MIN))

    def decode(self, z: Float[AnyArray, "b h w c"]) -> Float[Array, "b i j d"]:
        """Latents (SD-scaled) to images, about [-1, 1] and not clipped (float32).

        Raises:
            UserError: the channels are not `latent_channels`.
        """
        check_latents(z.shape, channels=self.latent_channels)
        return self.decoder(jnp.asarray(z)).astype(jnp.float32)

    def __call__(self, images: Float[AnyArray, "b h w c"]) -> Float[Array, "b h w d"]:
        """The reconstruction, and what `init` traces."""
        return self.decode(self.encode(images).mode())
