"""References: what samples are compared with, and how it was made.

A reference remembers extractor, pixel pipeline, crop, count and hashes. `check_comparable` refuses
what would compare two pipelines. `lfm_jax.evaluate.reference_files` reads and writes them.
"""

import dataclasses
from typing import Any

import numpy as np

from lfm_jax.errors import UserError
from lfm_jax.evaluate.collect import FeatureSet
from lfm_jax.evaluate.statistics import FeatureStatistics
from lfm_jax.features.inception import PIPELINES

ACCEPTED = (
    "accepted: npz of ADM, pytorch-fid, clean-fid, EDM, MeanFlow or lfm_jax, EDM2's .pkl, "
    "LFM's .npy"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference and its provenance; what the file lacks is None, "" or 0.

    Attributes:
        mu, sigma: mean ``[d]`` and covariance ``[d, d]`` of the features, float64.
        mu_s, sigma_s: of the spatial features (sFID), ``[e]`` and ``[e, e]``.
        features: rows ``[n, d]`` for KID, precision and recall.
        images: uint8 NHWC, where the file holds images (ADM's 10,000): their features make
            precision and recall.
        format: which of `reference_files.FORMATS` it was.
        pipeline: `Extractor.pipeline` of the features, "" if the file does not say.
        count: images that the statistics are of.
        provenance: source, crop, JPEG, fingerprints: whatever was recorded, and the file's sha256.
    """

    mu: np.ndarray | None = None
    sigma: np.ndarray | None = None
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    features: np.ndarray | None = None
    images: np.ndarray | None = None
    format: str = "lfm_jax"
    pipeline: str = ""
    count: int = 0
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_reference(
    features: FeatureSet,
    *,
    source: str,
    source_fingerprint: str = "",
    crop: str = "",
    jpeg_quality: int = 0,
    images: np.ndarray | None = None,
    keep_features: bool = True,
) -> Reference:
    """A reference of one pass over real images.

    Args:
        source, source_fingerprint: which images, by name and content hash.
        crop: how they were brought to their size, in words.
        jpeg_quality: of the round trip before the features, 0 for none.
        images: some of them, to be stored with the statistics as ADM does.
    """
    spatial = features.spatial
    return Reference(
        mu=features.statistics.mean,
        sigma=features.statistics.covariance,
        mu_s=None if spatial is None else spatial.mean,
        sigma_s=None if spatial is None else spatial.covariance,
        features=features.features if keep_features else None,
        images=images,
        pipeline=features.pipeline,
        count=features.count,
        provenance={
            "extractor": features.extractor,
            "extractor_fingerprint": features.fingerprint,
            "source": source,
            "source_fingerprint": source_fingerprint,
            "crop": crop,
            "jpeg_quality": jpeg_quality,
        },
    )


def statistics_of(reference: Reference) -> FeatureStatistics:
    """The reference's moments as statistics; an unknown count is taken as large."""
    if reference.mu is None or reference.sigma is None:
        raise UserError(f"reference ({reference.format}): holds no mu and sigma; {ACCEPTED}")
    return FeatureStatistics.from_moments(reference.mu, reference.sigma, reference.count or 10**9)


def check_comparable(features: FeatureSet, reference: Reference, *, force: bool = False) -> str:
    """ "" if both were made by one pipeline, a mark for the report if forced.

    Raises:
        UserError: another or an unknown pipeline, other weights or dimension, unless `force`
            (another dimension always).
    """
    dim = len(features.statistics.mean)
    if reference.mu is not None and len(reference.mu) != dim:
        raise UserError(
            f"evaluate.reference: features of {len(reference.mu)} dimensions; accepted: {dim}, "
            f"as {features.extractor} gives"
        )
    problem = ""
    theirs = reference.provenance.get("extractor_fingerprint", "")
    if not reference.pipeline:
        problem = f"its {reference.format} file does not say how its pixels were resized"
        remedy = f"evaluate.pipeline says which: one of {', '.join(PIPELINES)}"
    elif reference.pipeline != features.pipeline:
        problem = f"made by {reference.pipeline!r}, the samples by {features.pipeline!r}"
        remedy = "the same pipeline for both"
    elif theirs and theirs != features.fingerprint:
        problem = f"made with weights {theirs[:12]}, the samples with {features.fingerprint[:12]}"
        remedy = "the same weights for both"
    if not problem:
        return ""
    if not force:
        raise UserError(
            f"evaluate.reference: {problem}; accepted: {remedy}, or evaluate.force=True"
        )
    return f"NOT COMPARABLE: reference {problem}"
