"""Who says which side of an attribute an image is on: labels before an edit, a judge after it.

A `Judge` gives the *sides* of labelled images (what boundaries are fitted with) and the *score* of
any image, positive on the attribute's side (what edits are measured by). The score never comes from
the flow: a classifier of pixels, a measurement on the pixels, or CLIP.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int8, Integer, UInt8

from lfm_jax.data import ImageSource
from lfm_jax.data.attributes import (
    Attribute,
    class_number,
    class_sides,
    pixel_values,
    table_sides,
)
from lfm_jax.errors import UserError
from lfm_jax.features import Extractor, train_classifier

Images = UInt8[np.ndarray, "n h w c"]
Sides = Int8[np.ndarray, " n"]
Scores = Float[np.ndarray, " n"]

_BATCH = 250
_MEASURED = 3000  # training images by which a measured property is split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """An attribute with its sides and scores.

    Attributes:
        attribute: what is asked.
        sides: ``(source, indices) -> -1, 0 or +1`` of labelled images; 0 is on no side.
        score: images -> a number each, positive on the attribute's side.
        belongs: images -> whether the question makes sense for them at all (for a pair of classes:
            whether they are of one of the two).
    """

    attribute: Attribute
    sides: Callable[[ImageSource, np.ndarray], Sides]
    score: Callable[[Images], Scores]
    belongs: Callable[[Images], np.ndarray] = lambda images: np.ones(len(images), bool)


def class_numbers(attribute: Attribute, class_names: Sequence[str]) -> tuple[int, int | None]:
    """The classes on the two sides of a ``pair`` or ``class`` attribute; None: all the others.

    Raises:
        UserError: no such class.
    """
    positive = class_number(attribute.positive, class_names, attribute=attribute.name)
    if attribute.kind != "pair":
        return positive, None
    return positive, class_number(attribute.negative, class_names, attribute=attribute.name)


def class_judge(attribute: Attribute, class_names: Sequence[str], extractor: Extractor) -> Judge:
    """Of a ``pair`` or ``class`` attribute, by a classifier of the data set's classes.

    The score of a pair is the difference of the two logits; of one class its log odds.
    """
    positive, negative = class_numbers(attribute, class_names)

    def sides(source: ImageSource, indices: np.ndarray) -> Sides:
        return class_sides(attribute, _labels(source, indices), class_names)

    def score(images: Images) -> Scores:
        logits = _logits(extractor, images)
        if negative is not None:
            return logits[:, positive] - logits[:, negative]
        rest = np.delete(logits, positive, axis=1)
        return logits[:, positive] - np.logaddexp.reduce(rest, axis=1)

    def belongs(images: Images) -> np.ndarray:
        if negative is None:
            return np.ones(len(images), bool)
        return np.isin(_logits(extractor, images).argmax(-1), (positive, negative))

    return Judge(attribute=attribute, sides=sides, score=score, belongs=belongs)


def pixel_judge(attribute: Attribute, train: ImageSource) -> Judge:
    """Of a ``pixels`` attribute: the measured value less its median, in standard deviations.

    The sides are the outer thirds of the training images' values, so that a boundary is not fitted
    on images that could be on either.
    """
    indices = np.linspace(0, len(train) - 1, min(len(train), _MEASURED)).round().astype(int)
    values = pixel_values(attribute, train.batch(indices)["image"])
    low, middle, high = np.quantile(values, (1 / 3, 1 / 2, 2 / 3))
    spread = float(values.std()) or 1.0

    def sides(source: ImageSource, indices: np.ndarray) -> Sides:
        found = pixel_values(attribute, source.batch(indices)["image"])
        return ((found > high).astype(np.int8) - (found < low).astype(np.int8)).astype(np.int8)

    def score(images: Images) -> Scores:
        return (pixel_values(attribute, images) - middle) / spread

    return Judge(attribute=attribute, sides=sides, score=score)


@dataclasses.dataclass(frozen=True)
class _TwoSided:
    """An image source whose labels are the sides of an attribute."""

    source: ImageSource
    labels: np.ndarray
    num_classes: int = 2

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices) -> dict[str, np.ndarray]:
        places = np.asarray(indices)
        return {"image": self.source.batch(places)["image"], "label": self.labels[places]}


def table_judge(
    attribute: Attribute,
    table: str,
    train: ImageSource,
    test: ImageSource,
    *,
    epochs: float | int = 8,
    seed: int = 1234,
) -> Judge:
    """Of a ``table`` attribute, by a small classifier of pixels trained on the table's column."""
    views = [
        _TwoSided(source, (table_sides(attribute, source.files, table) > 0).astype(np.int32))
        for source in (train, test)
    ]
    extractor, _ = train_classifier(*views, seed=seed, epochs=epochs, name=attribute.positive)

    def sides(source: ImageSource, indices: np.ndarray) -> Sides:
        files = [source.files[i] for i in indices] if source.files else ()
        return table_sides(attribute, files, table)

    def score(images: Images) -> Scores:
        logits = _logits(extractor, images)
        return logits[:, 1] - logits[:, 0]

    return Judge(attribute=attribute, sides=sides, score=score)


