"""What `config.edit` names, as objects: the network, the judges, the images to edit.

Every measurement of edits gets them here, so that a benchmark edits as the job does.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.boundary.crossing import Crossing, Space
from lfm_jax.boundary.editor import Editor
from lfm_jax.boundary.judges import (
    Judge,
    class_judge,
    class_numbers,
    pixel_judge,
    table_judge,
    take_sides,
    text_judge,
)
from lfm_jax.boundary.search import Examples, examples
from lfm_jax.data import ImageSource, open_images
from lfm_jax.data.attributes import Attribute, parse_attribute
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, origin
from lfm_jax.jobs.judge import judge as open_judge
from lfm_jax.workdir import Workdir
from lfm_jax.writers import write_bytes


def base(config: ConfigDict, workdir: Workdir) -> Workdir:
    """The workdir whose network is edited with: ``config.init``, or the run's own."""
    return Workdir(epath.Path(config.init)) if config.init else workdir


def make_editor(config: ConfigDict, workdir: Workdir) -> Editor:
    """The frozen network and its codec.

    Raises:
        UserError: no weights, a condition that editing does not have.
    """
    section, source = config.edit, base(config, workdir)
    if config.data.num_classes:  # an edit leaves the class open
        needs = f"--job=edit with --config.data.num_classes={config.data.num_classes}"
        origin.require_null_label(source.root, needs, "a network without classes")
    codec = build.codec(config, source)
    params = origin.initial_params(str(source.root))
    return Editor(
        model=build.network(config),
        params=jax.tree.map(jnp.asarray, params),
        codec=codec,
        latent_shape=build.latent_shape(config, codec),
        image_size=config.data.image_size,
        solver=section.solver,
        num_steps=section.num_steps,
        seed=section.seed,
        batch_size=section.batch_size,
    )


def crossing(config: ConfigDict) -> Crossing:
    """The edit that `config.edit` describes."""
    section = config.edit
    return Crossing(
        space=Space(name=section.space, layer=section.layer, pool=section.pool),
        mode=section.mode,
        unit=section.unit,
        weights=(1.0, *(float(weight) for weight in section.also_weights)),
        hidden_weight=section.hidden_weight,
        window=tuple(section.window),
        eta=section.eta,
    )


def magnitudes(config: ConfigDict) -> list[float]:
    """Rising magnitudes of the strengths, without 0."""
    return sorted({abs(float(s)) for s in config.edit.strengths} - {0.0})


def make_judges(config: ConfigDict, workdir: Workdir) -> list[Judge]:
    """Of the attribute, of those that go with it, and of those that are only watched.

    Raises:
        UserError: an attribute that is unset or that the images do not have.
    """
    section = config.edit
    if section.attribute is None:
        raise UserError("--config.edit.attribute is unset: expected e.g. pair:7/9 or pixels:slant")
    parsed = [parse_attribute(a) for a in (section.attribute, *section.also, *section.leakage)]
    train = build.images(config, "train")
    extractor, judges = None, []
    for attribute in parsed:
        if attribute.kind in ("pair", "class"):
            class_numbers(attribute, train.class_names)  # before a classifier is trained
            if extractor is None:
                borrow_extractors(base(config, workdir), workdir)
                extractor, _ = open_judge(config, workdir)
            judges.append(class_judge(attribute, train.class_names, extractor))
        elif attribute.kind == "pixels":
            judges.append(pixel_judge(attribute, train))
        elif attribute.kind == "table":
            if section.table is None:
                raise UserError(
                    f"--config.edit.table is unset: {attribute.name} is a column of a table"
                )
            test = build.images(config, "test")
            options = {
                "epochs": config.evaluate.classifier_epochs,
                "seed": config.evaluate.classifier_seed,
            }
            judges.append(table_judge(attribute, section.table, train, test, **options))
        else:
            judges.append(text_judge(attribute, _similarity(config, attribute)))
    return judges


def borrow_extractors(source: Workdir, workdir: Workdir) -> None:
    """The classifier that the base was judged by judges here too; the base is only read."""

    def copy(folder: epath.Path, target: epath.Path) -> None:
        for path in folder.iterdir():
            if path.is_dir():
                copy(path, target / path.name)
            elif not (target / path.name).exists():
                write_bytes(target / path.name, path.read_bytes())

    own = source.root == workdir.root
    if sharding.is_main_process() and not own and source.extractors.exists():
        copy(source.extractors, workdir.extractors)


def _similarity(config: ConfigDict, attribute: Attribute) -> Any:
    from lfm_jax.boundary.text import text_similarity

    if config.edit.clip is None:
        raise UserError(
            f"--config.edit.clip is unset: {attribute.name} needs a folder of CLIP weights"
        )
    return text_similarity(config.edit.clip, (attribute.negative, attribute.positive))


def of_source(
    editor: Editor, source: ImageSource, indices: np.ndarray, sides: np.ndarray
) -> Examples:
    """Images of a source, encoded, with their sides."""
    return examples(editor, source.batch(indices)["image"], sides, indices)


def targets(config: ConfigDict, editor: Editor, judge: Judge) -> Examples:
    """The images to edit and the sides that they are on.

    Raises:
        UserError: no such images, or of another size.
    """
    section = config.edit
    kind, _, listed = section.images.partition(":")
    if section.images == "sampled":
        indices = np.arange(section.count)
        _, latents = editor.sampled(indices, (editor.t_max,))
        images = editor.decode(latents)
        sides = np.where(judge.score(images) > 0, 1, -1)
        return Examples(images=images, latents=latents, sides=sides, positions=indices)
    if kind in ("test", "train"):
        source = build.images(config, kind)
        if not listed:
            indices, sides = take_sides(judge, source, count=section.count, seed=section.seed)
        else:
            indices = _listed(section.images, listed, len(source))
            sides = judge.sides(source, indices)
            seen = np.where(judge.score(source.batch(indices)["image"]) > 0, 1, -1)
            sides = np.where(sides == 0, seen, sides)
        return of_source(editor, source, indices, sides)
    images = _read_files(section.images, config, editor)[: section.count]
    sides = np.where(judge.score(images) > 0, 1, -1)
    return examples(editor, images, sides, np.arange(len(images)))


def _listed(text: str, listed: str, size: int) -> np.ndarray:
    try:
        indices = np.array([int(part) for part in listed.split(",")])
    except ValueError:
        raise UserError(
            f"--config.edit.images={text}: expected indices such as test:3,17"
        ) from None
    for index in indices:
        if not 0 <= index < size:
            raise UserError(f"--config.edit.images={text}: index {index} is not in 0..{size - 1}")
    return indices


def _read_files(path: str, config: ConfigDict, editor: Editor) -> np.ndarray:
    """Image files as they are: cropping a user's image without a word would edit another."""
    place = Path(path).expanduser()
    channels = config.data.channels
    if place.is_dir():
        source = open_images("folder", path=path, channels=channels)
        return source.batch(np.arange(min(len(source), config.edit.count)))["image"]
    if not place.is_file():
        raise UserError(
            f"--config.edit.images={path}: expected test, train, test:3,17, sampled, or a file or "
            "folder of images"
        )
    from lfm_jax.data.pixels import Preprocess

    image = Preprocess(channels=channels).encoded(place.read_bytes(), path)
    wanted = (editor.image_size, editor.image_size, channels)
    if image.shape != wanted:
        raise UserError(
            f"--config.edit.images={path}: an image of {image.shape[0]}x{image.shape[1]} pixels; "
            f"this network edits {wanted[0]}x{wanted[1]}"
        )
    return image[None]
