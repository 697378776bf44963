"""Measure samples against real images, beside the floor and the autoencoder's own error.

Against held-out images every Frechet distance stands next to two that say what it can mean: real
train images against the same held-out ones (the floor: no generator can be expected below it) and
the held-out images through the autoencoder (what sampling in its latent space cannot mend). With
``evaluate.reference`` the samples are measured against somebody's published statistics instead.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.data import ImageSource
from lfm_jax.errors import UserError
from lfm_jax.evaluate import (
    FeatureSet,
    Samples,
    collect_features,
    frechet_of,
    jpeg_round_trip,
    kid,
    make_reference,
    measure,
    metric_name,
    read_reference,
    read_samples,
)
from lfm_jax.evaluate.variety import pixel_std_ratio, svc_accuracy
from lfm_jax.features import (
    PUBLISHED,
    Classifier,
    Extractor,
    load_extractor,
    open_extractor,
    read_extractor_metadata,
    save_extractor,
    train_classifier,
)
from lfm_jax.jobs import build
from lfm_jax.vae import Codec, from_uint8, to_uint8
from lfm_jax.workdir import Workdir

_BATCH = 250
_KID_SUBSET = 1000


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    judged = config.evaluate.samples or workdir.require_result("sample")["provenance"]["inputs"]
    return {"samples": judged, **build.section(config, "evaluate")}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.evaluate
    samples = _samples(config, workdir)
    extractor, accuracy = judge(config, workdir)
    collect = functools.partial(collect_features, extractor, batch_size=_BATCH)
    images = samples.images
    if section.jpeg:
        images = jpeg_round_trip(images, quality=section.jpeg)
    fake = collect(images, description="samples")

    figures: dict[str, Any] = {
        "samples_sha256": samples.sha256,
        "jpeg_quality": section.jpeg,
        "dtype": config.model.dtype,
    }
    if section.samples is None:
        sampled = workdir.require_result("sample")
        keys = ("checkpoint_step", "ema", "solver", "guidance", "nfe", "network_calls", "seed")
        figures["sampler"] = {key: sampled[key] for key in keys}
    options = {"metrics": section.metrics, "resamples": section.bootstrap, "force": section.force}
    if section.reference is not None:
        reference = read_reference(section.reference, pipeline=section.pipeline)
        return {**figures, **measure(fake, reference, **options)}

    # ---- against held-out images
    train, test = build.images(config, "train"), build.images(config, "test")
    codec = build.codec(config, workdir)
    count = min(section.num_real, len(test))
    held_out = spread(len(test), count)
    real = collect(_read(test, held_out), total=count, description="held-out real")
    floor_indices = spread(len(train), min(count, len(train)))
    floor = collect(_read(train, floor_indices), total=count, description="train real")
    rebuilt = collect(
        reconstruct(codec, test, held_out), total=count, description="reconstructions"
    )
    reference = make_reference(
        real, source=test.name, source_fingerprint=test.fingerprint, jpeg_quality=section.jpeg
    )
    # A small judge has few dimensions; a published one on few images has no full rank, which is
    # reported with the count rather than refused: the floor beside it shows the bias.
    figures |= measure(fake, reference, allow_singular=True, **options)
    figures |= {
        "metric": metric_name(fake),
        "fd_samples": frechet_of(fake.statistics, real.statistics),
        "fd_reconstruction": frechet_of(rebuilt.statistics, real.statistics),
        "fd_floor": frechet_of(floor.statistics, real.statistics),
        "kid_floor": _kid(floor, real),
        "num_real": count,
        "classifier_accuracy": accuracy,
    }
    figures["fd_over_reconstruction"] = figures["fd_samples"] / figures["fd_reconstruction"]
    if samples.labels is not None and train.num_classes:
        figures |= {
            "pixel_std_ratio": pixel_std_ratio(
                samples.images, samples.labels, _all(train), train.num_classes
            )
        }
        if accuracy is not None:
            real_labels = test.batch(held_out)["label"]
            figures |= {
                "accuracy_samples": _accuracy(fake, samples.labels),
                "accuracy_reconstruction": _accuracy(rebuilt, real_labels),
                "accuracy_real": _accuracy(real, real_labels),
            }
        if section.svc:
            figures |= svc_accuracy(_all(train), _all(test), samples.images, samples.labels)
    return figures


def judge(config: ConfigDict, workdir: Workdir) -> tuple[Extractor, float | None]:
    """The extractor that `config.evaluate` names, and its accuracy where it is a classifier.

    Raises:
        UserError: an unknown name.
    """
    section = config.evaluate
    if section.extractor == "classifier":
        return _classifier(config, workdir)
    if section.extractor == "random":
        return _random(config), None
    if section.extractor in PUBLISHED:
        return open_extractor(
            section.extractor, weights=section.weights or "", pipeline=section.pipeline
        ), None
    raise UserError(
        f"--config.evaluate.extractor={section.extractor}: expected one of classifier, random, "
        + ", ".join(PUBLISHED)
    )


def _samples(config: ConfigDict, workdir: Workdir) -> Samples:
    samples = read_samples(config.evaluate.samples or workdir.samples / "samples.npz")
    side, channels = config.data.image_size, config.data.channels
    if samples.images.shape[1:] != (side, side, channels):
        raise UserError(
            f"{config.evaluate.samples}: images of shape {samples.images.shape[1:]}; "
            f"expected ({side}, {side}, {channels}), the config's data.image_size and channels"
        )
    return samples


def _classifier(config: ConfigDict, workdir: Workdir) -> tuple[Extractor, float]:
    """The small classifier of this data set, trained once and kept with its accuracy."""
    section = config.evaluate
    train, test = build.images(config, "train"), build.images(config, "test")
    name = f"{config.data.source.split(':')[-1]}-cnn"
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


def _random(config: ConfigDict) -> Extractor:
    """The classifier's network untrained: a weak judge that needs neither labels nor weights."""
    section, data = config.evaluate, config.data
    model = Classifier(num_classes=2, width=section.classifier_width)
    example = jnp.zeros((1, data.image_size, data.image_size, data.channels))
    return Extractor(
        params=model.init(jax.random.key(section.classifier_seed), example)["params"],
        model=model,
        name="random-cnn",
        dim=model.hidden,
        input_size=data.image_size,
        channels=data.channels,
    )


def spread(total: int, count: int) -> np.ndarray:
    """`count` evenly spaced indices: no class is favoured in sources sorted by class."""
    return np.linspace(0, total - 1, count).round().astype(int)


def _read(source: ImageSource, indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), _BATCH):
        yield source.batch(indices[start : start + _BATCH])["image"]


def reconstruct(codec: Codec, source: ImageSource, indices: np.ndarray) -> Iterator[np.ndarray]:
    @jax.jit
    def rebuild(codec: Codec, images):
        mean = codec.encode_moments(from_uint8(images))[..., : codec.latent_channels]
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
