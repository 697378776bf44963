"""Image files whose pixels are numbers and not colours: maps and masks beside their images.

They are read, paired with the images by name, and brought to the square that an image was cropped
to.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from lfm_jax.data.pixels import MAX_PIXELS, Preprocess
from lfm_jax.errors import UserError


def read_ids(path: Path, *, levels: bool = False) -> Integer[np.ndarray, "h w"]:
    """The ids of a gray or palette image file.

    Args:
        path: the file.
        levels: of a palette image the gray levels of its colours, in the place of ids.

    Raises:
        UserError: no such file, not an image, one of too many pixels, or one of colours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{path}: {width}x{height} pixels; at most {MAX_PIXELS} accepted")
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                raise UserError(
                    f"{path}: mode {image.mode}; expected gray or palette ids, not colours"
                )
            picture = image.convert("L") if levels and image.mode == "P" else image
            return np.array(picture).astype(np.int32)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # Pillow's plugins raise nearly anything on damaged files.
    except Exception as error:
        raise UserError(f"{path}: not a readable image ({error}); expected PNG") from None


def check_ids(ids: Integer[np.ndarray, "*s"], num_classes: int, where: str) -> None:
    """Refuse ids outside ``[0, num_classes)``, all of them named."""
    unknown = np.unique(ids[(ids < 0) | (ids >= num_classes)])
    if len(unknown):
        named = ", ".join(str(value) for value in unknown[:8])
        raise UserError(f"{where}: unknown class id {named}; expected 0 to {num_classes - 1}")


def fit_map(
    ids: Integer[np.ndarray, "h w"], preprocess: Preprocess, where: str
) -> UInt8[np.ndarray, "s s"]:
    """Ids resized by nearest neighbour and cropped to the square that the image was cropped to.

    Raises:
        UserError: a map so narrow that it would grow beyond all memory; `where` names it.
    """
    return _fitted(ids.astype(np.uint8), preprocess, "NEAREST", where)


def fit_hole(
    mask: Integer[np.ndarray, "h w"], preprocess: Preprocess, where: str
) -> Bool[np.ndarray, "s s"]:
    """A hole brought to size as by `fit_map`, with every pixel that touches it.

    A pixel that counts as known must not hold a part of what is hidden.
    """
    return _fitted((mask > 0).astype(np.float32), preprocess, "BOX", where) > 0


def _fitted(values: np.ndarray, preprocess: Preprocess, rule: str, where: str) -> np.ndarray:
    """Resized by one of Pillow's rules and cropped."""
    from PIL import Image

    size, long, short = preprocess.image_size, max(values.shape), min(values.shape)
    if size * size * long > preprocess.max_pixels * short:
        raise UserError(
            f"{where}: {values.shape[1]}x{values.shape[0]} pixels grow beyond "
            f"{preprocess.max_pixels} at image_size={size}; expected a less narrow map"
        )
    picture = Image.fromarray(values)
    ratio = size / min(picture.size)
    width, height = (round(side * ratio) for side in picture.size)
    picture = picture.resize((width, height), resample=Image.Resampling[rule])
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture)[top : top + size, left : left + size]


def pair_by_name(names: Sequence[str], folder: Path) -> list[Path]:
    """The file of `folder` (searched whole) for each of `names`, by its stem.

    Where stems repeat, such as in subfolders of classes that count from 0 each, the subfolders have
    to be the same on both sides.

    Raises:
        UserError: some have no partner on the other side, or two share one; they are named.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one of PNG files")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() == ".png"]
    images = [PurePosixPath(name) for name in names]
    places = [PurePosixPath(path.relative_to(folder).as_posix()) for path in files]
    whole = any(len({p.stem for p in side}) < len(side) for side in (images, places))
    wanted, there = (
        [str(place.with_suffix("")) if whole else place.stem for place in side]
        for side in (images, places)
    )
    for side, given in ((images, wanted), (places, there)):
        double, times = Counter(given).most_common(1)[0] if given else ("", 0)
        if times > 1:
            both = ", ".join(str(p) for p, name in zip(side, given, strict=True) if name == double)
            raise UserError(f"{folder}: {both} have one name; expected one image a name")
    found = dict(zip(there, files, strict=True))
    without = [name for name, stem in zip(names, wanted, strict=True) if stem not in found]
    over = sorted(set(found) - set(wanted))
    if without or over:
        parts = [f"no file for image {', '.join(without[:8])}"] if without else []
        parts += [f"no image for file {', '.join(f'{s}.png' for s in over[:8])}"] if over else []
        raise UserError(
            f"{folder}: {'; '.join(parts)} ({len(without)} and {len(over)} in all); "
            "expected one PNG of the same name for each image"
        )
    return [found[stem] for stem in wanted]
