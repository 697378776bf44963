"""Streaming mean and covariance in float64, mergeable across batches, devices and processes.

With ``n`` rows, mean ``m`` and scatter ``M = sum (x - m)(x - m)^T``, two sets merge exactly as

    m = m1 + d n2/n,   M = M1 + M2 + d d^T n1 n2/n,   d = m2 - m1

(Chan, Golub and LeVeque, 1979). The scatter is always taken about the batch's own mean, so nothing
cancels however far the features lie from the origin. Everything happens on the host in float64:
devices keep float32, and summing 50,000 squares there loses the digits that a small distance needs.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from lfm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Count, mean and scatter of feature rows; values are never changed in place.

    Attributes:
        count: n, rows seen.
        mean: float64 ``[d]``.
        scatter: float64 ``[d, d]``, ``sum (x - mean)(x - mean)^T``.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def empty(cls, dim: int) -> "FeatureStatistics":
        """No rows of width `dim`."""
        return cls(count=0, mean=np.zeros(dim), scatter=np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> "FeatureStatistics":
        """Statistics of the rows of `features`, n >= 1."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(count=len(features), mean=mean, scatter=centred.T @ centred)

    @classmethod
    def from_moments(
        cls, mean: Float[np.ndarray, " d"], covariance: Float[np.ndarray, "d d"], count: int
    ) -> "FeatureStatistics":
        """From a stored mean and unbiased covariance of `count` rows."""
        scatter = np.asarray(covariance, np.float64) * (count - 1)
        return cls(count=count, mean=np.asarray(mean, np.float64), scatter=scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased covariance (ddof 1, as ``np.cov``); `UserError` below two rows."""
        if self.count < 2:
            raise UserError(f"feature statistics: {self.count} images; accepted: at least 2")
        return self.scatter / (self.count - 1)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of the union of both sets of rows."""
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(delta, delta) * (self.count * other.count / count)
        mean = self.mean + delta * (other.count / count)
        return FeatureStatistics(count=count, mean=mean, scatter=scatter)

    def update(self, features: Float[np.ndarray, "n d"]) -> "FeatureStatistics":
        """Statistics with the rows of `features` added; no rows change nothing."""
        return self.merge(FeatureStatistics.of(features)) if len(features) else self

    def merge_processes(self) -> "FeatureStatistics":
        """The union over all JAX processes, the same on each; exact to the last bit of float64.

        Collectives carry at most float32 unless x64 is enabled, so the bits travel as integers.
        """
        total = FeatureStatistics.empty(len(self.mean))
        counts = gather_bits(np.array([self.count], np.int64))
        for count, mean, scatter in zip(
            counts, gather_bits(self.mean), gather_bits(self.scatter), strict=True
        ):
            total = total.merge(FeatureStatistics(count=int(count[0]), mean=mean, scatter=scatter))
        return total


class StreamingStatistics:
    """Collects rows and reduces them in large blocks: a rank-100 update of a 2048 x 2048 scatter is
    bound by memory, a rank-2048 one by arithmetic.
    """

    def __init__(self) -> None:
        self._total: FeatureStatistics | None = None
        self._rows: list[np.ndarray] = []

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Add rows."""
        self._rows.append(features)
        if sum(map(len, self._rows)) >= 2048:
            self._reduce()

    def result(self) -> FeatureStatistics:
        """Statistics of the rows so far; `UserError` if there were none."""
        self._reduce()
        if self._total is None:
            raise UserError("feature statistics: 0 images; accepted: at least 2")
        return self._total

    def _reduce(self) -> None:
        if self._rows:
            block = FeatureStatistics.of(np.concatenate(self._rows))
            self._total = block if self._total is None else self._total.merge(block)
            self._rows = []


def gather_bits(array: np.ndarray) -> np.ndarray:
    """``[processes, ...]``: `array` of every process, bit for bit, whatever its dtype.

    All processes call it with the same shape and dtype.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return array[None]
    words = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    gathered = np.asarray(multihost_utils.process_allgather(words))
    return gathered.reshape(jax.process_count(), -1).view(array.dtype).reshape(-1, *array.shape)
