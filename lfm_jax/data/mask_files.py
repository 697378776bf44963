"""Somebody's images with holes: a folder of images and one of masks, paired by name.

FOLDER/images/a.png     FOLDER/masks/a.png        white: hole, black: known
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from lfm_jax.data.folder import open_folder
from lfm_jax.data.id_files import fit_hole, pair_by_name, read_ids
from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.source import ImageSource
from lfm_jax.errors import UserError


def open_masked(
    path: str, *, image_size: int, channels: int
) -> tuple[ImageSource, Bool[np.ndarray, "n h w"]]:
    """The images of a folder and their masks, brought to one size alike.

    Raises:
        UserError: folders missing or not pairing, an image that cannot be read; masks that cannot
            be read, are not binary, hide nothing, or are of another size than their image: all of
            them named.
    """
    folder = Path(path).expanduser()
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part}: no such folder; expected images/ and masks/")
    preprocess = Preprocess(image_size=image_size, channels=channels, fit="crop")
    source, stored = (
        open_folder(str(folder / "images"), split="train", preprocess=how)
        for how in (preprocess, dataclasses.replace(preprocess, image_size=0))
    )
    masks, wrong = [], []
    for i, file in enumerate(pair_by_name(source.files, folder / "masks")):
        size = stored[i]["image"].shape[:2]
        try:
            # Black and white are what is seen, also where a palette counts white as 0.
            values = read_ids(file, levels=True)
        except UserError as error:
            wrong.append(str(error))
            continue
        other = np.setdiff1d(np.unique(values), (0, 255 if values.max() > 1 else 1))
        if values.shape != size:
            wrong.append(f"{file.name} has {_by(values.shape)} pixels, its image {_by(size)}")
        elif len(other):
            wrong.append(f"{file.name} is not binary (it holds {other[0]} beside 0 and 255)")
        elif not values.any():
            wrong.append(f"{file.name} has no hole")
        else:
            mask = fit_hole(values, preprocess, str(file))
            if not mask.any():
                wrong.append(f"{file.name} has no hole left at {_by(mask.shape)} pixels")
            masks.append(mask)
    if wrong:
        raise UserError(
            f"{folder / 'masks'}: {'; '.join(wrong[:8])} ({len(wrong)} in all); expected masks of "
            "0 and 255, of their image's size"
        )
    return source, np.stack(masks)


def _by(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
