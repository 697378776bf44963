"""Pictures while a network trains: of the same few noises, so that two steps can be compared."""

import dataclasses
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.jobs import build
from lfm_jax.jobs import condition as conditions
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.sample_options import class_names
from lfm_jax.state import Params, TrainState
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image

_PREVIEWED = 8  # pictures of a class


def previews(
    config: ConfigDict, workdir: Workdir, *, deploy: Callable[[Params], Params] = lambda p: p
) -> Callable[[TrainState, int], None]:
    """What `fit` calls with the state every `config.train.preview_every` steps.

    `deploy` makes of the parameters that train those that are sampled.
    """
    generator = Generator.from_config(config, workdir)
    preview_codec = build.preview_codec(config, generator.codec)
    generator = dataclasses.replace(generator, codec=preview_codec)
    if generator.given is not None:
        return _given_previews(workdir, generator, generator.given)
    names = class_names(config)
    labels = np.repeat(np.arange(len(names) or _PREVIEWED, dtype=np.int32), _PREVIEWED)

    def preview(state: TrainState, step: int) -> None:
        images, _, _ = generator(deploy(state.best_params), range(len(labels)), labels)
        if sharding.is_main_process():
            picture = image_grid(images, columns=_PREVIEWED, row_labels=names)
            save_image(workdir.previews / f"step_{step:07d}.png", picture)

    return preview


def _given_previews(
    workdir: Workdir, generator: Generator, given: conditions.Given
) -> Callable[[TrainState, int], None]:
    """The same under the first few held-out conditions."""
    indices = np.arange(min(given.count, _PREVIEWED) * given.repeats)
    labels = given.classes(indices)

    def preview(state: TrainState, step: int) -> None:
        images, _, _ = generator(state.best_params, indices, labels)
        if sharding.is_main_process():
            picture = conditions.given_grid(given, images)
            save_image(workdir.previews / f"step_{step:07d}.png", picture)

    return preview