def text_judge(attribute: Attribute, similarity: Callable[[Images], np.ndarray]) -> Judge:
    """Of a ``text`` attribute: CLIP's zero-shot choice is label and judge in one.

    `similarity` gives ``[n, 2]`` logits of images with the negative and the positive text.
    """

    def score(images: Images) -> Scores:
        logits = similarity(images)
        return (logits[:, 1] - logits[:, 0]).astype(np.float64)

    def sides(source: ImageSource, indices: np.ndarray) -> Sides:
        scores = [
            score(source.batch(indices[i : i + _BATCH])["image"])
            for i in range(0, len(indices), _BATCH)
        ]
        return np.where(np.concatenate(scores) > 0, 1, -1).astype(np.int8)

    return Judge(attribute=attribute, sides=sides, score=score)


def split_sides(
    judge: Judge,
    source: ImageSource,
    *,
    count: int,
    held_out: int,
    seed: int,
    pool: int = 20_000,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Two disjoint sets of images, half of each on either side: to fit with and to choose with.

    Args:
        count: images of the first set, where there are as many.
        held_out: images of the second; at most a quarter of a side.
        seed: of the order in which images are taken.
        pool: at most so many images are asked for their side.

    Returns:
        ``(indices, sides)`` twice; indices rise.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:pool]
    sides = judge.sides(source, order)
    first, second = [], []
    for side in (-1, 1):
        members = order[sides == side]
        later = min(held_out // 2, len(members) // 4)
        second.append(members[:later])
        first.append(members[later : later + count // 2])
    return _joined(first), _joined(second)


def take_sides(
    judge: Judge, source: ImageSource, *, count: int, seed: int, pool: int = 20_000
) -> tuple[np.ndarray, np.ndarray]:
    """Images of which half are on either side, for measuring; indices rise."""
    return split_sides(judge, source, count=count, held_out=0, seed=seed, pool=pool)[0]


def _joined(halves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    indices = np.concatenate(halves).astype(int)
    sides = np.repeat(np.array([-1, 1], np.int8), [len(half) for half in halves])
    order = np.argsort(indices)
    return indices[order], sides[order]


def _labels(source: ImageSource, indices: Integer[np.ndarray, " n"]) -> np.ndarray:
    if source.labels is not None:
        labels = source.labels[indices]
    else:
        labels = source.batch(indices)["label"]
    if len(labels) and labels.max() < 0:
        raise UserError(f"{source.name}: has no labels; expected a labelled source, or pixels:...")
    return labels


@jax.jit
def _forward(extractor: Extractor, images):
    return extractor(images)["logits"]


def _logits(extractor: Extractor, images: Images) -> np.ndarray:
    """In whole batches, so that one program serves every number of images."""
    rows = []
    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        missing = np.zeros((_BATCH - len(part), *part.shape[1:]), np.uint8)
        logits = _forward(extractor, np.concatenate([part, missing]))
        rows.append(np.asarray(logits, np.float64)[: len(part)])
    return np.concatenate(rows)
