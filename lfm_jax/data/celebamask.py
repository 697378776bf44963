"""CelebAMask-HQ: faces with a mask a part, merged into one map a face (Lee et al. 2020).

    ROOT/CelebA-HQ-img/<n>.jpg                               n = 0 .. 29999
    ROOT/CelebAMask-HQ-mask-anno/<n // 2000>/<n:05d>_<part>.png      512x512; absent parts have none

The parts are laid over one another in the order of `PARTS`: a later one covers an earlier one (hair
covers ears, a hat covers hair, cloth covers the neck). Part k of the list has id k + 1, and 0 is
background. Latent flow matching trains on the first 27,000 faces and tests on the other 3,000.
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.source import ImageSource, encoded_source, hashed
from lfm_jax.errors import UserError

PARTS = (
    "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear",
    "mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
IMAGES = "CelebA-HQ-img"
MASKS = "CelebAMask-HQ-mask-anno"
_TRAIN = 27_000
_FOLDER = 2_000  # faces a folder of masks
_SIDE = 512


def open_celebamask(path: str, *, split: str, preprocess: Preprocess) -> ImageSource:
    """The faces of a split: numbers below 27,000 are "train", the others "test".

    Raises:
        UserError: no such folder, an unknown split, no face of it.
    """
    if split not in ("train", "test"):
        raise UserError(f"celebamask split {split!r}: expected one of train, test")
    folder = Path(path).expanduser() / IMAGES
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected CelebAMask-HQ's root in data.path")
    numbers = sorted(int(file.stem) for file in folder.glob("*.jpg") if file.stem.isdecimal())
    numbers = [n for n in numbers if (n < _TRAIN) == (split == "train")]
    if not numbers:
        raise UserError(f"{folder}: holds no face of the {split} split, such as {_TRAIN}.jpg")
    files = [folder / f"{n}.jpg" for n in numbers]
    listing = [[file.name, file.stat().st_size] for file in files]
    return encoded_source(
        f"celebamask:{path}",
        lambda i: preprocess.encoded(files[i].read_bytes(), str(files[i])),
        np.full(len(files), -1),
        (),
        hashed(listing, preprocess.spec()),
        tuple(file.name for file in files),
    )


def read_parts(root: Path, number: int) -> UInt8[np.ndarray, "512 512"]:
    """The merged map of face `number`.

    Raises:
        UserError: no part of it is there, or a part is not a 512x512 image.
    """
    from PIL import Image

    folder = root / MASKS / str(number // _FOLDER)
    merged, found = np.zeros((_SIDE, _SIDE), np.uint8), False
    for value, part in enumerate(PARTS, start=1):
        file = folder / f"{number:05d}_{part}.png"
        if not file.exists():
            continue
        found = True
        try:
            with Image.open(file) as image:
                if image.size != merged.shape:
                    size = "x".join(map(str, image.size))
                    raise UserError(f"{file}: {size} pixels; expected 512x512")
                # Some files are gray, some of a palette: the part is what is not black.
                on = np.array(image.convert("L")) > 127
        except UserError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise UserError(f"{file}: not a readable image ({error}); expected PNG") from None
        merged[on] = value
    if not found:
        raise UserError(f"{folder}: no part of face {number:05d}; expected {number:05d}_skin.png")
    return merged
