"""Kernel inception distance: the unbiased MMD^2 with a cubic kernel (Binkowski et al., 2018).

    k(x, y) = (<x, y> / d + 1)^3
    MMD^2 = sum_{i != j} k(x_i, x_j) / (n (n-1)) + the same of y - 2 mean_ij k(x_i, y_j)

averaged over random subsets of equal size. Unbiased, so it can be negative near zero, and unlike a
Frechet distance it means the same at any number of images.
"""

import numpy as np
from jaxtyping import Float

from lfm_jax.errors import UserError


def polynomial_mmd2(
    features1: Float[np.ndarray, "n d"],
    features2: Float[np.ndarray, "m d"],
    *,
    degree: int = 3,
    gamma: float | int | None = None,
    coef0: float | int = 1.0,
) -> float:
    """Unbiased MMD^2 of two sets under ``(gamma <x, y> + coef0)^degree``; gamma defaults to 1/d."""
    x, y = (np.asarray(f, np.float64) for f in (features1, features2))
    factor = 1 / x.shape[1] if gamma is None else gamma
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise UserError(f"kernel distance: {min(n, m)} images; accepted: at least 2")
    kxx, kyy, kxy = ((factor * (a @ b.T) + coef0) ** degree for a, b in ((x, x), (y, y), (x, y)))
    within = (kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (
        m * (m - 1)
    )
    return float(within - 2 * kxy.mean())


def kid(
    features1: Float[np.ndarray, "n d"],
    features2: Float[np.ndarray, "m d"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    degree: int = 3,
    gamma: float | int | None = None,
    coef0: float | int = 1.0,
) -> tuple[float, float]:
    """Mean and standard deviation of MMD^2 over random subsets drawn without replacement.

    Subset indices come from one ``np.random.RandomState(seed)``, first of `features1` and then of
    `features2` in every round: the defaults are torch-fidelity's, and so are the draws.

    Raises:
        UserError: `subset_size` exceeds the smaller set.
    """
    smaller = min(len(features1), len(features2))
    if subset_size > smaller:
        raise UserError(
            f"kid: subset_size {subset_size}; accepted: up to {smaller}, the images there are"
        )
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        first = features1[draw.choice(len(features1), subset_size, replace=False)]
        second = features2[draw.choice(len(features2), subset_size, replace=False)]
        values.append(polynomial_mmd2(first, second, degree=degree, gamma=gamma, coef0=coef0))
    return float(np.mean(values)), float(np.std(values))
