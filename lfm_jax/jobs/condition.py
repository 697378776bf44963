"""From config to the condition of a run, and to the conditions under which samples are made.

Samples are made under the conditions of held-out images, evenly spread over the test split, or
under those of a user (`config.sample.given`): a folder of images and masks, a folder of maps, a
JSON file of layouts.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from lfm_jax.conditions import Inpainting, Layout, Semantic, masks
from lfm_jax.conditions.pictures import picture
from lfm_jax.config import to_json
from lfm_jax.data import open_layouts, open_maps, read_layouts
from lfm_jax.data.maps import read_map
from lfm_jax.data.mask_files import open_masked
from lfm_jax.data.pixels import Preprocess
from lfm_jax.errors import UserError
from lfm_jax.jobs import build
from lfm_jax.jobs.judge import spread
from lfm_jax.vae import Codec, from_uint8
from lfm_jax.writers import image_grid

KINDS = ("none", "inpainting", "semantic", "layout")
# What the arrays in the cache depend on; the rest of the section belongs to training.
_CACHED = ("kind", "source", "num_classes", "max_objects", "masks", "variants", "fill")
_SHOWN = 10  # conditions and samples of each in a grid
_HELD_OUT = 1_000_003  # apart from the seeds of training masks

Made = Inpainting | Semantic | Layout


def make(config: ConfigDict, codec: Codec, split: str = "train") -> Made | None:
    """The condition that `config.condition` describes, reading the annotations of a split."""
    section = config.condition
    if section.kind == "none":
        return None
    if section.kind == "inpainting":
        return Inpainting(
            masks=section.masks,
            seed=config.seed,
            variants=section.variants,
            fill=section.fill,
            mask_channels=section.mask_channels,
            drop=section.drop,
            image_size=config.data.image_size,
            latent_shape=build.latent_shape(config, codec),
            scale=codec.scale,
            shift=codec.shift,
        )
    found = annotations(config, split)
    classes = _classes(section, found)
    if section.kind == "semantic":
        return Semantic(
            num_classes=classes,
            image_size=config.data.image_size,
            factor=codec.factor,
            channels=section.channels,
            kind=section.rescaler,
            hidden=section.hidden,
            drop=section.drop,
            read=found.batch,
        )
    return Layout(
        num_classes=classes,
        max_objects=found.max_objects,
        scheme=section.scheme,
        width=config.model.context_dim or 0,
        depth=section.depth,
        heads=section.heads,
        drop=section.drop,
        read=found.batch,
    )


def cached_inputs(config: ConfigDict) -> dict[str, Any]:
    """What the conditions in the latent cache depend on; empty without a condition."""
    section = config.condition
    if section.kind == "none":
        return {}
    full = to_json(section)
    told = {key: full[key] for key in _CACHED}
    if section.kind != "inpainting":
        for split in config.encode.splits:
            told[f"annotations of {split}"] = annotations(config, split).fingerprint
    return {"condition": told}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """The conditions of samples; sample i is made under condition ``i // repeats``.

    Attributes:
        condition: how they reach the network.
        count: how many there are.
        repeats: samples under each.
        labels: their images' classes, or None.
        images: ``numbers -> uint8 [n, H, W, C]``: the images that they were taken from; None where
            a user gave conditions without.
        arrays: ``(numbers, images) -> {name: array}``: from the host, see `Condition.prepare`.
        codec: for what the condition encodes.
    """

    condition: Made
    count: int
    repeats: int
    labels: np.ndarray | None
    images: Callable[[np.ndarray], np.ndarray] | None
    arrays: Callable[[np.ndarray, np.ndarray | None], dict[str, np.ndarray]]
    codec: Codec

    def numbers(self, indices: Any) -> np.ndarray:
        """The condition of each sample."""
        return np.asarray(indices) // self.repeats % self.count

    def classes(self, indices: Any) -> np.ndarray | None:
        """The class of each sample, that of its condition's image; None where there are none."""
        return None if self.labels is None else self.labels[self.numbers(indices)].astype(np.int32)

    def inputs(self, indices: Any) -> dict[str, np.ndarray]:
        """What the network's input is made of, a row a sample."""
        numbers = self.numbers(indices)
        images = None if self.images is None else self.images(numbers)
        arrays = self.arrays(numbers, images)
        if isinstance(self.condition, Inpainting):
            made = _encode(self.condition, self.codec, images, arrays)
            arrays = {**arrays, **made}
        return {k: np.asarray(v) for k, v in self.condition.first(arrays).items()}

    def plain(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Masks, maps or boxes of the conditions, and "image" where there is one."""
        images = None if self.images is None else self.images(numbers)
        arrays = dict(self.arrays(numbers, images))
        if isinstance(self.condition, Inpainting):
            arrays["mask"] = masks.unpack(arrays["mask"][:, 0], self.condition.image_size)
        return arrays if images is None else {**arrays, "image": images}


@partial(jax.jit, static_argnums=0)
def _encode(condition: Inpainting, codec: Codec, images: Any, arrays: dict) -> dict:
    return condition.encode(codec, from_uint8(images), arrays)


def given(config: ConfigDict, codec: Codec) -> Given | None:
    """The conditions that `config.sample` asks for; None for a run without condition."""
    section = config.sample
    if config.condition.kind == "none":
        return None
    if section.given is not None:
        return _of_user(config, codec)
    source = build.images(config, "test")
    wanted = -(-section.num_samples // section.repeats)
    places = spread(len(source), min(wanted, len(source)))
    condition = _asked(config, codec, "test")
    if isinstance(condition, Inpainting):
        condition = dataclasses.replace(
            condition,
            masks=section.masks or condition.masks,
            seed=section.seed + _HELD_OUT,
            variants=1,
        )
    prepare = condition.prepare

    def arrays(numbers: np.ndarray, images: np.ndarray | None) -> dict[str, np.ndarray]:
        assert images is not None  # every condition here is of an image
        return prepare(images, places[numbers])

    labels = source.batch(places)["label"] if config.data.num_classes else None
    return Given(
        condition=condition,
        count=len(places),
        repeats=section.repeats,
        labels=labels,
        images=lambda numbers: source.batch(places[numbers])["image"],
        arrays=arrays,
        codec=codec,
    )


def given_grid(given: Given, images: np.ndarray) -> Image.Image:
    """A condition a row: the image it was taken from, the condition, its samples.

    Args:
        images: the samples from the first on.
    """
    shown = min(_SHOWN, given.count, len(images) // given.repeats)
    told = given.plain(np.arange(shown))
    side, channels = images.shape[1], images.shape[3]
    classes = getattr(given.condition, "num_classes", 0)
    columns = [picture(told, size=side, channels=channels, num_classes=classes)]
    if "image" in told:
        columns.insert(0, told["image"])
    for k in range(min(given.repeats, _SHOWN)):
        columns.append(images[np.arange(shown) * given.repeats + k])
    cells = np.stack(columns, axis=1).reshape(-1, side, side, channels)
    return image_grid(cells, columns=len(columns))


def _asked(config: ConfigDict, codec: Codec, split: str) -> Made:
    condition = make(config, codec, split)
    assert condition is not None  # runs without a condition do not come here
    return condition


def _of_user(config: ConfigDict, codec: Codec) -> Given:
    """Conditions from files; everything is read and checked before anything is sampled."""
    path, size = config.sample.given, config.data.image_size
    condition = _asked(config, codec, "train")
    images: Callable[[np.ndarray], np.ndarray] | None = None
    if isinstance(condition, Inpainting):
        condition = dataclasses.replace(condition, variants=1)
        source, holes = open_masked(path, image_size=size, channels=config.data.channels)
        pictures = source.batch(range(len(source)))["image"]
        arrays = {"mask": masks.pack(holes)[:, None]}

        def taken_from(numbers: np.ndarray) -> np.ndarray:
            return pictures[numbers]

        images = taken_from
    elif isinstance(condition, Semantic):
        arrays = {"map": _user_maps(path, condition, config.condition.source)}
    else:
        boxes, classes = read_layouts(
            path,
            num_classes=condition.num_classes,
            max_objects=condition.max_objects,
            overlap=config.condition.overlap,
        )
        arrays = {"boxes": boxes, "classes": classes}
    return Given(
        condition=condition,
        count=len(next(iter(arrays.values()))),
        repeats=config.sample.repeats,
        labels=None,
        images=images,
        arrays=lambda numbers, _: {name: array[numbers] for name, array in arrays.items()},
        codec=codec,
    )


def _user_maps(path: str, condition: Semantic, source: str) -> np.ndarray:
    folder = Path(path).expanduser()
    files = sorted(folder.glob("*.png"))
    if not files:
        raise UserError(f"--config.sample.given={path}: expected a folder of PNG maps")
    preprocess = Preprocess(image_size=condition.image_size, channels=1)
    maps, wrong = [], []
    for file in files:
        try:
            maps.append(read_map(file, source, condition.num_classes, preprocess))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError(f"{'; '.join(wrong[:8])} ({len(wrong)} in all)")
    return np.stack(maps)


def annotations(config: ConfigDict, split: str) -> Any:
    """The `MapSource` or `LayoutSource` of a split's images."""
    section, images = config.condition, build.images(config, split)
    options = {"split": split, "path": section.path or ""}
    if section.kind == "semantic":
        size, classes = config.data.image_size, section.num_classes
        return open_maps(section.source, images, image_size=size, num_classes=classes, **options)
    return open_layouts(section.source, images, max_objects=section.max_objects, **options)


def _classes(section: ConfigDict, source: Any) -> int:
    found = getattr(source, "num_classes", 0) or len(source.class_names)
    if section.num_classes and found != section.num_classes:
        raise UserError(
            f"--config.condition.num_classes={section.num_classes}: {source.name} has {found}"
        )
    return found
