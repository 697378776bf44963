"""Frechet distance between two Gaussians, the number behind FID (Heusel et al., 2017, section 2).

    d = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

No matrix root is formed: with pivoted Cholesky factors ``S1 = F F^T``, ``S2 = G G^T`` the trace is
the sum of the singular values of ``F^T G``. The factors drop the null space, so singular
covariances need no jitter and nothing turns complex; 2048 dimensions take a second or two. float64
throughout. Only with the published Inception weights is it FID.
"""

from typing import Any, cast

import numpy as np
import scipy.linalg
from jaxtyping import Float

from lfm_jax.errors import UserError
from lfm_jax.evaluate.statistics import FeatureStatistics


def frechet_distance(
    mu1: Float[np.ndarray, " d"],
    sigma1: Float[np.ndarray, "_ _"],
    mu2: Float[np.ndarray, " _"],
    sigma2: Float[np.ndarray, "_ _"],
) -> float:
    """Frechet distance of N(mu1, sigma1) and N(mu2, sigma2); symmetric, 0 for equal arguments.

    Covariances may be singular. Raises `UserError` if shapes differ or a value is not finite.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, np.float64) for a in (mu1, mu2, sigma1, sigma2))
    dim = len(mu1)
    for name, array, shape in (
        ("mu2", mu2, (dim,)),
        ("sigma1", sigma1, (dim, dim)),
        ("sigma2", sigma2, (dim, dim)),
    ):
        if array.shape != shape:
            raise UserError(f"frechet_distance: {name} has shape {array.shape}; accepted: {shape}")
    if not all(np.isfinite(a).all() for a in (mu1, mu2, sigma1, sigma2)):
        raise UserError(
            "frechet_distance: a mean or covariance is not finite; accepted: finite values"
        )
    difference = mu1 - mu2
    trace_root = _trace_root(sigma1, sigma2)
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)


def _trace_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) of two positive semidefinite matrices."""
    product = _factor(sigma1).T @ _factor(sigma2)
    if not product.size:
        return 0.0
    if product.shape[0] < product.shape[1]:
        product = product.T
    squares = scipy.linalg.eigh(
        product.T @ product, driver="evr", eigvals_only=True, check_finite=False
    )
    largest = max(squares[-1], np.finfo(float).tiny)
    roots = np.sqrt(np.maximum(squares, 0))
    # Squaring costs small singular values half their digits: an eigenvalue v is off by about the
    # floor, its root by floor / (2 sqrt v) of either sign, and near the floor all upwards.
    floor = np.finfo(float).eps * largest
    clear = squares > 100 * floor
    error = np.sqrt((floor**2 / (4 * squares[clear])).sum()) + (~clear).sum() * np.sqrt(floor)
    if error > 1e-8 * roots.sum():  # then take them directly, which is slower
        roots = cast(np.ndarray, scipy.linalg.svdvals(product, check_finite=False))
    return float(roots.sum())


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F ``[d, rank]`` with ``sigma = F F^T``, by Cholesky with complete pivoting."""
    pstrf: Any = scipy.linalg.get_lapack_funcs("pstrf", dtype=np.float64)
    packed, pivots, rank, _ = pstrf(sigma, lower=1)
    factor = np.empty((len(sigma), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor


def frechet_of(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """`frechet_distance` of two sets of streamed features; `UserError` below two images each."""
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
