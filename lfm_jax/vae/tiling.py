"""Encode and decode large images by tiles, with the group norms of the whole image.

A group norm looks at the whole image, so tiles that are coded on their own differ in colour and
contrast. Two ways out, both with the mid block (attention) on the whole latents:

- exact (the default): the path of resolutions is swept layer by layer (`lfm_jax.vae.sweeps`), with
  a halo as wide as one layer sees. Feature maps wait in host memory; the device holds tiles only.
  Equal to the untiled result up to rounding.
- approximate (``exact=False``, decoding only): one run a tile, with statistics taken from a
  thumbnail of the whole image, and a halo as wide as the receptive field of the up path (13 latents
  for the SD VAE), so that neighbours agree and no seam shows. Tiles cost more by the halo, but
  nothing waits on the host. How far it is off depends on the image; the measured PSNR stands in
  docs/results/vae.json.
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.vae import layers
from lfm_jax.vae.autoencoder import (
    AnyArray,
    AutoencoderKL,
    DiagonalGaussian,
    check_images,
    check_latents,
)
from lfm_jax.vae.sweeps import (
    Statistics,
    attention,
    first_half,
    measured_sweep,
    norm_conv,
    owned,
    plain_conv,
    residual_blocks,
    scaled,
    shortcut,
    sweep,
    whole_statistics,
    windows,
)


def encode_tiled(
    model: nn.Module, params: Any, images: Float[AnyArray, "b h w c"], *, tile: int = 0
) -> DiagonalGaussian:
    """The posterior of images in [-1, 1], in host memory.

    Args:
        model: an `AutoencoderKL`.
        params: its parameters.
        images: each side a multiple of the factor.
        tile: side of a tile in pixels of every layer (default 256; an odd one is taken one larger).

    Raises:
        UserError: another kind of autoencoder, images that do not fit, a tile that is not positive.
    """
    model, tile = _checked(model, tile or 256)
    check_images(images.shape, factor=model.factor, channels=model.in_channels)
    tile += tile % 2
    encoder, groups = params["encoder"], model.norm_groups
    x = np.asarray(images, jnp.dtype(model.dtype))
    enter = functools.partial(_plain, model, encoder["conv_in"])
    widths = model.block_out_channels
    x, statistics = measured_sweep(enter, (x,), channels=widths[0], groups=groups, tile=tile)
    for i, channels in enumerate(widths):
        level = encoder[f"down_blocks_{i}"]
        options = {"channels": channels, "tile": tile}
        x, statistics = residual_blocks(
            model, level, model.layers_per_block, x, statistics, **options
        )
        if "downsamplers_0" in level:
            halve = functools.partial(_downsample, model, level["downsamplers_0"]["conv"])
            x, statistics = measured_sweep(halve, (x,), groups=groups, scale=0.5, halo=2, **options)
    return jax.tree.map(np.asarray, _top(model, params, x))


def decode_tiled(
    model: nn.Module,
    params: Any,
    z: Float[AnyArray, "b h w c"],
    *,
    tile: int = 0,
    exact: bool = True,
    halo: int = -1,
) -> Float[np.ndarray, "b i j d"]:
    """Decode unscaled latents to images in host memory, about [-1, 1].

    Args:
        model: an `AutoencoderKL`.
        params: its parameters.
        z: unscaled latents.
        tile: side of a tile; exact: pixels of every layer (default 256), approximate: latents
            (default 64).
        exact: whether the norms see the whole image.
        halo: approximate only: latents around a tile that are decoded and dropped; -1 takes the
            receptive field.

    Raises:
        UserError: another kind of autoencoder, other channels, a tile that is not positive.
    """
    model, tile = _checked(model, tile or (256 if exact else 64))
    check_latents(z.shape, channels=model.latent_channels)
    x = np.asarray(_bottom(model, params, z))
    if exact:
        return _sweep_layers(model, params["decoder"], x, tile)
    halo = receptive_field(model) if halo < 0 else halo
    statistics = thumbnail_statistics(model, params["decoder"], x, tile + 2 * halo)
    return _decode_windows(model, params["decoder"], x, tile, halo, statistics)


def receptive_field(model: AutoencoderKL) -> int:
    """How many latents a pixel sees beyond its own through the up path (group norms aside)."""
    pixels = 1.0  # conv_out, in pixels of the finest level
    for level in range(len(model.block_out_channels)):  # from the finest
        pixels += 2 * (model.layers_per_block + 1) * 2**level
        pixels += 2**level if level < len(model.block_out_channels) - 1 else 0
    return int(np.ceil(pixels / model.factor))


def _checked(model: nn.Module, tile: int) -> tuple[AutoencoderKL, int]:
    if not isinstance(model, AutoencoderKL):
        raise UserError(f"model: {type(model).__name__} cannot be tiled; accepted: AutoencoderKL")
    if tile < 1:
        raise UserError(f"tile: {tile}, but it must be at least 1")
    return model, tile


@functools.partial(jax.jit, static_argnums=0)
def _top(model: AutoencoderKL, params: Any, x: AnyArray) -> DiagonalGaussian:
    """Everything after the down path: it runs on the whole latents."""
    return cast(DiagonalGaussian, model.apply({"params": params}, x, method="encode_top"))


@functools.partial(jax.jit, static_argnums=0)
def _bottom(model: AutoencoderKL, params: Any, z: AnyArray) -> Array:
    """Everything before the up path: it runs on the whole latents."""
    return cast(Array, model.apply({"params": params}, z, method="decode_bottom"))


_plain = functools.partial(jax.jit, static_argnums=0)(plain_conv)


@functools.partial(jax.jit, static_argnums=0)
def _downsample(model, conv, x):
    kernel, bias = (jnp.asarray(conv[k], model.dtype) for k in ("kernel", "bias"))
    options = {"stride": 2, "padding": layers.RIGHT_BOTTOM, "precision": model.precision}
    return layers.convolve(jnp.asarray(x), kernel, bias, **options)


@functools.partial(jax.jit, static_argnums=0)
def _upsample(model, conv, x):
    return layers.upsample_conv(
        jnp.asarray(x),
        jnp.asarray(conv["kernel"], model.dtype),
        jnp.asarray(conv["bias"], model.dtype),
        precision=model.precision,
    )


def _sweep_layers(model: AutoencoderKL, params: Any, x: np.ndarray, tile: int) -> np.ndarray:
    """The up path, one convolution after the other over the whole image."""
    groups = model.norm_groups
    statistics = whole_statistics(x, groups)
    for i, channels in enumerate(reversed(model.block_out_channels)):
        level = params[f"up_blocks_{i}"]
        options = {"channels": channels, "tile": tile}
        x, statistics = residual_blocks(
            model, level, model.layers_per_block + 1, x, statistics, **options
        )
        if "upsamplers_0" in level:
            double = functools.partial(_upsample, model, level["upsamplers_0"]["conv"])
            x, statistics = measured_sweep(double, (x,), groups=groups, scale=2, **options)
    last = functools.partial(
        first_half, model, params["conv_norm_out"], params["conv_out"], statistics
    )
    out = sweep(last, (x,), channels=model.out_channels, tile=tile)
    return out.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _up_path(
    model: AutoencoderKL, params: Any, x: AnyArray, given: list[Statistics] | None
) -> tuple[Array, list[Statistics]]:
    """The whole up path on one window; statistics are taken from ``given``, else its own."""
    seen: list[Statistics] = []

    def convolved(norm, conv, x):
        statistics = given[len(seen)] if given else layers.group_statistics(x, model.norm_groups)
        seen.append(statistics)
        return norm_conv(model, norm, conv, statistics, x)

    for level in range(len(model.block_out_channels)):
        up_block = params[f"up_blocks_{level}"]
        for i in range(model.layers_per_block + 1):
            block = up_block[f"resnets_{i}"]
            h = convolved(block["norm1"], block["conv1"], x)
            x = shortcut(model, block, x) + convolved(block["norm2"], block["conv2"], h)
            if f"attentions_{i}" in up_block:
                x = attention(model, up_block[f"attentions_{i}"], x)
        if "upsamplers_0" in up_block:
            x = _upsample(model, up_block["upsamplers_0"]["conv"], x)
    return convolved(params["conv_norm_out"], params["conv_out"], x), seen


def thumbnail_statistics(
    model: AutoencoderKL, params: Any, x: np.ndarray, side: int
) -> list[Statistics]:
    """Statistics of every norm of the up path on ``x`` shrunk to at most ``side``."""
    b, h, w, c = x.shape
    shape = (b, min(h, side), min(w, side), c)
    small = jax.image.resize(x.astype(np.float32), shape, "nearest").astype(x.dtype)
    return _up_path(model, params, small, None)[1]


def _decode_windows(
    model: AutoencoderKL,
    params: Any,
    x: np.ndarray,
    tile: int,
    halo: int,
    statistics: list[Statistics],
) -> np.ndarray:
    """The up path window by window, all with the same statistics."""
    b, h, w, _ = x.shape
    factor = model.factor
    out = np.empty((b, h * factor, w * factor, model.out_channels), np.float32)
    for rows, kept_rows in windows(h, tile, halo):
        for columns, kept_columns in windows(w, tile, halo):
            y, _ = _up_path(model, params, x[:, rows, columns], statistics)
            row, column = owned(kept_rows, rows, factor), owned(kept_columns, columns, factor)
            kept = np.asarray(y, np.float32)[:, row > 0][:, :, column > 0]
            out[:, scaled(kept_rows, factor), scaled(kept_columns, factor)] = kept
    return out
