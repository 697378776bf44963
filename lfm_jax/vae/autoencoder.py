"""The KL autoencoder of latent diffusion (Rombach et al. 2022, section 3.1), sized by config.

``encode`` maps images in [-1, 1] to a diagonal Gaussian over latents ``2**(levels - 1)`` times
smaller; ``decode`` maps unscaled latents back. The defaults are the Stable Diffusion VAE
(83,653,863 parameters); ``block_out_channels=(32, 64), norm_groups=8, in_channels=1`` is enough for
8x8 digits.

Layout of the parameters: a nested dict that mirrors diffusers' PyTorch names with list indices
joined by an underscore, e.g. ``encoder/down_blocks_0/resnets_1/conv1/kernel``,
``decoder/up_blocks_3/resnets_0/norm1/scale``, ``encoder/mid_block/attentions_0/to_out_0/kernel``,
``quant_conv/bias``. Kernels are HWIO (convolutions) and ``[in, out]`` (attention), float32.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lfm_jax.errors import UserError
from lfm_jax.vae import layers

AnyArray = Array | np.ndarray
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@flax.struct.dataclass
class DiagonalGaussian:
    """The posterior over unscaled latents; ``logvar`` is clamped to [-30, 20].

    Attributes:
        mean: float32 ``[b, h, w, c]``.
        logvar: the same shape; the natural logarithm of the variance.
    """

    # Unchecked: transformations build pytrees of stacked, abstract or missing leaves.
    mean: Any
    logvar: Any

    @property
    def moments(self) -> Float[Array, "b h w m"]:
        """Mean and logvar side by side in the channels: what the latent cache stores."""
        return jnp.concatenate([self.mean, self.logvar], axis=-1)

    @property
    def std(self) -> Float[Array, "b h w c"]:
        """Standard deviation."""
        return jnp.exp(0.5 * self.logvar)

    def mode(self) -> Float[Array, "b h w c"]:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, key: Key[Array, ""]) -> Float[Array, "b h w c"]:
        """One draw for the whole batch from one key (training keys by position instead)."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def kl(self) -> Float[Array, "b h w c"]:
        """KL divergence to a standard normal, per element, in nats."""
        return 0.5 * (jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar)


def from_moments(moments: Float[AnyArray, "b h w m"]) -> DiagonalGaussian:
    """Split ``[mean, logvar]`` and clamp the logvar."""
    mean, logvar = jnp.split(jnp.asarray(moments, jnp.float32), 2, axis=-1)
    return DiagonalGaussian(mean=mean, logvar=jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX))


class Encoder(nn.Module):
    """Images to raw moments (before the quant convolution)."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    out_channels: int
    norm_groups: int
    norm_eps: float
    mid_attention: bool
    attention_levels: tuple[int, ...]
    dtype: Any
    precision: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], top: bool = False) -> Float[Array, "b i j d"]:
        options = {"dtype": self.dtype, "precision": self.precision}
        if not top:
            x = layers.Conv(self.block_out_channels[0], **options, name="conv_in")(x)
        last = len(self.block_out_channels) - 1
        for i, features in enumerate(() if top else self.block_out_channels):
            x = layers.LevelBlock(
                features,
                self.layers_per_block,
                self.norm_groups,
                self.norm_eps,
                resample="down" if i < last else "",
                attention=i in self.attention_levels,
                **options,
                name=f"down_blocks_{i}",
            )(x)
        x = layers.MidBlock(
            self.norm_groups, self.norm_eps, self.mid_attention, **options, name="mid_block"
        )(x)
        norm = layers.GroupNorm(
            self.norm_groups, self.norm_eps, silu=True, dtype=self.dtype, name="conv_norm_out"
        )
        return layers.Conv(self.out_channels, **options, name="conv_out")(norm(x))


class Decoder(nn.Module):
    """Latents (after the post-quant convolution) to images."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    out_channels: int
    norm_groups: int
    norm_eps: float
    mid_attention: bool
    attention_levels: tuple[int, ...]
    dtype: Any
    precision: str | None

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"], bottom: bool = False) -> Float[Array, "b i j d"]:
        options = {"dtype": self.dtype, "precision": self.precision}
        x = layers.Conv(self.block_out_channels[-1], **options, name="conv_in")(z)
        x = layers.MidBlock(
            self.norm_groups, self.norm_eps, self.mid_attention, **options, name="mid_block"
        )(x)
        if bottom:
            return x
        last = len(self.block_out_channels) - 1
        for i, features in enumerate(reversed(self.block_out_channels)):
            x = layers.LevelBlock(
                features,
                self.layers_per_block + 1,
                self.norm_groups,
                self.norm_eps,
                resample="up" if i < last else "",
                attention=last - i in self.attention_levels,
                **options,
                name=f"up_blocks_{i}",
            )(x)
        norm = layers.GroupNorm(
            self.norm_groups, self.norm_eps, silu=True, dtype=self.dtype, name="conv_norm_out"
        )
        return layers.Conv(self.out_channels, **options, name="conv_out")(norm(x))


