"""Figures of merit: from feature sets to numbers, with what they depend on."""

from lfm_jax.evaluate.bootstrap import Interval, bootstrap
from lfm_jax.evaluate.cmmd import cmmd
from lfm_jax.evaluate.collect import FeatureSet, collect_features
from lfm_jax.evaluate.fid import frechet_distance, frechet_of
from lfm_jax.evaluate.inception_score import inception_score
from lfm_jax.evaluate.inpainting import inpainting_discrimination
from lfm_jax.evaluate.kid import kid, polynomial_mmd2
from lfm_jax.evaluate.measure import ENOUGH, METRICS, bias_note, measure, metric_name
from lfm_jax.evaluate.memorisation import Memorisation, memorisation, nearest_neighbours
from lfm_jax.evaluate.pixels import UINT8_RULES, jpeg_round_trip, to_bytes
from lfm_jax.evaluate.precision_recall import ManifoldFigures, precision_recall
from lfm_jax.evaluate.reference import (
    Reference,
    check_comparable,
    make_reference,
    statistics_of,
)
from lfm_jax.evaluate.reference_files import FORMATS, read_reference, write_reference
from lfm_jax.evaluate.samples import (
    SampleFile,
    Samples,
    check_images,
    read_samples,
    write_samples,
)
from lfm_jax.evaluate.statistics import FeatureStatistics, StreamingStatistics

__all__ = [
    "ENOUGH",
    "FORMATS",
    "METRICS",
    "UINT8_RULES",
    "FeatureSet",
    "FeatureStatistics",
    "Interval",
    "ManifoldFigures",
    "Memorisation",
    "Reference",
    "SampleFile",
    "Samples",
    "StreamingStatistics",
    "bias_note",
    "bootstrap",
    "check_comparable",
    "check_images",
    "cmmd",
    "collect_features",
    "frechet_distance",
    "frechet_of",
    "inception_score",
    "inpainting_discrimination",
    "jpeg_round_trip",
    "kid",
    "make_reference",
    "measure",
    "memorisation",
    "metric_name",
    "nearest_neighbours",
    "polynomial_mmd2",
    "precision_recall",
    "read_reference",
    "read_samples",
    "statistics_of",
    "to_bytes",
    "write_reference",
    "write_samples",
]
