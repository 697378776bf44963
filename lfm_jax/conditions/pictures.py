"""A condition as a picture: what stands beside its samples in a grid."""

import numpy as np
from jaxtyping import Integer, UInt8

_HOLE = 128  # gray, which is neither the fill nor likely the picture


def picture(
    arrays: dict[str, np.ndarray], *, size: int, channels: int, num_classes: int = 0
) -> UInt8[np.ndarray, "n h w c"]:
    """The masked image, the map, or the boxes.

    Args:
        arrays: "image" and "mask" (bool), or "map", or "boxes" and "classes"; a row a condition.
        size, channels: of the pictures.
        num_classes: of the map or of the boxes.
    """
    if "mask" in arrays:
        return np.where(arrays["mask"][..., None], np.uint8(_HOLE), arrays["image"])
    if "map" in arrays:
        return _coloured(arrays["map"], num_classes, channels)
    drawn = np.zeros((len(arrays["classes"]), size, size), np.int64)
    for i, j in np.argwhere(arrays["classes"] >= 0):
        x0, y0, x1, y1 = np.round(arrays["boxes"][i, j] * size).astype(int)
        drawn[i, y0:y1, x0:x1] = 1 + arrays["classes"][i, j]
    return _coloured(drawn, num_classes + 1, channels)


def _coloured(ids: Integer[np.ndarray, "n h w"], num_classes: int, channels: int) -> np.ndarray:
    """Levels of gray, or hues around the circle; the first class is black."""
    levels = np.linspace(0, 255, max(num_classes, 2)).round().astype(np.uint8)
    if channels == 1:
        return levels[ids][..., None]
    turns = np.arange(num_classes)[:, None] * 0.618 + np.array([0, 1 / 3, 2 / 3])
    table = (127.5 + 127.5 * np.cos(2 * np.pi * turns)).astype(np.uint8)
    table[0] = 0
    return table[ids]
