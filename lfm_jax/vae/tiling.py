"""Decode large images by tiles, with the group norms of the whole image.

A group norm looks at the whole image, so tiles that are decoded on their own differ in colour and
contrast. Two ways out, both with the mid block (attention) on the whole latents:

- exact (the default): the up path is swept layer by layer. Between two norms lies one 3x3
  convolution, so that a tile needs a halo of one pixel, and the statistics of each norm are summed
  over all tiles before the next sweep. Every value is computed once. Feature maps wait in host
  memory; the device holds tiles only. Equal to the untiled decode up to rounding.
- approximate (``exact=False``): one run a tile, with statistics taken from a thumbnail of the whole
  image, and a halo as wide as the receptive field of the up path (13 latents for the SD VAE), so
  that neighbours agree and no seam shows. Tiles cost more by the halo, but nothing waits on the
  host. How far it is off depends on the image; the measured PSNR stands in docs/results/vae.json.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.vae import layers
from lfm_jax.vae.autoencoder import AnyArray, AutoencoderKL, check_latents

Statistics = tuple[Any, Any]


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
    if not isinstance(model, AutoencoderKL):
        raise UserError(f"model: {type(model).__name__} cannot be tiled; accepted: AutoencoderKL")
    check_latents(z.shape, channels=model.latent_channels)
    tile = tile or (256 if exact else 64)
    if tile < 1:
        raise UserError(f"tile: {tile}, but it must be at least 1")
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


@functools.partial(jax.jit, static_argnums=0)
def _bottom(model: AutoencoderKL, params: Any, z: AnyArray) -> Array:
    """Everything before the up path: it runs on the whole latents."""
    return model.apply({"params": params}, z, method="decode_bottom")


def windows(side: int, tile: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Cut ``side`` into tiles; yields what to read and what of it to keep, in absolute positions.

    All windows are equally wide and lie inside, so that one compiled program serves all of them and
    the zero padding at a window's edge is the image's own wherever it is not in the halo.
    """
    width = min(side, tile + 2 * halo)
    for low in range(0, side, tile):
        high = min(low + tile, side)
        start = min(max(low - halo, 0), side - width)
        yield slice(start, start + width), slice(low, high)


def _owned(kept: slice, window: slice, scale: int) -> np.ndarray:
    """1 where a window's output is kept, 0 in its halo."""
    owned = np.zeros((window.stop - window.start) * scale, np.float32)
    owned[(kept.start - window.start) * scale : (kept.stop - window.start) * scale] = 1
    return owned


def _sweep(
    function: Callable[..., Array],
    maps: tuple[np.ndarray, ...],
    *,
    channels: int,
    groups: int,
    tile: int,
    scale: int = 1,
) -> tuple[np.ndarray, Statistics | None]:
    """Apply one 3x3 convolution's worth of network to whole maps, and sum up its statistics."""
    b, h, w, _ = maps[0].shape
    out = np.empty((b, h * scale, w * scale, channels), maps[0].dtype)
    parts = []
    for rows, kept_rows in windows(h, tile, 1):
        for columns, kept_columns in windows(w, tile, 1):
            y = function(*(m[:, rows, columns] for m in maps))
            row, column = _owned(kept_rows, rows, scale), _owned(kept_columns, columns, scale)
            if groups:
                parts.append(_tile_statistics(y, row, column, groups))
            out[
                :,
                kept_rows.start * scale : kept_rows.stop * scale,
                kept_columns.start * scale : kept_columns.stop * scale,
            ] = np.asarray(y)[:, row > 0][:, :, column > 0]
    return out, _merge(parts) if groups else None


