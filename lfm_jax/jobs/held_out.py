"""Samples beside held-out images: floors, copies of training images, and classes."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.data import ImageSource
from lfm_jax.evaluate import (
    ENOUGH,
    FeatureSet,
    Memorisation,
    SampleFile,
    bias_note,
    frechet_of,
    kid,
    make_reference,
    memorisation,
    metric_name,
)
from lfm_jax.evaluate.variety import pixel_std_ratio, svc_accuracy
from lfm_jax.jobs import build
from lfm_jax.jobs.judge import Look, of_source, reconstructed, spread
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image

_KID_SUBSET = 1000
_IN_MEMORY = 2**30  # bytes of real images that judges of pixels may load at once
_LOST = 1e-6  # FD of reconstructions below which nothing is lost: pixels, there is no ratio
_SUSPECTS = 10  # rows of the picture of nearest neighbours


def beside_held_out(
    config: ConfigDict,
    workdir: Workdir,
    look: Look,
    fake: FeatureSet,
    samples: SampleFile,
    score: Any,
) -> dict[str, Any]:
    """Figures of samples against held-out images, and of what they can be held against.

    Args:
        look: the judge; it sees the images of both sides.
        fake: what it made of the samples.
        score: `lfm_jax.evaluate.measure` of `fake`, all but its reference told.
    """
    section = config.evaluate
    train, test = build.images(config, "train"), build.images(config, "test")
    codec = build.codec(config, workdir)
    count = min(section.num_real, len(test))
    held_out = of_source(test, spread(len(test), count))
    real = look(held_out, count, "held-out real")
    reference = make_reference(
        real, source=test.name, source_fingerprint=test.fingerprint, jpeg_quality=section.jpeg
    )
    # A small judge has few dimensions; a published one on few images has no full rank, which is
    # reported with the count rather than refused: the floor beside it shows the bias.
    figures = score(reference, allow_singular=True)
    figures |= {"metric": metric_name(fake), "num_real": count}
    if fake.count < ENOUGH:
        figures["note"] = bias_note(fake)
    figures["fd_samples"] = frechet_of(fake.statistics, real.statistics)
    rebuilt = None
    if section.floors:
        fewer = min(count, len(train))
        floor = look(of_source(train, spread(len(train), fewer)), fewer, "train real")
        rebuilt = look(reconstructed(codec, held_out), count, "reconstructions")
        figures |= {
            "fd_reconstruction": frechet_of(rebuilt.statistics, real.statistics),
            "fd_floor": frechet_of(floor.statistics, real.statistics),
            "kid_floor": _kid(floor, real),
        }
        if figures["fd_reconstruction"] > _LOST:
            figures["fd_over_reconstruction"] = figures["fd_samples"] / figures["fd_reconstruction"]
    if section.memorisation:
        figures |= _memorisation(config, workdir, look, fake, real, samples, train)
    if samples.labels is None or not train.num_classes:
        return figures
    figures |= _by_class(config, fake, real, rebuilt, samples, samples.labels, train, test)
    return figures


def _by_class(
    config: ConfigDict,
    fake: FeatureSet,
    real: FeatureSet,
    rebuilt: FeatureSet | None,
    samples: SampleFile,
    asked: np.ndarray,
    train: ImageSource,
    test: ImageSource,
) -> dict[str, Any]:
    """Whether samples show the class that they were asked for, and in how many ways."""
    figures: dict[str, Any] = {}
    if config.evaluate.extractor == "classifier":
        labels = test.batch(spread(len(test), real.count))["label"]
        figures["accuracy_samples"] = _accuracy(fake, asked)
        figures["accuracy_real"] = _accuracy(real, labels)
        if rebuilt is not None:
            figures["accuracy_reconstruction"] = _accuracy(rebuilt, labels)
    if len(train) * int(np.prod(samples.shape[1:])) > _IN_MEMORY:
        return figures
    images, seen = samples.read(), _all(train)
    ratio = pixel_std_ratio(images, asked, seen, train.num_classes)
    figures["pixel_std_ratio"] = ratio
    if config.evaluate.svc:
        figures |= svc_accuracy(seen, _all(test), images, asked)
    return figures


def _memorisation(
    config: ConfigDict,
    workdir: Workdir,
    look: Look,
    fake: FeatureSet,
    real: FeatureSet,
    samples: SampleFile,
    train: ImageSource,
) -> dict[str, Any]:
    """How near samples lie to training images, and a picture of the nearest pairs."""
    count = min(config.evaluate.memorisation, len(train))
    places = spread(len(train), count)
    known = look(of_source(train, places), count, "train real")
    found = memorisation(fake.features, known.features, real.features)
    if sharding.is_main_process():
        _draw_nearest(workdir, found, samples, train, places)
    return {
        "memorised_share": found.share,
        "memorised_z_score": found.z_score,
        "num_train": count,
    }


def _draw_nearest(
    workdir: Workdir,
    found: Memorisation,
    samples: SampleFile,
    train: ImageSource,
    places: np.ndarray,
) -> None:
    suspects = found.suspects[:_SUSPECTS]
    shown = np.concatenate([next(iter(samples.batches(1, start=int(i)))) for i in suspects])
    nearest = train.batch(places[found.nearest[suspects]])["image"]
    picture = image_grid(
        np.concatenate([shown, nearest]),
        columns=len(suspects),
        row_labels=["sample", "nearest in train"],
    )
    save_image(workdir.samples / "nearest.png", picture)


def _kid(first: FeatureSet, second: FeatureSet) -> float:
    size = min(_KID_SUBSET, len(first.features), len(second.features))
    return kid(first.features, second.features, subsets=50, subset_size=size)[0]


def _accuracy(features: FeatureSet, labels: np.ndarray) -> float:
    assert features.logits is not None  # a classifier's
    return float((features.logits.argmax(-1) == labels).mean())


def _all(source: ImageSource) -> dict[str, np.ndarray]:
    return source.batch(np.arange(len(source)))
