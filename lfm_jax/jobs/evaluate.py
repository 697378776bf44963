"""Measure samples against real images, beside the floor and the autoencoder's own error.

Against held-out images every Frechet distance stands next to two that say what it can mean: real
train images against the same held-out ones (the floor: no generator can be expected below it) and
the held-out images through the autoencoder (what sampling in its latent space cannot mend). With
``evaluate.reference`` the samples are measured against somebody's published statistics instead, and
the two stand beside them where the images and the autoencoder are at hand.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.config import content_hash, to_json
from lfm_jax.data import ImageSource
from lfm_jax.errors import UserError
from lfm_jax.evaluate import (
    ENOUGH,
    FeatureSet,
    Memorisation,
    Reference,
    SampleFile,
    bias_note,
    check_comparable,
    frechet_of,
    kid,
    make_reference,
    measure,
    memorisation,
    metric_name,
    read_reference,
    statistics_of,
)
from lfm_jax.evaluate.variety import pixel_std_ratio, svc_accuracy
from lfm_jax.features import Extractor
from lfm_jax.jobs import build, obeyed
from lfm_jax.jobs.judge import (
    Look,
    judge,
    of_array,
    of_file,
    of_source,
    reconstructed,
    spread,
)
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image

_KID_SUBSET = 1000
_IN_MEMORY = 2**30  # bytes of real images that judges of pixels may load at once
_SUSPECTS = 10  # rows of the picture of nearest neighbours


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Files by what is in them: another file under the same name is another input."""
    section = config.evaluate
    if section.samples is None:
        judged = workdir.require_result("sample")["provenance"]["inputs"]
    else:
        judged = SampleFile(section.samples).sha256
    compared = {}
    if section.reference is not None:
        compared["reference"] = read_reference(section.reference).provenance["file_sha256"]
    return {"samples": judged, **compared, **build.section(config, "evaluate")}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.evaluate
    samples = _samples(config, workdir)
    extractor, accuracy = judge(config, workdir)
    look = Look(
        extractor=extractor, jpeg=section.jpeg, parts=_parts(config, workdir, samples, extractor)
    )
    fake = look(of_file(samples), len(samples), "samples")

    figures: dict[str, Any] = {
        "samples_sha256": samples.sha256,
        "jpeg_quality": section.jpeg,
        "dtype": config.model.dtype,
        "seed": config.seed,
        "classifier_accuracy": accuracy,
    }
    if section.samples is None:
        sampled = workdir.require_result("sample")
        keys = ("checkpoint_step", "ema", "solver", "guidance", "nfe", "network_calls", "seed")
        figures["sampler"] = {key: sampled[key] for key in keys}
    score = functools.partial(
        measure,
        fake,
        metrics=section.metrics,
        resamples=section.bootstrap,
        force=section.force,
        progress=sharding.is_main_process(),
    )
    if section.reference is not None:
        reference, rows = _reference(config, look, fake)
        figures |= score(reference, real_features=rows, allow_singular=section.singular)
        return figures | _beside_reference(config, workdir, look, fake, reference, figures)
    figures |= _beside_held_out(config, workdir, look, fake, samples, score)
    own = section.samples is None and config.sample.given is None
    if config.condition.kind != "none" and own:
        figures |= obeyed.measure(config, workdir, samples, look)
    return figures


def clean(config: ConfigDict, workdir: Workdir) -> None:
    """Remove the features, of which the result is made."""
    if sharding.is_main_process() and (folder := workdir.root / "evaluation").exists():
        folder.rmtree()


def _parts(
    config: ConfigDict, workdir: Workdir, samples: SampleFile, extractor: Extractor
) -> epath.Path:
    """Where features of exactly these images, seen by this judge, are kept."""
    made_of = {
        "config": to_json(config),
        "samples": samples.sha256,
        "extractor": extractor.fingerprint,
        "codec": (workdir.result("autoencode") or {}).get("provenance"),
        "processes": jax.process_count(),
        "devices": jax.local_device_count(),
    }
    return workdir.root / "evaluation" / content_hash(made_of)[:16]


def _samples(config: ConfigDict, workdir: Workdir) -> SampleFile:
    file = SampleFile(config.evaluate.samples or workdir.samples / "samples.npz")
    side, channels = config.data.image_size, config.data.channels
    if file.shape[1:] != (side, side, channels):
        raise UserError(
            f"samples {file.path}: images of shape {file.shape[1:]}; "
            f"expected ({side}, {side}, {channels}), the config's data.image_size and channels"
        )
    return file


