"""Semantic maps, one an image: a class id a pixel.

| source | path | classes |
|---|---|---|
| ``garment_parts`` | unused: made from the images by a rule | background, garment, edge |
| ``folder`` | PNG files of ids, paired with the images' files by name | those the caller counts |
| ``ade20k`` | ``annotations/{training,validation}`` | 0 unknown, 1 to 150 |
| ``coco_stuff`` | PNG files, 0 to 181 and 255 | 0 unlabelled, then 182 |
| ``celebamask`` | CelebAMask-HQ's root | 0 background, then its 18 parts |

The rule of ``garment_parts``, for gray images of a bright object on black: the image is smoothed by
the 3x3 binomial kernel; below 24 it is *background*; elsewhere it is *edge* where the Sobel
gradient exceeds 60 levels a pixel, and *garment* for the rest. It knows nothing but pixels, so the
same rule reads the map of a sample.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Integer, UInt8

from lfm_jax.data.celebamask import PARTS, read_parts
from lfm_jax.data.folder import SPLIT_FOLDERS
from lfm_jax.data.id_files import check_ids, fit_map, pair_by_name, read_ids
from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.source import ImageSource, hashed
from lfm_jax.errors import UserError

MAP_SOURCES = ("garment_parts", "folder", "ade20k", "coco_stuff", "celebamask")
GARMENT_PARTS = ("background", "garment", "edge")
BACKGROUND_BELOW = 24
EDGE_ABOVE = 60
_COUNTS = {"ade20k": 151, "coco_stuff": 183, "celebamask": 1 + len(PARTS)}
_UNLABELLED = 255  # of COCO-Stuff


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MapSource:
    """Random access to the maps of an `ImageSource`.

    Attributes:
        name: what errors call it.
        size: number of maps.
        num_classes: ids lie in ``[0, num_classes)``.
        class_names: one a class, or empty.
        fingerprint: sha256 hex of the maps and of how they are made.
        read: ``indices [n] -> uint8 [n, H, W]``.
    """

    name: str
    size: int
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    read: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return self.size

    def batch(
        self, indices: Integer[np.ndarray, " n"] | Sequence[int] | range
    ) -> UInt8[np.ndarray, "n h w"]:
        """The maps of the given places.

        Raises:
            UserError: an id that is no class, naming the file and the id.
        """
        return self.read(np.asarray(indices, np.int64))


def open_maps(
    source: str,
    images: ImageSource,
    *,
    split: str = "train",
    path: str = "",
    image_size: int,
    num_classes: int = 0,
) -> MapSource:
    """The maps that belong to `images`, in its order.

    Args:
        source: one of `MAP_SOURCES`.
        images: of the same split; sources of files pair by file name without suffix.
        path: folder of the maps.
        image_size: side in pixels; maps are resized without mixing ids and cropped as images are.
        num_classes: of ``folder``, where nothing else tells it.

    Raises:
        UserError: an unknown source, a missing path, images and maps that do not pair.
    """
    if source not in MAP_SOURCES:
        raise UserError(f"condition.source={source!r}: expected one of {', '.join(MAP_SOURCES)}")
    if source == "garment_parts":
        return _by_rule(images)
    if not path:
        raise UserError(f"condition.path is unset: maps of {source!r} need a folder")
    if not images.files:
        raise UserError(
            f"condition.source={source}: {images.name} has no file names to pair maps with; "
            "expected data.source=folder, zip or celebamask"
        )
    preprocess = Preprocess(image_size=image_size, channels=1)
    if source == "celebamask":
        numbers = [_face(name) for name in images.files]
        folder = Path(path).expanduser()

        def read_one(i: int) -> np.ndarray:
            return fit_map(read_parts(folder, numbers[i]), preprocess, images.files[i])

        return _of_files(source, images, read_one, 1 + len(PARTS), ("background", *PARTS))
    classes = _COUNTS.get(source, num_classes)
    if not 0 < classes <= 256:
        raise UserError(
            f"condition.num_classes={classes}: expected the number of ids of the maps, 1 to 256"
        )
    root = _split_folder(Path(path).expanduser(), split)
    files = pair_by_name(images.files, root)

    def read_one(i: int) -> np.ndarray:
        return read_map(files[i], source, classes, preprocess)

    return _of_files(source, images, read_one, classes, ())


def garment_parts(images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w"]:
    """Background 0, garment 1, edge 2 of gray images, by the rule in the module's docstring."""
    x = np.pad(images.mean(-1, dtype=np.float32), ((0, 0), (2, 2), (2, 2)), mode="edge")
    smooth = _binomial(_binomial(x, 1), 2)
    across = _binomial(smooth[:, :, 2:] - smooth[:, :, :-2], 1)
    down = _binomial(smooth[:, 2:] - smooth[:, :-2], 2)
    garment = smooth[:, 1:-1, 1:-1] >= BACKGROUND_BELOW
    edge = garment & (np.hypot(across, down) > EDGE_ABOVE)
    return garment.astype(np.uint8) + edge


