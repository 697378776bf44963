"""One 3x3 convolution over maps of any size, tile by tile, with the group norms of the whole map.

Between two group norms of the autoencoder lies one 3x3 convolution, so that a tile needs a halo of
one pixel, and the statistics of the next norm are summed over all tiles before the next sweep. Maps
lie in host memory, tiles on the device. Every value is computed once, up to rounding the same.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lfm_jax.vae import layers
from lfm_jax.vae.autoencoder import AnyArray, AutoencoderKL

Statistics = tuple[Any, Any]


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


def scaled(part: slice, scale: float | int, origin: int = 0) -> slice:
    """Where a part of the input lies in the output, counted from the input's `origin`."""
    return slice(int((part.start - origin) * scale), int((part.stop - origin) * scale))


def owned(kept: slice, window: slice, scale: float | int) -> np.ndarray:
    """1 where a window's output is kept, 0 in its halo."""
    mask = np.zeros(int((window.stop - window.start) * scale), np.float32)
    mask[scaled(kept, scale, window.start)] = 1
    return mask


def sweep(
    function: Callable[..., Array],
    maps: tuple[np.ndarray, ...],
    *,
    channels: int,
    tile: int,
    scale: float | int = 1,
    halo: int = 1,
    look: Callable[[Array, np.ndarray, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Apply one 3x3 convolution's worth of network to whole maps.

    Args:
        function: of tiles of `maps`.
        maps: ``[b, h, w, c]``, equally large.
        channels: of the output.
        tile: side of a tile of the input.
        scale: the output's side over the input's. With 1/2 tile and halo must be even, so that a
            window's pixels are halved in the same pairs as the map's.
        halo: pixels around a tile that are read and whose output is dropped.
        look: is shown each window's output, and which of its rows and columns are kept.
    """
    b, h, w, _ = maps[0].shape
    out = np.empty((b, int(h * scale), int(w * scale), channels), maps[0].dtype)
    for rows, kept_rows in windows(h, tile, halo):
        for columns, kept_columns in windows(w, tile, halo):
            y = function(*(m[:, rows, columns] for m in maps))
            row, column = owned(kept_rows, rows, scale), owned(kept_columns, columns, scale)
            if look is not None:
                look(y, row, column)
            kept = np.asarray(y)[:, row > 0][:, :, column > 0]
            out[:, scaled(kept_rows, scale), scaled(kept_columns, scale)] = kept
    return out


def measured_sweep(
    function: Callable[..., Array],
    maps: tuple[np.ndarray, ...],
    *,
    groups: int,
    **options: Any,
) -> tuple[np.ndarray, Statistics]:
    """`sweep`, and the statistics of its output for the norm of `groups` groups behind it."""
    parts = []

    def look(y: Array, row: np.ndarray, column: np.ndarray) -> None:
        parts.append(tile_statistics(y, row, column, groups))

    out = sweep(function, maps, look=look, **options)
    return out, merge(parts)


@functools.partial(jax.jit, static_argnums=3)
def tile_statistics(y: AnyArray, row: AnyArray, column: AnyArray, groups: int) -> tuple[Array, ...]:
    """Count, mean and sum of squared deviations of the kept pixels, per image and group."""
    b, h, w, c = y.shape
    kept = (row[:, None] * column[None, :]).reshape(1, h * w, 1, 1)
    y = y.astype(jnp.float32).reshape(b, h * w, groups, c // groups)
    count = kept.sum() * (c // groups)
    mean = jnp.sum(y * kept, axis=(1, 3)) / count
    deviation = jnp.sum(jnp.square(y - mean[:, None, :, None]) * kept, axis=(1, 3))
    return count, mean, deviation


def whole_statistics(x: np.ndarray, groups: int) -> Statistics:
    """Statistics of a map that is small enough for one piece."""
    rows, columns = np.ones(x.shape[1], np.float32), np.ones(x.shape[2], np.float32)
    return merge([tile_statistics(x, rows, columns, groups)])


def merge(parts: list[tuple[AnyArray, ...]]) -> Statistics:
    """Statistics of the union (Chan, Golub & LeVeque 1979), in float64."""
    counts, means, deviations = (
        np.stack([np.asarray(p[i], np.float64) for p in parts]) for i in range(3)
    )
    weights = (counts / counts.sum())[:, None, None]
    mean = (weights * means).sum(0)
    spread = (counts[:, None, None] * np.square(means - mean)).sum(0)
    variance = (deviations.sum(0) + spread) / counts.sum()
    return mean.astype(np.float32), variance.astype(np.float32)


def norm_conv(
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
    return plain_conv(model, conv, jax.nn.silu(h))


def plain_conv(model: AutoencoderKL, conv: Any, x: AnyArray, padding=layers.SAME) -> Array:
    """A convolution with the parameters `conv`, as the module's own."""
    kernel, bias = (jnp.asarray(conv[k], model.dtype) for k in ("kernel", "bias"))
    return layers.convolve(jnp.asarray(x), kernel, bias, padding=padding, precision=model.precision)


def shortcut(model: AutoencoderKL, block: Any, x: AnyArray) -> Array:
    """What a residual block adds its output to: `x` in the block's channels."""
    if "conv_shortcut" in block:
        return plain_conv(model, block["conv_shortcut"], x, layers.NONE)
    return jnp.asarray(x)


first_half = functools.partial(jax.jit, static_argnums=0)(norm_conv)


@functools.partial(jax.jit, static_argnums=0)
def second_half(model, block, statistics, h, x):
    """The second norm and convolution of a residual block on a piece, and the sum."""
    y = norm_conv(model, block["norm2"], block["conv2"], statistics, h)
    return y + shortcut(model, block, x)


@functools.partial(jax.jit, static_argnums=0)
def attention(model, params, x):
    """The self-attention of the middle block, on a whole map."""
    module = layers.Attention(
        model.norm_groups, model.norm_eps, dtype=model.dtype, precision=model.precision
    )
    return module.apply({"params": params}, x)


def residual_blocks(
    model: AutoencoderKL,
    level: Any,
    blocks: int,
    x: np.ndarray,
    statistics: Statistics,
    *,
    channels: int,
    tile: int,
) -> tuple[np.ndarray, Statistics]:
    """The residual blocks of a level over a whole map, each in two sweeps; attention untiled."""
    options = {"channels": channels, "groups": model.norm_groups, "tile": tile}
    for i in range(blocks):
        block = level[f"resnets_{i}"]
        first = functools.partial(first_half, model, block["norm1"], block["conv1"], statistics)
        h, middle = measured_sweep(first, (x,), **options)
        second = functools.partial(second_half, model, block, middle)
        x, statistics = measured_sweep(second, (h, x), **options)
        if f"attentions_{i}" in level:
            x = np.asarray(attention(model, level[f"attentions_{i}"], x))
            statistics = whole_statistics(x, model.norm_groups)
    return x, statistics
