"""Measure samples against held-out real images, beside the floor and the autoencoder's own error.

Every Frechet distance stands next to two that say what it can mean: real train images against the
same held-out ones (the floor: no generator can be expected below it) and the held-out images
through the autoencoder (what sampling in its latent space cannot mend).
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.data import ImageSource
from lfm_jax.errors import UserError
from lfm_jax.evaluate import FeatureSet, collect_features, frechet_of, kid
from lfm_jax.evaluate.variety import pixel_std_ratio, svc_accuracy
from lfm_jax.features import (
    Extractor,
    load_extractor,
    read_extractor_metadata,
    save_extractor,
    train_classifier,
)
from lfm_jax.jobs import build
from lfm_jax.jobs.generate import load_samples
from lfm_jax.vae import Codec, from_uint8, to_uint8
from lfm_jax.workdir import Workdir

_BATCH = 250
_KID_SUBSET = 1000


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    judged = config.evaluate.samples or workdir.require_result("sample")["provenance"]["inputs"]
    return {"samples": judged, **build.section(config, "evaluate")}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    train, test = build.images(config, "train"), build.images(config, "test")
    images, labels = _samples(config, workdir)
    extractor, accuracy = _judge(config, workdir, train, test)
    codec = build.codec(config, workdir)

    # ---- one pass over each set of images
    count = min(config.evaluate.num_real, len(test))
    held_out = _spread(len(test), count)
    collect = functools.partial(collect_features, extractor, batch_size=_BATCH)
    real = collect(_read(test, held_out), total=count, description="held-out real")
    floor_indices = _spread(len(train), min(count, len(train)))
    floor = collect(_read(train, floor_indices), total=count, description="train real")
    rebuilt = collect(
        _reconstruct(codec, test, held_out), total=count, description="reconstructions"
    )
    fake = collect(images, description="samples")

    # ---- figures
    name = f"FD-{extractor.name}"
    if count < 10_000 or len(images) < 10_000:
        logging.warning(
            "%s of %d samples against %d images: below 10,000 it is biased upwards and only "
            "comparable at equal counts", name, len(images), count,
        )  # fmt: skip
    figures = {
        "metric": name,
        "num_samples": len(images),
        "num_real": count,
        "pipeline": extractor.pipeline,
        "extractor": extractor.fingerprint,
        "reference": test.fingerprint,
        "fd_samples": frechet_of(fake.statistics, real.statistics),
        "fd_reconstruction": frechet_of(rebuilt.statistics, real.statistics),
        "fd_floor": frechet_of(floor.statistics, real.statistics),
        "kid_samples": _kid(fake, real),
        "kid_floor": _kid(floor, real),
        "classifier_accuracy": accuracy,
    }
    figures["fd_over_reconstruction"] = figures["fd_samples"] / figures["fd_reconstruction"]
    if labels is not None:
        real_labels = test.batch(held_out)["label"]
        figures |= {
            "accuracy_samples": _accuracy(fake, labels),
            "accuracy_reconstruction": _accuracy(rebuilt, real_labels),
            "accuracy_real": _accuracy(real, real_labels),
            "pixel_std_ratio": pixel_std_ratio(images, labels, _all(train), train.num_classes),
        }
        if config.evaluate.svc:
            figures |= svc_accuracy(_all(train), _all(test), images, labels)
    if config.evaluate.samples is None:
        sampled = workdir.require_result("sample")
        figures["sampler"] = {
            key: sampled[key]
            for key in ("checkpoint_step", "ema", "solver", "guidance", "nfe", "network_calls")
        }
    return figures


def _samples(config: ConfigDict, workdir: Workdir) -> tuple[np.ndarray, np.ndarray | None]:
    path = config.evaluate.samples or workdir.samples / "samples.npz"
    try:
        arrays = load_samples(path)
        images, labels = arrays["arr_0"], arrays.get("arr_1")
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: expected an npz with arr_0 uint8 [n, h, w, c] (and arr_1 labels); "
            f"{type(error).__name__}: {error}"
        ) from error
    side, channels = config.data.image_size, config.data.channels
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, channels):
        raise UserError(
            f"{path}: arr_0 is {images.dtype} {images.shape}; "
            f"expected uint8 (n, {side}, {side}, {channels})"
        )
    return images, labels


def _judge(
    config: ConfigDict, workdir: Workdir, train: ImageSource, test: ImageSource
) -> tuple[Extractor, float]:
    """The small classifier of this data set, trained once and kept with its accuracy."""
    section = config.evaluate
    name = f"{train.name}-cnn"
    made_of = {
        "source": train.fingerprint,
        "seed": section.classifier_seed,
        "epochs": section.classifier_epochs,
        "width": section.classifier_width,
    }
    path = workdir.extractors / f"{name}.safetensors"
    if path.exists():
        metadata = read_extractor_metadata(path)
        if all(metadata.get(key) == value for key, value in made_of.items()):
            return load_extractor(path), metadata["accuracy"]
    extractor, accuracy = train_classifier(
        train,
        test,
        seed=section.classifier_seed,
        epochs=section.classifier_epochs,
        width=section.classifier_width,
        name=name,
    )
    if sharding.is_main_process():
        save_extractor(path, extractor, accuracy=accuracy, **made_of)
    return extractor, accuracy


def _spread(total: int, count: int) -> np.ndarray:
    """`count` evenly spaced indices: no class is favoured in sources sorted by class."""
    return np.linspace(0, total - 1, count).round().astype(int)


def _read(source: ImageSource, indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), _BATCH):
        yield source.batch(indices[start : start + _BATCH])["image"]


def _reconstruct(codec: Codec, source: ImageSource, indices: np.ndarray) -> Iterator[np.ndarray]:
    @jax.jit
    def rebuild(codec: Codec, images):
        moments = codec.encode_moments(from_uint8(images))
        mean = moments[..., : codec.latent_channels]
        return to_uint8(codec.decode((mean - codec.shift) * codec.scale))

    for images in _read(source, indices):
        yield np.asarray(rebuild(codec, images))


def _kid(first: FeatureSet, second: FeatureSet) -> float:
    size = min(_KID_SUBSET, len(first.features), len(second.features))
    return kid(first.features, second.features, subsets=50, subset_size=size)[0]


def _accuracy(features: FeatureSet, labels: np.ndarray) -> float:
    return float((features.logits.argmax(-1) == labels).mean())


def _all(source: ImageSource) -> dict[str, np.ndarray]:
    return source.batch(np.arange(len(source)))