# ---- against somebody's statistics


def _reference(
    config: ConfigDict, look: Look, fake: FeatureSet
) -> tuple[Reference, np.ndarray | None]:
    """The reference file, and features of the images in it (ADM's carry 10,000).

    A file of images alone, such as somebody's samples, becomes a reference by its images.
    """
    section = config.evaluate
    reference = read_reference(section.reference, pipeline=section.pipeline)
    if reference.mu is not None:
        check_comparable(fake, reference, force=section.force)
    if reference.images is None:
        return reference, None
    shown = look(of_array(reference.images), len(reference.images), "images of the reference")
    if reference.mu is None:
        made = make_reference(shown, source=str(section.reference), jpeg_quality=section.jpeg)
        provenance = made.provenance | reference.provenance
        reference = dataclasses.replace(made, format=reference.format, provenance=provenance)
    return reference, shown.features


def _beside_reference(
    config: ConfigDict,
    workdir: Workdir,
    look: Look,
    fake: FeatureSet,
    reference: Reference,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """Floors against the same statistics, and a mark where JPEG was used on one side only."""
    beside: dict[str, Any] = {}
    theirs = reference.provenance.get("jpeg_quality")
    if theirs is not None and theirs != look.jpeg:
        beside["warning"] = "; ".join(
            [
                *([figures["warning"]] if "warning" in figures else []),
                f"the reference was made of JPEG images of quality {theirs}, the samples of "
                f"{look.jpeg} (0: none): --config.evaluate.jpeg={theirs} makes them alike",
            ]
        )
    if not config.evaluate.floors or "fd" not in config.evaluate.metrics:
        return beside
    target = statistics_of(reference)
    try:
        test = build.images(config, "test")
        codec = build.codec(config, workdir)
    except UserError as error:
        return beside | {"floors": f"not measured: {error}"}
    count = min(config.evaluate.num_real, len(test))
    images = of_source(test, spread(len(test), count))
    real = look(images, count, "held-out real")
    rebuilt = look(reconstructed(codec, images), count, "reconstructions")
    return beside | {
        "metric": metric_name(fake),
        "fd_floor": frechet_of(real.statistics, target),
        "fd_reconstruction": frechet_of(rebuilt.statistics, target),
        "num_real": count,
    }


# ---- against held-out images


def _beside_held_out(
    config: ConfigDict,
    workdir: Workdir,
    look: Look,
    fake: FeatureSet,
    samples: SampleFile,
    score: Any,
) -> dict[str, Any]:
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
        figures["fd_over_reconstruction"] = figures["fd_samples"] / figures["fd_reconstruction"]
    if section.memorisation:
        figures |= _memorisation(config, workdir, look, fake, real, samples, train)
    if samples.labels is None or not train.num_classes:
        return figures
    figures |= _by_class(config, fake, real, rebuilt, samples, train, test)
    return figures


def _by_class(
    config: ConfigDict,
    fake: FeatureSet,
    real: FeatureSet,
    rebuilt: FeatureSet | None,
    samples: SampleFile,
    train: ImageSource,
    test: ImageSource,
) -> dict[str, Any]:
    """Whether samples show the class that they were asked for, and in how many ways."""
    figures: dict[str, Any] = {}
    if config.evaluate.extractor == "classifier":
        labels = test.batch(spread(len(test), real.count))["label"]
        figures["accuracy_samples"] = _accuracy(fake, samples.labels)
        figures["accuracy_real"] = _accuracy(real, labels)
        if rebuilt is not None:
            figures["accuracy_reconstruction"] = _accuracy(rebuilt, labels)
    if len(train) * int(np.prod(samples.shape[1:])) > _IN_MEMORY:
        return figures
    images, seen = samples.read(), _all(train)
    ratio = pixel_std_ratio(images, samples.labels, seen, train.num_classes)
    figures["pixel_std_ratio"] = ratio
    if config.evaluate.svc:
        figures |= svc_accuracy(seen, _all(test), images, samples.labels)
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
    return float((features.logits.argmax(-1) == labels).mean())


def _all(source: ImageSource) -> dict[str, np.ndarray]:
    return source.batch(np.arange(len(source)))