class AutoencoderKL(nn.Module):
    """The SD VAE's architecture; every size is a field and the defaults are Stable Diffusion's.

    Attributes:
        in_channels: channels of the images that are encoded.
        out_channels: channels of the images that are decoded.
        block_out_channels: width of each level; the resolution halves between two levels.
        layers_per_block: residual blocks a level in the encoder (the decoder has one more).
        latent_channels: channels of the latents (SD 4, SD3 and FLUX 16).
        norm_groups: groups of every group norm; must divide every width.
        norm_eps: added to the variance.
        mid_attention: self-attention between the two residual blocks at the lowest resolution.
        attention_levels: levels (0 the finest) with attention after every residual block, too.
        use_quant_conv: a 1x1 convolution after the encoder (absent in SD3 and FLUX).
        use_post_quant_conv: a 1x1 convolution before the decoder (absent in SD3 and FLUX).
        scaling_factor: the family's latent scale, ``z = (sample - shift) * scale``.
        shift_factor: the family's latent shift.
        dtype: of the activations; parameters stay float32.
        precision: of matmuls and convolutions, e.g. "highest" where an accelerator would round.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    norm_eps: float = 1e-6
    mid_attention: bool = True
    attention_levels: tuple[int, ...] = ()
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    dtype: Any = jnp.float32
    precision: str | None = None

    @property
    def factor(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self):
        uneven = [c for c in self.block_out_channels if c % self.norm_groups]
        if uneven:
            raise UserError(
                f"norm_groups: {self.norm_groups} does not divide {uneven[0]} of "
                f"block_out_channels {tuple(self.block_out_channels)}; it must divide each"
            )
        shared = {
            "block_out_channels": tuple(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "norm_groups": self.norm_groups,
            "norm_eps": self.norm_eps,
            "mid_attention": self.mid_attention,
            "attention_levels": tuple(self.attention_levels),
            "dtype": self.dtype,
            "precision": self.precision,
        }
        self.encoder = Encoder(out_channels=2 * self.latent_channels, **shared)
        self.decoder = Decoder(out_channels=self.out_channels, **shared)
        pointwise = {
            "size": 1,
            "padding": layers.NONE,
            "dtype": self.dtype,
            "precision": self.precision,
        }
        if self.use_quant_conv:
            self.quant_conv = layers.Conv(2 * self.latent_channels, **pointwise)
        if self.use_post_quant_conv:
            self.post_quant_conv = layers.Conv(self.latent_channels, **pointwise)

    def encode(self, images: Float[AnyArray, "b h w c"]) -> DiagonalGaussian:
        """Images in [-1, 1] to the posterior over unscaled latents (float32).

        Raises:
            UserError: a side is not a multiple of `factor`, or the channels are not `in_channels`.
        """
        check_images(images.shape, factor=self.factor, channels=self.in_channels)
        h = self.encoder(jnp.asarray(images))
        return from_moments(self.quant_conv(h) if self.use_quant_conv else h)

    def decode(self, z: Float[AnyArray, "b h w c"]) -> Float[Array, "b i j d"]:
        """Unscaled latents to images, about [-1, 1] and not clipped (float32).

        Raises:
            UserError: the channels are not `latent_channels`.
        """
        check_latents(z.shape, channels=self.latent_channels)
        z = jnp.asarray(z)
        z = self.post_quant_conv(z) if self.use_post_quant_conv else z
        return self.decoder(z).astype(jnp.float32)

    def encode_top(self, x: Float[AnyArray, "b h w d"]) -> DiagonalGaussian:
        """The posterior of a map behind the encoder's last level: the part that is never tiled."""
        h = self.encoder(jnp.asarray(x), top=True)
        return from_moments(self.quant_conv(h) if self.use_quant_conv else h)

    def decode_bottom(self, z: Float[AnyArray, "b h w c"]) -> Float[Array, "b h w d"]:
        """Unscaled latents through the decoder's mid block: the part that tiling cannot cut."""
        z = jnp.asarray(z)
        z = self.post_quant_conv(z) if self.use_post_quant_conv else z
        return self.decoder(z, bottom=True)

    def __call__(self, images: Float[AnyArray, "b h w c"]) -> Float[Array, "b h w d"]:
        """Decode the posterior's mode: the reconstruction, and what `init` traces."""
        return self.decode(self.encode(images).mode())


def check_images(shape: tuple[int, ...], *, factor: int, channels: int) -> None:
    """Raise `UserError` unless NHWC ``shape`` fits an encoder of this factor and channel count."""
    _, height, width, found = shape
    if found != channels:
        raise UserError(f"images: {found} channels, but this autoencoder takes {channels}")
    if height % factor or width % factor:
        raise UserError(
            f"images: {height}x{width} pixels, but each side must be a multiple of {factor}"
        )


def check_latents(shape: tuple[int, ...], *, channels: int) -> None:
    """Raise `UserError` unless NHWC ``shape`` has the decoder's latent channels."""
    if shape[-1] != channels:
        raise UserError(f"latents: {shape[-1]} channels, but this autoencoder takes {channels}")


def init_vae(
    model: nn.Module, key: Key[Array, ""], image_size: int | tuple[int, int] = 0
) -> dict[str, Any]:
    """Fresh float32 parameters as a nested dict: kernels LeCun normal, biases 0, scales 1.

    The distribution is that of the modules' own initializers; drawing all kernels at once spares
    the compilation of one random generator a parameter, which takes longer than a short training.
    ``image_size`` may be left out: no parameter depends on it.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    side = model.factor * 2
    images = jax.ShapeDtypeStruct(
        (1, height or side, width or side, model.in_channels), jnp.float32
    )
    shapes = jax.eval_shape(model.init, key, images)["params"]
    sizes = [s.size for p, s in jax.tree.leaves_with_path(shapes) if p[-1].key == "kernel"]
    # A normal cut at two deviations has the deviation 0.8796.
    draws = iter(
        np.split(
            np.asarray(jax.random.truncated_normal(key, -2.0, 2.0, (sum(sizes),)) / 0.87962566),
            np.cumsum(sizes)[:-1],
        )
    )

    def fresh(path, leaf):
        if path[-1].key == "kernel":
            fan_in = leaf.size // leaf.shape[-1]
            return jnp.asarray(next(draws).reshape(leaf.shape) / np.float32(np.sqrt(fan_in)))
        return jnp.full(leaf.shape, 1.0 if path[-1].key == "scale" else 0.0)

    return jax.tree.map_with_path(fresh, shapes)
