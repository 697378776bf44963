"""Which network judges, and how images reach it: over all devices, each process its own share."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.data import ImageSource
from lfm_jax.errors import UserError, near
from lfm_jax.evaluate import METRICS, FeatureSet, SampleFile, collect_features, jpeg_round_trip
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

BATCH = 250  # images of a forward pass, over the devices of one process

# Images from one place to another, in batches of any size.
Images = Callable[[int, int], Iterable[np.ndarray]]


def judge(config: ConfigDict, workdir: Workdir) -> tuple[Extractor, float | None]:
    """The extractor that `config.evaluate` names, and its accuracy where it is a classifier.

    Raises:
        UserError: an unknown name.
    """
    check_names(config)
    section = config.evaluate
    if section.extractor == "classifier":
        return _classifier(config, workdir)
    if section.extractor == "random":
        return _random(config), None
    return open_extractor(
        section.extractor, weights=section.weights or "", pipeline=section.pipeline
    ), None


def check_names(config: ConfigDict) -> None:
    """Raises a `UserError` where `evaluate.extractor` is not a name that `judge` knows, a metric is
    none, or a file that only the evaluation reads is not there."""
    options = config.evaluate
    for metric in options.metrics:
        if metric not in METRICS:
            raise UserError(
                f"--config.evaluate.metrics: {metric!r}{near(metric, METRICS)}: expected some of "
                + ", ".join(METRICS)
            )
    files = [(key, options[key]) for key in ("weights", "reference")]
    for key, path in (*files, *(("lpips", part) for part in (options.lpips or "").split(","))):
        if path and not epath.Path(path).expanduser().exists():
            raise UserError(f"--config.evaluate.{key}={path}: no such file")
    name, known = config.evaluate.extractor, ("classifier", "random", *PUBLISHED)
    if name not in known:
        raise UserError(
            f"--config.evaluate.extractor={name}{near(name, known)}: expected one of "
            + ", ".join(known)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """An extractor at work.

    Attributes:
        extractor: the network.
        jpeg: quality of a round trip before it, the same for all images that it compares; 0: none.
        parts: where features are kept until the job has ended, so that a killed one goes on.
    """

    extractor: Extractor
    jpeg: int = 0
    parts: epath.Path | None = None

    def __call__(self, images: Images, count: int, description: str) -> FeatureSet:
        """Features of images 0..count of `images`: this process looks at its share of them.

        What comes back is the same in every process: statistics and rows of all.
        """
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
        start, stop = share(count)
        place = f"{description.replace(' ', '_')}-{start}-{stop}"
        return collect_features(
            self.extractor,
            lambda done: self._pixels(images(start + done, stop)),
            parts=None if self.parts is None else self.parts / place,
            batch_size=-(-BATCH // len(devices)) * len(devices),
            total=stop - start,
            sharding=NamedSharding(mesh, PartitionSpec("data")),
            description=description,
            progress=sharding.is_main_process(),
        )

    def _pixels(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in batches:
            yield jpeg_round_trip(batch, quality=self.jpeg) if self.jpeg else batch


def share(count: int) -> tuple[int, int]:
    """First and one past the last of this process's part of `count` things.

    Raises:
        UserError: fewer things than processes.
    """
    processes, index = jax.process_count(), jax.process_index()
    if count < processes:
        raise UserError(f"evaluate: {count} images for {processes} processes; expected at least 1")
    return count * index // processes, count * (index + 1) // processes


def of_source(source: ImageSource, indices: np.ndarray) -> Images:
    """The images of a source at `indices`."""

    def read(start: int, stop: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, BATCH):
            yield source.batch(indices[first : min(first + BATCH, stop)])["image"]

    return read


def of_array(images: np.ndarray) -> Images:
    """Images that are in memory."""
    return lambda start, stop: [images[start:stop]]


def of_file(file: SampleFile) -> Images:
    """The images of a samples file, read as they are wanted."""
    return lambda start, stop: file.batches(BATCH, start=start, stop=stop)


def reconstructed(codec: Codec, images: Images) -> Images:
    """`images` through the autoencoder, encoded to the mean."""

    @jax.jit
    def rebuild(codec: Codec, pixels):
        mean = codec.encode_moments(from_uint8(pixels))[..., : codec.latent_channels]
        return to_uint8(codec.decode((mean - codec.shift) * codec.scale))

    def read(start: int, stop: int) -> Iterator[np.ndarray]:
        for pixels in images(start, stop):
            # One program serves the last, shorter batch too.
            padded = np.concatenate([pixels, np.repeat(pixels[-1:], BATCH - len(pixels), axis=0)])
            yield np.asarray(rebuild(codec, padded))[: len(pixels)]

    return read


def spread(total: int, count: int) -> np.ndarray:
    """`count` evenly spaced indices: no class is favoured in sources sorted by class."""
    return np.linspace(0, total - 1, count).round().astype(int)


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
    # A run that starts from another one's weights has the same judge, if it is of the same images.
    others = [Workdir(epath.Path(config.init)).extractors / path.name] if config.init else []
    for known in (path, *others):
        if known.exists():
            metadata = read_extractor_metadata(known)
            if all(metadata.get(key) == value for key, value in made_of.items()):
                return load_extractor(known), metadata["accuracy"]
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