@functools.partial(jax.jit, static_argnums=3)
def _tile_statistics(
    y: AnyArray, row: AnyArray, column: AnyArray, groups: int
) -> tuple[Array, ...]:
    """Count, mean and sum of squared deviations of the kept pixels, per image and group."""
    b, h, w, c = y.shape
    kept = (row[:, None] * column[None, :]).reshape(1, h * w, 1, 1)
    y = y.astype(jnp.float32).reshape(b, h * w, groups, c // groups)
    count = kept.sum() * (c // groups)
    mean = jnp.sum(y * kept, axis=(1, 3)) / count
    deviation = jnp.sum(jnp.square(y - mean[:, None, :, None]) * kept, axis=(1, 3))
    return count, mean, deviation


def _whole_statistics(x: np.ndarray, groups: int) -> Statistics:
    """Statistics of a map that is small enough for one piece."""
    rows, columns = np.ones(x.shape[1], np.float32), np.ones(x.shape[2], np.float32)
    return _merge([_tile_statistics(x, rows, columns, groups)])


def _merge(parts: list[tuple[AnyArray, ...]]) -> Statistics:
    """Statistics of the union (Chan, Golub & LeVeque 1979), in float64."""
    counts, means, deviations = (
        np.stack([np.asarray(p[i], np.float64) for p in parts]) for i in range(3)
    )
    weights = (counts / counts.sum())[:, None, None]
    mean = (weights * means).sum(0)
    spread = (counts[:, None, None] * np.square(means - mean)).sum(0)
    variance = (deviations.sum(0) + spread) / counts.sum()
    return mean.astype(np.float32), variance.astype(np.float32)


def _norm_conv(
    model: AutoencoderKL, norm: Any, conv: Any, statistics: Statistics, x: AnyArray
) -> Array:
    """``conv(silu(norm(x)))`` with the statistics given."""
    h = layers.normalize(
        jnp.asarray(x),
        statistics,
        norm["scale"],
        norm["bias"],
        eps=model.norm_eps,
        dtype=model.dtype,
    )
    return _conv(model, conv, jax.nn.silu(h))


def _conv(model: AutoencoderKL, conv: Any, x: AnyArray, padding=layers.SAME) -> Array:
    kernel, bias = (jnp.asarray(conv[k], model.dtype) for k in ("kernel", "bias"))
    return layers.convolve(jnp.asarray(x), kernel, bias, padding=padding, precision=model.precision)


def _shortcut(model: AutoencoderKL, block: Any, x: AnyArray) -> Array:
    if "conv_shortcut" in block:
        return _conv(model, block["conv_shortcut"], x, layers.NONE)
    return x


_first_half = functools.partial(jax.jit, static_argnums=0)(_norm_conv)


@functools.partial(jax.jit, static_argnums=0)
def _second_half(model, block, statistics, h, x):
    y = _norm_conv(model, block["norm2"], block["conv2"], statistics, h)
    return y + _shortcut(model, block, x)


@functools.partial(jax.jit, static_argnums=0)
def _upsample(model, conv, x):
    return layers.upsample_conv(
        jnp.asarray(x),
        jnp.asarray(conv["kernel"], model.dtype),
        jnp.asarray(conv["bias"], model.dtype),
        precision=model.precision,
    )


@functools.partial(jax.jit, static_argnums=0)
def _attention(model, params, x):
    attention = layers.Attention(
        model.norm_groups, model.norm_eps, dtype=model.dtype, precision=model.precision
    )
    return attention.apply({"params": params}, x)


def _sweep_layers(model: AutoencoderKL, params: Any, x: np.ndarray, tile: int) -> np.ndarray:
    """The up path, one convolution after the other over the whole image."""
    groups = model.norm_groups
    statistics = _whole_statistics(x, groups)

    def sweep(function, *maps, channels, scale=1, groups=groups):
        return _sweep(function, maps, channels=channels, groups=groups, tile=tile, scale=scale)

    for level, features in enumerate(reversed(model.block_out_channels)):
        up_block = params[f"up_blocks_{level}"]
        for i in range(model.layers_per_block + 1):
            block = up_block[f"resnets_{i}"]
            first = functools.partial(
                _first_half, model, block["norm1"], block["conv1"], statistics
            )
            h, middle = sweep(first, x, channels=features)
            second = functools.partial(_second_half, model, block, middle)
            x, statistics = sweep(second, h, x, channels=features)
            if f"attentions_{i}" in up_block:
                x = np.asarray(_attention(model, up_block[f"attentions_{i}"], x))
                statistics = _whole_statistics(x, groups)
        if "upsamplers_0" in up_block:
            up = functools.partial(_upsample, model, up_block["upsamplers_0"]["conv"])
            x, statistics = sweep(up, x, channels=features, scale=2)
    last = functools.partial(
        _first_half, model, params["conv_norm_out"], params["conv_out"], statistics
    )
    out, _ = sweep(last, x, channels=model.out_channels, groups=0)
    return out.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _up_path(
    model: AutoencoderKL, params: Any, x: AnyArray, given: list[Statistics] | None
) -> tuple[Array, list[Statistics]]:
    """The whole up path on one window; statistics are taken from ``given``, else its own."""
    seen: list[Statistics] = []

    def norm_conv(norm, conv, x):
        statistics = given[len(seen)] if given else layers.group_statistics(x, model.norm_groups)
        seen.append(statistics)
        return _norm_conv(model, norm, conv, statistics, x)

    for level in range(len(model.block_out_channels)):
        up_block = params[f"up_blocks_{level}"]
        for i in range(model.layers_per_block + 1):
            block = up_block[f"resnets_{i}"]
            h = norm_conv(block["norm1"], block["conv1"], x)
            x = _shortcut(model, block, x) + norm_conv(block["norm2"], block["conv2"], h)
            if f"attentions_{i}" in up_block:
                x = _attention(model, up_block[f"attentions_{i}"], x)
        if "upsamplers_0" in up_block:
            x = _upsample(model, up_block["upsamplers_0"]["conv"], x)
    return norm_conv(params["conv_norm_out"], params["conv_out"], x), seen


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
            row, column = _owned(kept_rows, rows, factor), _owned(kept_columns, columns, factor)
            out[
                :,
                kept_rows.start * factor : kept_rows.stop * factor,
                kept_columns.start * factor : kept_columns.stop * factor,
            ] = np.asarray(y, np.float32)[:, row > 0][:, :, column > 0]
    return out
