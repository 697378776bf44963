"""What tells whether a condition was obeyed: errors in a hole, overlap of maps, crops of boxes."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8


def psnr(
    a: UInt8[np.ndarray, "n h w c"],
    b: UInt8[np.ndarray, "n h w c"],
    where: Bool[np.ndarray, "n h w"],
) -> float:
    """``10 log10(255^2 / MSE)`` in dB over all pixels of `where`; infinite where they are equal.

    The error is pooled before the logarithm, so that one perfect image does not carry the mean.
    """
    error = np.square(a.astype(np.float64) - b)[where]
    return float(10 * np.log10(255.0**2 / error.mean())) if error.any() else float("inf")


def class_means(
    source: Any, num_classes: int, *, batch_size: int = 500
) -> UInt8[np.ndarray, "k h w c"]:
    """The mean image of each class; that of all where a class has none, or there are no classes.

    Args:
        source: ``len`` and ``batch(indices)``, see `lfm_jax.data.ImageSource`.
        num_classes: k; 0 gives the one mean of all.
        batch_size: images in memory at a time.
    """
    sums, counts = np.float64(0), np.zeros(max(num_classes, 1))
    for start in range(0, len(source), batch_size):
        batch = source.batch(np.arange(start, min(start + batch_size, len(source))))
        labels = batch["label"] if num_classes else np.zeros(len(batch["image"]), np.int64)
        member = np.eye(len(counts))[labels]
        sums = sums + np.einsum("nk,n...->k...", member, batch["image"].astype(np.float64))
        counts += member.sum(0)
    sums = np.where((counts > 0)[:, None, None, None], sums, np.sum(sums, 0, keepdims=True))
    counts = np.where(counts > 0, counts, counts.sum())
    return (sums / counts[:, None, None, None]).round().astype(np.uint8)


def confusion(
    a: Integer[np.ndarray, "*s"], b: Integer[np.ndarray, "*s"], num_classes: int
) -> Int[np.ndarray, "k k"]:
    """Counts of pixels by their class in `a` (row) and in `b` (column)."""
    pairs = a.astype(np.int64).ravel() * num_classes + b.astype(np.int64).ravel()
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(
    a: Integer[np.ndarray, "*s"], b: Integer[np.ndarray, "*s"], num_classes: int
) -> tuple[float, Float[np.ndarray, " k"]]:
    """Intersection over union of each class over all pixels together, and their mean.

    Classes that occur in neither are left out of the mean (and NaN).
    """
    counts = confusion(a, b, num_classes)
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    iou = np.where(union > 0, np.diag(counts) / np.maximum(union, 1), np.nan)
    return float(np.nanmean(iou)), iou


def pairwise_distance(samples: UInt8[np.ndarray, "n k h w c"]) -> float:
    """Mean root-mean-square distance, in bytes, between two samples of one condition."""
    distances = [
        np.sqrt(np.square(samples[:, i].astype(np.float64) - samples[:, j]).mean((1, 2, 3)))
        for i, j in itertools.combinations(range(samples.shape[1]), 2)
    ]
    return float(np.mean(distances))


def crops(
    images: UInt8[np.ndarray, "n h w c"],
    boxes: Float[np.ndarray, "n m 4"],
    classes: Int[np.ndarray, "n m"],
    *,
    size: int,
) -> dict[str, Any]:
    """What lies in each box, resized to squares.

    Returns:
        "image" uint8 ``[k, size, size, c]``, "label" ``[k]``, "index" ``[k]`` (whose box it is).
    """
    from PIL import Image

    cut, labels, owners = [], [], []
    side = images.shape[1]
    for i, j in np.argwhere(classes >= 0):
        x0, y0, x1, y1 = np.round(boxes[i, j] * side).astype(int)
        piece = images[i, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        picture = Image.fromarray(piece[..., 0] if piece.shape[-1] == 1 else piece)
        picture = picture.resize((size, size), resample=Image.Resampling.BILINEAR)
        cut.append(np.asarray(picture).reshape(size, size, -1))
        labels.append(classes[i, j])
        owners.append(i)
    return {
        "image": np.stack(cut),
        "label": np.asarray(labels, np.int32),
        "index": np.asarray(owners),
    }


def outside_boxes(
    boxes: Float[np.ndarray, "n m 4"], classes: Int[np.ndarray, "n m"], side: int
) -> Bool[np.ndarray, "n h w"]:
    """The pixels that no box covers."""
    empty = np.ones((len(boxes), side, side), bool)
    for i, j in np.argwhere(classes >= 0):
        x0, y0, x1, y1 = np.round(boxes[i, j] * side).astype(int)
        empty[i, y0:y1, x0:x1] = False
    return empty


def box_iou(
    images: UInt8[np.ndarray, "n h w c"],
    boxes: Float[np.ndarray, "n m 4"],
    classes: Int[np.ndarray, "n m"],
    *,
    threshold: int,
) -> float:
    """Mean overlap of each asked box with the extent of what was drawn in and around it.

    On a black canvas whose boxes do not overlap, an object's extent can be read from the pixels: of
    each box, widened by two pixels but not into its neighbours, the tight box around what is
    brighter than `threshold`. A digit leaves a margin in its own box, so compare with what real
    canvases reach.
    """
    side, values = images.shape[1], []
    bright = images.max(-1) > threshold
    corners = np.round(boxes * side).astype(int)
    for i, j in np.argwhere(classes >= 0):
        seen = bright[i].copy()
        for other in np.flatnonzero(classes[i] >= 0):
            if other != j:
                x0, y0, x1, y1 = corners[i, other]
                seen[y0:y1, x0:x1] = False
        x0, y0, x1, y1 = corners[i, j]
        near = np.zeros_like(seen)
        near[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = True
        rows, columns = np.nonzero(seen & near)
        if not len(rows):
            values.append(0.0)
            continue
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        common = max(min(bottom, y1) - max(top, y0), 0) * max(min(right, x1) - max(left, x0), 0)
        area = (bottom - top) * (right - left) + (y1 - y0) * (x1 - x0)
        values.append(common / (area - common))
    return float(np.mean(values))
