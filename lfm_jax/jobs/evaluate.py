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
from lfm_jax.errors import UserError
from lfm_jax.evaluate import (
    FeatureSet,
    Reference,
    SampleFile,
    check_comparable,
    frechet_of,
    make_reference,
    measure,
    metric_name,
    read_reference,
    statistics_of,
)
from lfm_jax.features import Extractor
from lfm_jax.jobs import build, condition_figures
from lfm_jax.jobs.held_out import beside_held_out
from lfm_jax.jobs.judge import Look, judge, of_array, of_file, of_source, reconstructed, spread
from lfm_jax.workdir import Workdir


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
    figures |= beside_held_out(config, workdir, look, fake, samples, score)
    own = section.samples is None and config.sample.given is None
    if config.condition.kind != "none" and own:
        figures |= condition_figures.measure(config, workdir, samples, look)
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
