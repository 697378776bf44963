"""The parts of the SD VAE: convolution, group norm, residual block, one-head attention, resampling.

Conventions: NHWC activations, HWIO kernels, linear kernels ``[in, out]``. Parameters are float32;
activations run in ``dtype``, the statistics of the norms and the softmax in float32. What breaks
ports of this network: downsampling pads the right and bottom edges only, upsampling is nearest
neighbour followed by a 3x3 convolution, and attention has one head as wide as its channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Queries are attended in chunks above this count: at 2048 px the whole score matrix is 17 GB.
ATTENTION_CHUNK = 4096

SAME = ((1, 1), (1, 1))
RIGHT_BOTTOM = ((0, 1), (0, 1))
NONE = ((0, 0), (0, 0))


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array | np.ndarray, "kh kw c d"],
    bias: Float[Array | np.ndarray, " d"] | None = None,
    *,
    stride: int = 1,
    padding: Sequence[tuple[int, int]] = SAME,
    precision: Any = None,
) -> Float[Array, "b i j d"]:
    """Convolution of NHWC ``x`` with an HWIO kernel, zero padding given per edge."""
    if kernel.shape[:2] == (1, 1) and stride == 1:
        # As a product: XLA's gradient of a 1x1 convolution is ten times slower on a CPU.
        y = jnp.matmul(x, kernel[0, 0], precision=precision)
        return y if bias is None else y + bias
    y = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(kernel),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
    return y if bias is None else y + bias


def group_statistics(
    x: Float[Array, "b h w c"], groups: int
) -> tuple[Float[Array, "b g"], Float[Array, "b g"]]:
    """Mean and (biased) variance of each group over space and the group's channels, in float32."""
    b, h, w, c = x.shape
    x = x.astype(jnp.float32).reshape(b, h * w, groups, c // groups)
    mean = jnp.mean(x, axis=(1, 3))
    variance = jnp.mean(jnp.square(x - mean[:, None, :, None]), axis=(1, 3))
    return mean, variance


def normalize(
    x: Float[Array, "b h w c"],
    statistics: tuple[Float[Array, "b g"], Float[Array, "b g"]],
    scale: Float[Array | np.ndarray, " c"],
    bias: Float[Array | np.ndarray, " c"],
    *,
    eps: float,
    dtype: Any = jnp.float32,
) -> Float[Array, "b h w c"]:
    """Apply a group norm whose statistics are given: one multiply-add per element."""
    mean, variance = statistics
    per_group = x.shape[-1] // mean.shape[-1]
    gain = jnp.repeat(jax.lax.rsqrt(variance + eps), per_group, axis=-1) * scale
    offset = bias - jnp.repeat(mean, per_group, axis=-1) * gain
    return (x.astype(jnp.float32) * gain[:, None, None] + offset[:, None, None]).astype(dtype)


class Conv(nn.Module):
    """A convolution with parameters ``kernel`` HWIO and ``bias``."""

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = SAME
    use_bias: bool = True
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        return convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            None if bias is None else bias.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            precision=self.precision,
        )


class GroupNorm(nn.Module):
    """Group norm with parameters ``scale`` and ``bias``, optionally followed by SiLU."""

    groups: int
    eps: float = 1e-6
    silu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        statistics = group_statistics(x, self.groups)
        y = normalize(x, statistics, scale, bias, eps=self.eps, dtype=self.dtype)
        return nn.silu(y) if self.silu else y


