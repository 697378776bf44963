"""Frechet distance between two Gaussians, the number behind FID (Heusel et al., 2017, section 2).

    d = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

The trace of the root is computed symmetrically: with ``S1 = U L U^T`` and ``R = L^(1/2) U^T``,
``S1 S2`` has the eigenvalues of the symmetric ``R S2 R^T``, so its root's trace is the sum of their
roots. No general matrix root is formed: singular covariances need no jitter, nothing turns complex, and
2048 dimensions take a second. float64 throughout. Only with the 2015-12-05 Inception weights is it FID.
"""

import numpy as np
import scipy.linalg
from jaxtyping import Float

from lfm_jax.errors import UserError
from lfm_jax.evaluate.statistics import FeatureStatistics


def frechet_distance(
    mu1: Float[np.ndarray, " d"],
    sigma1: Float[np.ndarray, "d d"],
    mu2: Float[np.ndarray, " d"],
    sigma2: Float[np.ndarray, "d d"],
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
    values, vectors = scipy.linalg.eigh(sigma1, driver="evd", check_finite=False)
    # Rounding leaves eigenvalues of a singular matrix at about -1e-16 of the largest.
    root = vectors * np.sqrt(np.maximum(values, 0))
    inner = root.T @ sigma2 @ root
    eigenvalues = scipy.linalg.eigh(
        (inner + inner.T) / 2, driver="evd", eigvals_only=True, check_finite=False
    )
    return float(np.sqrt(np.maximum(eigenvalues, 0)).sum())


def frechet_of(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """`frechet_distance` of two sets of streamed features; `UserError` below two images each."""
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
