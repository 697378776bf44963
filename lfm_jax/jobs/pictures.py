"""Pictures of a sampler: its samples by class, on their way, between two of them, in other classes.

All start from the noises of numbered samples, so that two runs show the same ones.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.sample_options import class_names
from lfm_jax.writers import image_grid

PER_CLASS = 10  # columns of the grid
_PAIRS = 4  # rows of the interpolation


def first_of_classes(config: ConfigDict, labels: np.ndarray | None, count: int) -> np.ndarray:
    """The samples that `grid` shows: the first of each class, or simply the first hundred."""
    if labels is None:
        return np.arange(min(count, PER_CLASS**2))
    shown = range(len(class_names(config)))
    return np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in shown])


def grid(config: ConfigDict, images: np.ndarray, labels: np.ndarray | None) -> Image.Image:
    """`images` (of `first_of_classes`), a row a class."""
    if labels is None:
        return image_grid(images, columns=PER_CLASS)
    rows, cells = [], []
    for label, name in enumerate(class_names(config)):
        found = images[labels == label][:PER_CLASS]
        if len(found):
            blank = np.full((PER_CLASS - len(found), *images.shape[1:]), 255, np.uint8)
            cells.append(np.concatenate([found, blank]))
            rows.append(name)
    if not cells:  # only classes beyond those that are named
        return image_grid(images[: PER_CLASS**2], columns=PER_CLASS)
    return image_grid(np.concatenate(cells), columns=PER_CLASS, row_labels=rows)


def trajectory(config: ConfigDict, generator: Generator, params: Any) -> Image.Image:
    """A few samples on their way: a row of x_t, and under it where x_t is heading.

    Along fixed steps, also where samples are made by error control.
    """
    classes = config.data.num_classes
    shown = max(min(classes, 5), 3)
    labels = np.arange(shown, dtype=np.int32) % max(classes, 1)
    count = config.sample.trajectory
    states, estimates = generator.strip(params, range(shown), labels, count=count)
    rows = np.stack([states, estimates], axis=1)
    return image_grid(
        rows.reshape(-1, *rows.shape[3:]),
        columns=rows.shape[2],
        row_labels=["x_t", "estimate of x_0"] * shown,
    )


def interpolation(config: ConfigDict, generator: Generator, params: Any) -> Image.Image:
    """From one sample to the next along the great circle between their noises, a row a pair."""
    columns, classes = config.sample.interpolation, config.data.num_classes
    pairs = np.repeat(np.arange(_PAIRS), columns)
    weights = np.tile(np.linspace(0, 1, columns, dtype=np.float32), _PAIRS)
    labels = (pairs % classes).astype(np.int32) if classes else None
    images = generator.between(params, (2 * pairs, 2 * pairs + 1), weights, labels)
    names = class_names(config)
    row_labels = [names[pair % classes] for pair in range(_PAIRS)] if names else []
    return image_grid(images, columns=columns, row_labels=row_labels)


def class_switch(config: ConfigDict, generator: Generator, params: Any) -> Image.Image:
    """One noise in every class: a row a noise, a column a class."""
    names = class_names(config)
    rows, columns = config.sample.class_switch, len(names)
    indices = np.repeat(np.arange(rows), columns)
    labels = np.tile(np.arange(columns, dtype=np.int32), rows)
    images, _, _ = generator(params, indices, labels)
    row_labels = [f"noise {row}" for row in range(rows)]
    return image_grid(images, columns=columns, row_labels=row_labels)
