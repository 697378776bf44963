"""Sums over latents from which their mean and spread follow, added up shard by shard."""

import math
from typing import Any

import numpy as np


class Totals:
    """Sums over a shard from which mean and variance of the posterior's samples follow.

    Per channel: var z = E[mean^2] - E[mean]^2 + E[exp logvar], over examples and positions, and
    over the mirror images where they are stored.
    """

    def __init__(self, channels: int):
        self.count, self.values, self.largest_label = 0, 0, -1
        self.sum = np.zeros(channels)
        self.square = np.zeros(channels)
        self.variance = np.zeros(channels)

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Count one example in."""
        self.count += 1
        self.largest_label = max(self.largest_label, int(arrays["label"]))
        for name in ("moments", "moments_flip"):
            if name in arrays:
                moments = arrays[name].reshape(-1, arrays[name].shape[-1]).astype(np.float64)
                mean, logvar = np.split(moments, 2, axis=-1)
                self.values += len(mean)
                self.sum += mean.sum(0)
                self.square += np.square(mean).sum(0)
                self.variance += np.exp(logvar).sum(0)

    def merge(self, other: dict[str, Any]) -> None:
        """Count in what another's `to_json` gave."""
        self.count += other["count"]
        self.values += other["values"]
        self.largest_label = max(self.largest_label, other["largest_label"])
        for name in ("sum", "square", "variance"):
            setattr(self, name, getattr(self, name) + np.array(other[name]))

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON values."""
        return {
            "count": self.count,
            "values": self.values,
            "largest_label": self.largest_label,
            **{name: getattr(self, name).tolist() for name in ("sum", "square", "variance")},
        }

    def summary(self) -> dict[str, Any]:
        """What the cache's description says: classes seen, mean and spread of the channels."""
        mean = self.sum / self.values
        spread = np.maximum(self.square / self.values - mean**2, 0) + self.variance / self.values
        overall = spread.mean() + mean.var()
        return {
            "num_classes_seen": self.largest_label + 1,
            "channel_mean": mean.tolist(),
            "channel_std": np.sqrt(spread).tolist(),
            "std": math.sqrt(overall),
        }