def _binomial(x: np.ndarray, axis: int) -> np.ndarray:
    first, middle, last = (
        np.take(x, np.arange(start, x.shape[axis] - 2 + start), axis) for start in range(3)
    )
    return (first + 2 * middle + last) / 4


def read_map(
    path: Path, source: str, num_classes: int, preprocess: Preprocess
) -> UInt8[np.ndarray, "s s"]:
    """A file's map in this package's ids, as large as images are.

    Args:
        path: a PNG of ids as the files of `source` have them.
        source: one of `MAP_SOURCES`.
        num_classes: of the result.
        preprocess: of the images.

    Raises:
        UserError: not a map, or an id that is no class, as it stands in the file.
    """
    ids = read_ids(path)
    if source == "coco_stuff":
        check_ids(np.where(ids == _UNLABELLED, 0, ids), num_classes - 1, str(path))
        ids = np.where(ids == _UNLABELLED, 0, ids + 1)
    check_ids(ids, num_classes, str(path))
    return fit_map(ids, preprocess, str(path))


def _face(name: str) -> int:
    stem = PurePosixPath(name).stem
    if not (stem.isascii() and stem.isdecimal()):
        raise UserError(f"image {name}: expected a number as CelebAMask-HQ names its faces, 0.jpg")
    return int(stem)


def _split_folder(root: Path, split: str) -> Path:
    """The split's subfolder of the maps where there is one, else the folder itself."""
    for parent in (root / "annotations", root):
        for name in SPLIT_FOLDERS.get(split, (split,)):
            if (parent / name).is_dir():
                return parent / name
    return root


def _of_files(
    source: str,
    images: ImageSource,
    read_one: Callable[[int], np.ndarray],
    num_classes: int,
    class_names: tuple[str, ...],
) -> MapSource:
    # A few maps stand for all: their files belong to the images, whose listing is hashed whole.
    sampled = np.linspace(0, len(images) - 1, min(32, len(images))).astype(int)
    contents = [np.ascontiguousarray(read_one(int(i))) for i in sampled]
    return MapSource(
        name=f"{source} maps of {images.name}",
        size=len(images),
        num_classes=num_classes,
        class_names=class_names,
        fingerprint=hashed(source, images.fingerprint, str(num_classes), *contents),
        read=lambda indices: np.stack([read_one(int(i)) for i in indices]),
    )


def _by_rule(images: ImageSource) -> MapSource:
    return MapSource(
        name=f"garment_parts of {images.name}",
        size=len(images),
        num_classes=len(GARMENT_PARTS),
        class_names=GARMENT_PARTS,
        fingerprint=hashed(images.fingerprint, f"{BACKGROUND_BELOW} {EDGE_ABOVE}"),
        read=lambda indices: garment_parts(images.batch(indices)["image"]),
    )
