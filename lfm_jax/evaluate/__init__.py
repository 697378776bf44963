"""Figures of merit: from feature sets to numbers, with what they depend on."""

from lfm_jax.evaluate.collect import FeatureSet, collect_features
from lfm_jax.evaluate.fid import frechet_distance, frechet_of
from lfm_jax.evaluate.kid import kid, polynomial_mmd2
from lfm_jax.evaluate.statistics import FeatureStatistics, StreamingStatistics

__all__ = [
    "FeatureSet",
    "FeatureStatistics",
    "StreamingStatistics",
    "collect_features",
    "frechet_distance",
    "frechet_of",
    "kid",
    "polynomial_mmd2",
]
