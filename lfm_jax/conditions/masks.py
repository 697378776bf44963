"""Masks for inpainting: which pixels of an image are a hole (True) and which are known (False).

| name | holes | after |
|---|---|---|
| ``strokes`` | 0 to 10 bent strokes of 1 to 5 segments | LaMa, Suvorov et al. 2022, 2.3 |
| ``boxes`` | 0 to 3 rectangles, sides 30 to 100 | the same |
| ``lama`` | one of the two, at even odds | the same, with its library's default numbers |
| ``freeform`` | rectangles up to the whole image, wide strokes | MAT, Li et al. 2022, 4.1 |
| ``half`` | the left, right, upper or lower half | RePaint, Lugmayr et al. 2022 |
| ``center`` | the central square of half the side | the preview of latent flow matching |
| ``outpaint`` | all but a rectangle that covers a quarter of the image | |
| ``all`` | everything: generation | |
| ``paper`` | ``lama``, and a mask may be empty | what latent flow matching trained on |

Lengths are for images of 256 pixels and scale with the side. Several names joined by "+" are drawn
from at even odds. A mask without a hole is drawn again, except by ``paper``: an empty mask teaches
the copying of an image that is given. A mask is a function of its generator alone; callers seed one
by the example's number.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, UInt8

from lfm_jax.errors import UserError

Mask = Bool[np.ndarray, "h w"]
_SIDE = 256  # the side that the lengths are given for
_TRIES = 100


def draw_mask(
    names: str, random: np.random.Generator, size: int, *, allow_empty: bool = False
) -> Mask:
    """One mask ``[size, size]``, True where the hole is.

    Args:
        names: of `MASKS`, several joined by "+".
        random: draws everything.
        size: side of the image in pixels.
        allow_empty: take a mask without a hole, too (``paper`` always does).

    Raises:
        UserError: an unknown name.
    """
    choices = check_masks(names)
    for _ in range(_TRIES):
        name = choices[random.integers(len(choices))] if len(choices) > 1 else choices[0]
        mask = MASKS[name](random, size)
        if allow_empty or name == "paper" or mask.any():
            return mask
    return _center(random, size)


def draw_masks(
    names: str, seed: int, indices: np.ndarray, variants: int, size: int
) -> Bool[np.ndarray, "n k h w"]:
    """`variants` masks for each example, a function of seed, the example's number and the place."""
    masks = np.zeros((len(indices), variants, size, size), bool)
    for row, index in enumerate(indices):
        for k in range(variants):
            masks[row, k] = draw_mask(names, np.random.default_rng([seed, int(index), k]), size)
    return masks


def check_masks(names: str) -> list[str]:
    """The names of a choice such as "lama+half".

    Raises:
        UserError: one of them is unknown.
    """
    choices = names.split("+")
    for name in choices:
        if name not in MASKS:
            raise UserError(f"masks: {name!r} is none of {', '.join(MASKS)} (join several by +)")
    return choices


def pack(masks: Bool[np.ndarray, "*n h w"]) -> UInt8[np.ndarray, "*n bytes"]:
    """Eight pixels a byte, rows one after the other: what the latent cache holds."""
    return np.packbits(masks.reshape(*masks.shape[:-2], -1), axis=-1)


def unpack(packed: UInt8[np.ndarray, "*n bytes"], size: int) -> Bool[np.ndarray, "*n h w"]:
    """The inverse of `pack` for square masks."""
    bits = np.unpackbits(packed, axis=-1, count=size * size).astype(bool)
    return bits.reshape(*packed.shape[:-1], size, size)


# ---- the generators


def _strokes(random: np.random.Generator, size: int) -> Mask:
    scale, lines = size / _SIDE, []
    for _ in range(random.integers(0, 11)):
        point, points = random.integers(0, size, 2).astype(float), []
        points.append(point)
        width = random.integers(5, 25) * scale
        for j in range(random.integers(1, 6)):
            angle = 0.01 + random.integers(0, 4)
            angle = angle if j % 2 else -angle
            step = random.integers(10, 70) * scale * np.array([np.sin(angle), np.cos(angle)])
            points.append(np.clip(points[-1] + step, 0, size))
        lines.append((points, width))
    return _drawn(lines, size)


