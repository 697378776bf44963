"""What an edit did: sides flipped, pixels moved, other attributes dragged along.

A *score* is a number an image, positive on an attribute's side: the difference of two logits, or a
measured property less its middle. Pixel distances are root mean squares over an image in units of
the full range (bytes / 255), averaged over images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8


def flip_rate(sides: Num[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """Share of images whose score lies on the other side than `sides` (-1 or +1) says."""
    return float(np.mean(np.sign(scores) == -np.sign(sides)))


def pixel_distances(
    images: UInt8[np.ndarray, "n h w c"], others: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """Root mean square difference of each pair, 0..1."""
    difference = images.astype(np.float64) - others
    return np.sqrt(np.mean(difference**2, axis=(1, 2, 3))) / 255


def pixel_distance(
    images: UInt8[np.ndarray, "n h w c"], others: UInt8[np.ndarray, "n h w c"]
) -> float:
    """The mean of `pixel_distances`."""
    return float(pixel_distances(images, others).mean())


def psnr(images: UInt8[np.ndarray, "n h w c"], others: UInt8[np.ndarray, "n h w c"]) -> float:
    """Mean over pairs of ``-20 log10`` of their distance, in dB."""
    return float(np.mean(-20 * np.log10(np.maximum(pixel_distances(images, others), 1e-6))))


def monotonicity(
    strengths: Sequence[float | int] | np.ndarray, scores: Float[np.ndarray, "k n"]
) -> dict[str, float]:
    """Spearman correlation of strength and score: of the mean score, and the mean over images."""
    whole = _spearman(strengths, scores.mean(axis=1))
    varied = [column for column in scores.T if np.ptp(column) > 0]
    each = [_spearman(strengths, column) for column in varied]
    return {"of_the_mean": whole, "mean_of_images": float(np.mean(each)) if each else 0.0}


def _spearman(x: Sequence[float | int] | np.ndarray, y: np.ndarray) -> float:
    from scipy.stats import spearmanr

    found: Any = spearmanr(x, y)  # its type is made at run time
    return float(found.statistic)


def leakage(
    before: dict[str, Float[np.ndarray, " n"]],
    after: dict[str, Float[np.ndarray, " n"]],
    deviations: dict[str, float] | None = None,
) -> dict[str, float]:
    """Mean absolute change of every attribute's score, in standard deviations.

    `deviations` are of the scores over images at large; by default those of `before`.
    """
    changes = {}
    for name, scores in before.items():
        deviation = (deviations or {}).get(name) or float(np.std(scores)) or 1.0
        changes[name] = float(np.mean(np.abs(after[name] - scores)) / deviation)
    return changes


def distance_at(flips: Sequence[float], distances: Sequence[float], level: float) -> float:
    """The distance at which a curve first reaches a flip rate, linear between its points.

    Points are in the order of strength; infinite where the curve never gets there.
    """
    last = (0.0, 0.0)
    for flip, distance in zip(flips, distances, strict=True):
        if flip >= level:
            part = (level - last[0]) / (flip - last[0]) if flip > last[0] else 1.0
            return float(last[1] + part * (distance - last[1]))
        last = (flip, distance)
    return float("inf")
