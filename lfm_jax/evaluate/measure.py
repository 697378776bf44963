"""All figures of one set of samples against one reference, each named with what it depends on.

Only Inception's published weights make a FID; every other feature space is called
``FD-<features>``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from lfm_jax.errors import UserError
from lfm_jax.evaluate.bootstrap import bootstrap
from lfm_jax.evaluate.cmmd import cmmd
from lfm_jax.evaluate.collect import FeatureSet
from lfm_jax.evaluate.fid import frechet_distance, frechet_of
from lfm_jax.evaluate.inception_score import inception_score
from lfm_jax.evaluate.kid import kid
from lfm_jax.evaluate.precision_recall import precision_recall
from lfm_jax.evaluate.reference import Reference, check_comparable, statistics_of
from lfm_jax.evaluate.statistics import FeatureStatistics

METRICS = ("fd", "sfd", "kid", "is", "pr", "cmmd")
ENOUGH = 10_000  # images below which a Frechet distance is dominated by its bias


def measure(
    fake: FeatureSet,
    reference: Reference,
    *,
    metrics: Sequence[str] = ("fd", "kid", "pr"),
    real_features: np.ndarray | None = None,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    neighbours: int = 3,
    resamples: int = 0,
    seed: int = 0,
    force: bool = False,
    allow_singular: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Figures by name, with counts, pipeline and reference, ready for a report.

    Args:
        fake: features of the samples (with ``spatial`` for sfd, ``logits`` for is).
        reference: what to compare with.
        metrics: of `METRICS`.
        real_features: rows for kid, pr and cmmd where the reference file holds none.
        resamples: bootstrap replicates of the Frechet distance over the samples, 0 for none.
        force: compare across pipelines all the same; the result is marked.
        allow_singular: accept no more images than dimensions: a covariance without full rank.

    Raises:
        UserError: unknown metric, pipelines that differ, too few images, or parts that are missing.
    """
    unknown = [m for m in metrics if m not in METRICS]
    if unknown:
        raise UserError(f"evaluate.metrics: {unknown[0]!r}; accepted: {', '.join(METRICS)}")
    mark = check_comparable(fake, reference, force=force)
    real = reference.features if real_features is None else real_features
    name = metric_name(fake)
    figures: dict[str, Any] = {
        "num_samples": fake.count,
        "num_reference": reference.count or None,
        "extractor": fake.extractor,
        "extractor_fingerprint": fake.fingerprint,
        "pipeline": fake.pipeline,
        "reference": reference.provenance | {"format": reference.format},
    }
    if mark:
        figures["warning"] = mark
    if "fd" in metrics:
        _check_rank(fake.statistics, name, allow_singular)
        target = statistics_of(reference)
        figures[name] = frechet_of(fake.statistics, target)
        if fake.count < ENOUGH:
            figures["note"] = bias_note(fake)
            logging.warning("%s", figures["note"])
        if resamples:
            figures[f"{name} interval"] = _interval(fake, target, resamples, seed, progress)
    if "sfd" in metrics:
        if fake.spatial is None or reference.mu_s is None or reference.sigma_s is None:
            raise UserError(
                "evaluate.metrics: sfd needs spatial features of samples and reference; "
                "accepted: Inception and a reference with mu_s, sigma_s"
            )
        spatial = fake.spatial
        _check_rank(spatial, f"s{name}", allow_singular)
        figures[f"s{name}"] = frechet_distance(
            spatial.mean, spatial.covariance, reference.mu_s, reference.sigma_s
        )
    if "is" in metrics:
        if fake.logits is None:
            raise UserError(f"evaluate.metrics: is needs logits, which {fake.extractor} has not")
        label = "IS" if name == "FID" else f"IS-{fake.extractor}"
        splits = min(10, fake.count)
        figures[label], figures[f"{label} std"] = inception_score(fake.logits, splits=splits)
    rows = [m for m in metrics if m in ("kid", "pr", "cmmd")]
    if not rows:
        return figures
    if real is None:
        raise UserError(
            f"evaluate.metrics: {rows[0]} needs features of real images; accepted: a reference "
            "with feats or arr_0 (--job=reference writes one)"
        )
    if "kid" in metrics:
        size = min(kid_subset_size, len(fake.features), len(real))
        label = "KID" if name == "FID" else f"KID-{fake.extractor}"
        mean, deviation = kid(fake.features, real, subsets=kid_subsets, subset_size=size)
        figures |= {label: mean, f"{label} std": deviation, "kid_subset_size": size}
    if "pr" in metrics:
        found = precision_recall(real, fake.features, k=neighbours, progress=progress)
        figures |= {
            "precision": found.precision,
            "recall": found.recall,
            "density": found.density,
            "coverage": found.coverage,
            "neighbours": neighbours,
            "num_real_for_recall": len(real),
        }
    if "cmmd" in metrics:
        figures[f"CMMD-{fake.extractor}"] = cmmd(fake.features, real)
    return figures


def metric_name(features: FeatureSet) -> str:
    """``FID`` for Inception weights whose hash was checked, else ``FD-<extractor>``.

    The loader gives the bare name "Inception" to nothing else.
    """
    return "FID" if features.extractor == "Inception" else f"FD-{features.extractor}"


def bias_note(features: FeatureSet) -> str:
    """What to know of a Frechet distance of so few images."""
    name, dim = metric_name(features), len(features.statistics.mean)
    note = f"{name} of {features.count} < {ENOUGH} images is biased upwards: "
    note += "compare at equal counts only"
    if features.count <= dim:
        note += f"; its covariance of {dim} dimensions has not full rank"
    return note


def _check_rank(statistics: FeatureStatistics, name: str, allow: bool) -> None:
    dim = len(statistics.mean)
    if statistics.count <= dim and not allow:
        raise UserError(
            f"{name}: {statistics.count} images for {dim} dimensions leave the covariance without "
            f"full rank; accepted: more than {dim}, or evaluate.singular=True"
        )


def _interval(
    fake: FeatureSet, target: FeatureStatistics, resamples: int, seed: int, progress: bool
) -> dict[str, float]:
    found = bootstrap(
        lambda rows: frechet_of(FeatureStatistics.of(rows), target),
        fake.features,
        resamples=resamples,
        seed=seed,
        progress=progress,
    )
    return {
        "low": found.low,
        "high": found.high,
        "level": found.level,
        "standard_error": found.error,
        "resamples": resamples,
    }
