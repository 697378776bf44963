"""Resizing exactly as the libraries do whose numbers are compared with.

Every rule is separable and linear: ``y = A_h x A_w^T`` with one row of weights per output pixel,
built in float64 on the host and applied as two matrix products, on the device and differentiable.

==============  ====================================================  ==========================
rule            weights of output pixel i, scale = in / out           who uses it
==============  ====================================================  ==========================
``tf1``         2 taps at ``i * scale``; no half pixel, no antialias  ADM, torch-fidelity, EDM
``torch``       2 taps at ``(i + 1/2) scale - 1/2``; no antialias     pytorch-fid, and LFM by it
``clean``       bicubic (a = -1/2) stretched by ``max(scale, 1)``     clean-fid (PIL, mode F)
``bicubic``     the same, not clipped                                 EDM2's DINOv2 (torch)
``bilinear``    triangle stretched by ``max(scale, 1)``               PIL and antialiased torch
``lanczos``     3-lobed sinc stretched by ``max(scale, 1)``           PIL
==============  ====================================================  ==========================

The antialiased rules sample their kernel at the centres of the source pixels in reach and normalise
each row to one. ``clean`` clips to [0, 255] at the end as clean-fid does, since bicubic overshoots.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.errors import UserError


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


KERNELS = {
    "clean": (_bicubic, 2.0),
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_triangle, 1.0),
    "lanczos": (_lanczos, 3.0),
}
RULES = ("tf1", "torch", *KERNELS)


@functools.lru_cache(maxsize=64)
def resize_matrix(size_in: int, size_out: int, rule: str) -> np.ndarray:
    """Weights float32 ``[size_out, size_in]`` of one axis; each row sums to one.

    Raises `UserError` for an unknown rule.
    """
    if rule not in RULES:
        raise UserError(f"resize rule: {rule!r}; accepted: {', '.join(RULES)}")
    scale = size_in / size_out
    out = np.arange(size_out)
    if rule in KERNELS:
        kernel, reach = KERNELS[rule]
        # Torch places its kernel in float32, Pillow in double: 2e-3 of a level at 512 pixels.
        real = np.float32 if rule == "bicubic" else np.float64
        scale = real(scale)
        stretch = max(scale, real(1))
        centre = (out + real(0.5)) * scale
        # Source pixels in reach are counted in whole pixels, the way Pillow rounds its window.
        low = np.maximum(np.floor(centre - reach * stretch + 0.5), 0)
        high = np.minimum(np.floor(centre + reach * stretch + 0.5), size_in)
        source = np.arange(size_in)
        offset = source[None].astype(real) - centre[:, None] + real(0.5)
        weights = kernel(offset * (real(1) / stretch)).astype(np.float64)
        weights *= (source[None] >= low[:, None]) & (source[None] < high[:, None])
    else:
        # Float32 positions on purpose: both libraries compute them so, and at large sizes the
        # rounding of `i * scale` is visible at 1e-4.
        scale32 = np.float32(scale)
        if rule == "tf1":
            position = out.astype(np.float32) * scale32
        else:
            half = np.float32(0.5)
            position = np.maximum((out.astype(np.float32) + half) * scale32 - half, 0)
        low = np.minimum(np.floor(position).astype(int), size_in - 1)
        high = np.minimum(low + 1, size_in - 1)
        fraction = position.astype(np.float64) - low
        weights = np.zeros((size_out, size_in))
        np.add.at(weights, (out, low), 1 - fraction)
        np.add.at(weights, (out, high), fraction)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize(
    pixels: Float[Array | np.ndarray, "b h w c"], size: tuple[int, int], *, rule: str
) -> Float[Array, "b h2 w2 c"]:
    """Resize float `pixels` on [0, 255] to ``size = (height, width)`` by `rule`, unrounded."""
    pixels = jnp.asarray(pixels)
    height, width = pixels.shape[1:3]
    rows, columns = resize_matrix(height, size[0], rule), resize_matrix(width, size[1], rule)
    if (height, width) != tuple(size):
        with jax.default_matmul_precision("highest"):
            # Width first like PIL: the order shows at the edges once intermediate values overshoot.
            pixels = jnp.einsum("bhwc,vw->bhvc", pixels, columns)
            pixels = jnp.einsum("bhvc,uh->buvc", pixels, rows)
    return jnp.clip(pixels, 0, 255) if rule in ("clean", "lanczos") else pixels


def center_crop(
    pixels: Float[Array | np.ndarray, "b h w c"], size: int, *, rule: str
) -> Float[Array, "b s s c"]:
    """Resize the shorter side to `size` by `rule` and cut the centre square out."""
    height, width = pixels.shape[1:3]
    scale = size / min(height, width)
    # Torchvision truncates the longer side; rounding would shift the crop by half a pixel.
    target = (size, int(width * scale)) if height <= width else (int(height * scale), size)
    pixels = resize(pixels, target, rule=rule)
    top, left = (round((target[0] - size) / 2.0), round((target[1] - size) / 2.0))
    return pixels[:, top : top + size, left : left + size]