class ResnetBlock(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``; a 1x1 shortcut if channels change."""

    features: int
    groups: int
    eps: float = 1e-6
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        options = {"dtype": self.dtype, "precision": self.precision}
        h = GroupNorm(self.groups, self.eps, silu=True, dtype=self.dtype, name="norm1")(x)
        h = Conv(self.features, **options, name="conv1")(h)
        h = GroupNorm(self.groups, self.eps, silu=True, dtype=self.dtype, name="norm2")(h)
        h = Conv(self.features, **options, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, padding=NONE, **options, name="conv_shortcut")(x)
        return x + h


def attend(
    query: Float[Array, "b n d"],
    key: Float[Array, "b m d"],
    value: Float[Array, "b m d"],
    *,
    precision: Any = None,
) -> Float[Array, "b n d"]:
    """One-head attention at scale ``d**-0.5`` with a float32 softmax, in chunks of queries."""

    def rows(chunk):
        scores = jnp.einsum("bnd,bmd->bnm", chunk, key, precision=precision)
        weights = jax.nn.softmax(scores.astype(jnp.float32) * chunk.shape[-1] ** -0.5, axis=-1)
        return jnp.einsum("bnm,bmd->bnd", weights.astype(value.dtype), value, precision=precision)

    b, n, d = query.shape
    if n <= ATTENTION_CHUNK:
        return rows(query)
    chunks = -(-n // ATTENTION_CHUNK)
    padded = jnp.pad(query, ((0, 0), (0, chunks * ATTENTION_CHUNK - n), (0, 0)))
    padded = padded.reshape(b, chunks, ATTENTION_CHUNK, d).swapaxes(0, 1)
    return jax.lax.map(rows, padded).swapaxes(0, 1).reshape(b, -1, d)[:, :n]


class Attention(nn.Module):
    """Residual self-attention over all positions: one head as wide as the channels."""

    groups: int
    eps: float = 1e-6
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, self.eps, dtype=self.dtype, name="group_norm")(x)
        y = y.reshape(b, h * w, c)

        def dense(name):
            return nn.Dense(c, dtype=self.dtype, precision=self.precision, name=name)

        y = attend(dense("to_q")(y), dense("to_k")(y), dense("to_v")(y), precision=self.precision)
        return x + dense("to_out_0")(y).reshape(b, h, w, c)


class MidBlock(nn.Module):
    """Resnet, attention (unless switched off), resnet, at the lowest resolution."""

    groups: int
    eps: float = 1e-6
    attention: bool = True
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        options = {"dtype": self.dtype, "precision": self.precision}
        features = x.shape[-1]
        x = ResnetBlock(features, self.groups, self.eps, **options, name="resnets_0")(x)
        if self.attention:
            x = Attention(self.groups, self.eps, **options, name="attentions_0")(x)
        return ResnetBlock(features, self.groups, self.eps, **options, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halve height and width: a strided 3x3 convolution, padded on the right and bottom only."""

    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        return Conv(
            x.shape[-1],
            stride=2,
            padding=RIGHT_BOTTOM,
            dtype=self.dtype,
            precision=self.precision,
            name="conv",
        )(x)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """Double height and width by repetition."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def upsample_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c d"],
    bias: Float[Array, " d"],
    precision: Any = None,
) -> Float[Array, "b i j d"]:
    """``convolve(upsample_nearest(x), kernel, bias)`` with 16/36 of the multiplications.

    Output pixels of one parity see a 2x2 patch of ``x`` only: the taps that fall on the same input
    pixel are summed beforehand, and one 2x2 convolution gives all four parities as channels.
    """
    b, h, w, c = x.shape
    features = kernel.shape[-1]
    taps = kernel.astype(jnp.float32)
    even = jnp.stack([taps[0], taps[1] + taps[2]])
    odd = jnp.stack([taps[0] + taps[1], taps[2]])
    rows = jnp.stack([even, odd])  # [row parity, 2, 3, c, d]
    even = jnp.stack([rows[:, :, 0], rows[:, :, 1] + rows[:, :, 2]], axis=2)
    odd = jnp.stack([rows[:, :, 0] + rows[:, :, 1], rows[:, :, 2]], axis=2)
    both = jnp.stack([even, odd])  # [column parity, row parity, 2, 2, c, d]
    both = both.transpose(2, 3, 4, 1, 0, 5).reshape(2, 2, c, 4 * features).astype(kernel.dtype)
    y = convolve(x, both, padding=SAME, precision=precision)
    y = y.reshape(b, h + 1, w + 1, 2, 2, features)
    # An even pixel 2i sees inputs i-1 and i, an odd pixel 2i+1 sees i and i+1.
    rows = jnp.stack([y[:, :h, :, 0], y[:, 1:, :, 1]], axis=2)
    pixels = jnp.stack([rows[:, :, :, :w, 0], rows[:, :, :, 1:, 1]], axis=4)
    return pixels.reshape(b, 2 * h, 2 * w, features) + bias


@upsample_conv.defjvp
def _upsample_conv_jvp(precision, primals, tangents):
    # Interleaving the parities is cheap forwards, but its transpose takes six times as long on a
    # CPU as the gradient of the plain form, so derivatives are taken of that one.
    def plain(x, kernel, bias):
        return convolve(upsample_nearest(x), kernel, bias, precision=precision)

    return upsample_conv(*primals, precision), jax.jvp(plain, primals, tangents)[1]


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution (no checkerboard)."""

    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        return UpsampleConv(x.shape[-1], self.dtype, self.precision, name="conv")(x)


class UpsampleConv(nn.Module):
    """`upsample_conv` with the parameters of the 3x3 convolution."""

    features: int
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        return upsample_conv(x, kernel, bias, self.precision)


class LevelBlock(nn.Module):
    """Residual blocks (each with attention, if asked for), then "down", "up" or no resampling."""

    features: int
    layers: int
    groups: int
    eps: float = 1e-6
    resample: str = ""
    attention: bool = False
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        options = {"dtype": self.dtype, "precision": self.precision}
        for i in range(self.layers):
            block = ResnetBlock(
                self.features, self.groups, self.eps, **options, name=f"resnets_{i}"
            )
            x = block(x)
            if self.attention:
                x = Attention(self.groups, self.eps, **options, name=f"attentions_{i}")(x)
        if self.resample == "down":
            x = Downsample(**options, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample(**options, name="upsamplers_0")(x)
        return x