def _boxes(random: np.random.Generator, size: int) -> Mask:
    scale, mask = size / _SIDE, np.zeros((size, size), bool)
    margin = round(10 * scale)
    for _ in range(random.integers(0, 4)):
        height, width = (round(side * scale) for side in random.integers(30, 101, 2))
        top = random.integers(margin, size - margin - height + 1)
        left = random.integers(margin, size - margin - width + 1)
        mask[top : top + height, left : left + width] = True
    return mask


def _lama(random: np.random.Generator, size: int) -> Mask:
    return (_strokes if random.random() < 0.5 else _boxes)(random, size)


def _freeform(random: np.random.Generator, size: int) -> Mask:
    """Rectangles that may reach over the border, then strokes whose bends lie near 72 degrees."""
    mask = np.zeros((size, size), bool)
    for most, side in ((10, size // 2), (5, size)):
        for _ in range(random.integers(0, most)):
            height, width = random.integers(1, side + 1, 2)
            top = random.integers(-(height // 2), size - height // 2)
            left = random.integers(-(width // 2), size - width // 2)
            mask[max(top, 0) : top + height, max(left, 0) : left + width] = True
    scale, lines = size / _SIDE, []
    for _ in range(random.integers(0, 20)):
        low, high = (2 * np.pi / 5 + sign * random.uniform(0, 2 * np.pi / 15) for sign in (-1, 1))
        points = [random.uniform(0, size, 2)]
        for j in range(random.integers(4, 18)):
            angle = random.uniform(low, high)
            angle = angle if j % 2 else 2 * np.pi - angle
            mean = np.sqrt(2) * size / 8
            length = np.clip(random.normal(mean, mean / 2), 0, 2 * mean)
            step = length * np.array([np.cos(angle), np.sin(angle)])
            points.append(np.clip(points[-1] + step, 0, size))
        lines.append((points, random.uniform(12, 48) * scale))
    strokes = _drawn(lines, size)
    for axis in (0, 1):
        if random.random() < 0.5:
            strokes = np.flip(strokes, axis)
    return mask | strokes


def _half(random: np.random.Generator, size: int) -> Mask:
    mask = np.zeros((size, size), bool)
    mask[: size // 2] = True
    return np.rot90(mask, int(random.integers(4))).copy()


def _center(random: np.random.Generator, size: int) -> Mask:
    del random
    mask = np.zeros((size, size), bool)
    quarter = size // 4
    mask[quarter : size - quarter, quarter : size - quarter] = True
    return mask


def _outpaint(random: np.random.Generator, size: int) -> Mask:
    """A quarter of the area is known, of an aspect between 1:2 and 2:1, anywhere."""
    aspect = np.exp(random.uniform(-np.log(2), np.log(2)) / 2)
    height = int(np.clip(round(size / 2 * aspect), 1, size))
    width = int(np.clip(round(size / 2 / aspect), 1, size))
    top, left = random.integers(0, size - height + 1), random.integers(0, size - width + 1)
    mask = np.ones((size, size), bool)
    mask[top : top + height, left : left + width] = False
    return mask


def _all(random: np.random.Generator, size: int) -> Mask:
    del random
    return np.ones((size, size), bool)


def _drawn(lines: list[tuple[list[np.ndarray], float]], size: int) -> Mask:
    """Polylines with round joints and ends; a stroke is at least a pixel wide."""
    from PIL import Image, ImageDraw

    picture = Image.new("1", (size, size))
    draw = ImageDraw.Draw(picture)
    for points, width in lines:
        radius = max(width / 2, 0.5)
        corners = [tuple(point) for point in points]
        draw.line(corners, fill=1, width=max(round(width), 1))
        for x, y in corners:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.array(picture)


MASKS: dict[str, Callable[[np.random.Generator, int], Mask]] = {
    "strokes": _strokes,
    "boxes": _boxes,
    "lama": _lama,
    "freeform": _freeform,
    "half": _half,
    "center": _center,
    "outpaint": _outpaint,
    "all": _all,
    "paper": _lama,
}
