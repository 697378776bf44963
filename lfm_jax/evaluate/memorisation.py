"""Does the model copy its training images? Nearest neighbours, with held-out images to compare.

A sample close to a training image means nothing by itself: so are unseen real images. Memorising
shows where samples lie closer to the training set than held-out images do (the data-copying test of
Meehan, Chaudhuri and Dasgupta, 2020, with one cell).
"""

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Float, Integer

from lfm_jax.evaluate.precision_recall import squared_distances


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Nearest training images of the samples.

    Attributes:
        distance: of every sample to its nearest training image, in feature space.
        nearest: which training image that is.
        share: of samples nearer than the nearest 1 % of held-out images; 0.01 if none is copied.
        z_score: of the Mann-Whitney test that samples are farther than held-out images; below -3
            is copying, far above 3 is underfitting.
        suspects: samples in order of their distance, the most suspicious first.
    """

    distance: Float[np.ndarray, " n"]
    nearest: Integer[np.ndarray, " n"]
    share: float
    z_score: float
    suspects: Integer[np.ndarray, " n"]


def nearest_neighbours(
    queries: Float[np.ndarray, "n d"], features: Float[np.ndarray, "m d"], *, chunk: int = 2048
) -> tuple[Float[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
    """Distance and index of each query's nearest feature."""
    distance = np.empty(len(queries), np.float32)
    nearest = np.empty(len(queries), np.int64)
    for part, block in squared_distances(queries, features, chunk=chunk):
        nearest[part] = block.argmin(1)
        distance[part] = np.sqrt(block.min(1))
    return distance, nearest


def memorisation(
    samples: Float[np.ndarray, "n d"],
    train: Float[np.ndarray, "m d"],
    held_out: Float[np.ndarray, "k d"],
    *,
    chunk: int = 2048,
) -> Memorisation:
    """Compare how near `samples` and `held_out` real images come to the training images `train`."""
    distance, nearest = nearest_neighbours(samples, train, chunk=chunk)
    yardstick, _ = nearest_neighbours(held_out, train, chunk=chunk)
    statistic = scipy.stats.mannwhitneyu(distance, yardstick).statistic
    n, k = len(distance), len(yardstick)
    return Memorisation(
        distance=distance,
        nearest=nearest,
        share=float((distance < np.quantile(yardstick, 0.01)).mean()),
        z_score=float((statistic - n * k / 2) / np.sqrt(n * k * (n + k + 1) / 12)),
        suspects=np.argsort(distance),
    )
