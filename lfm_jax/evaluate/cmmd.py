"""CMMD: a Gaussian-kernel MMD over CLIP features (Jayasumana et al., 2024, section 4).

    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),   k = exp(-|x - y|^2 / (2 * 10^2))

of unit-length features, diagonals included as in the authors' code. It assumes no Gaussian, so it
is sound at fewer images than a Frechet distance. The published values use CLIP ViT-L/14 at 336
pixels.
"""

import numpy as np
from jaxtyping import Float

from lfm_jax.evaluate.precision_recall import squared_distances


def cmmd(
    features1: Float[np.ndarray, "n d"],
    features2: Float[np.ndarray, "m d"],
    *,
    sigma: float | int = 10.0,
    scale: float | int = 1000.0,
    chunk: int = 2048,
) -> float:
    """CMMD of two sets of CLIP features (normalised here); 0 for equal sets."""

    def unit(features):
        features = np.asarray(features, np.float64)
        return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)

    def mean_kernel(a, b):
        total = 0.0
        for _, distance in squared_distances(a, b, chunk=chunk):
            # expm1: distances of unit vectors are at most 4, so every kernel value is close to 1.
            total += np.expm1(-distance.astype(np.float64) / (2 * sigma**2)).sum()
        return total / (len(a) * len(b))

    x, y = unit(features1), unit(features2)
    return float(scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)))
