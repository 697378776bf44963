"""Layouts: the classed boxes of an image.

| source | path | |
|---|---|---|
| ``digit_canvases`` | unused | the boxes that these canvases were composed from |
| ``coco`` | instances JSON (and stuff JSON beside it) | `lfm_jax.data.coco` |

A box is ``(x0, y0, x1, y1)`` in fractions of the image's sides, class ids count from 0, and rows
are filled up to a fixed number of objects with boxes of zeros and class -1.

A canvas is a function of its split and number: one to four digits of scikit-learn's 8x8 ones (those
of the split, so that held-out canvases hold held-out digits), each enlarged to a side of 8 to 11
pixels and laid where it overlaps no other.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, Num, UInt8

from lfm_jax.data.coco import open_coco_layouts
from lfm_jax.data.source import ImageSource, hashed
from lfm_jax.errors import UserError

LAYOUT_SOURCES = ("digit_canvases", "coco")
MAX_DIGITS = 4
DIGIT_SIDES = (8, 12)  # from the first up to, without, the second
_COUNTS = {"train": 20_000, "test": 1_000}
_TRIES = 50


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayoutSource:
    """Random access to the layouts of an `ImageSource`.

    Attributes:
        name: what errors call it.
        size: number of layouts.
        max_objects: rows of a layout.
        class_names: one a class.
        fingerprint: sha256 hex.
        read: ``indices [n] -> (boxes float32 [n, m, 4], classes int32 [n, m])``.
    """

    name: str
    size: int
    max_objects: int
    class_names: tuple[str, ...]
    fingerprint: str
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return self.size

    def batch(
        self, indices: Integer[np.ndarray, " n"] | Sequence[int] | range
    ) -> dict[str, np.ndarray]:
        """``{"boxes": float32 [n, m, 4], "classes": int32 [n, m]}`` of the given places."""
        boxes, classes = self.read(np.asarray(indices, np.int64))
        return {"boxes": boxes, "classes": classes}


def open_layouts(
    source: str,
    images: ImageSource,
    *,
    split: str = "train",
    path: str = "",
    max_objects: int = 0,
) -> LayoutSource:
    """The layouts that belong to `images`, in its order.

    Raises:
        UserError: an unknown source, images of another kind, a file that is missing or damaged.
    """
    if source not in LAYOUT_SOURCES:
        raise UserError(f"condition.source={source!r}: expected one of {', '.join(LAYOUT_SOURCES)}")
    if source == "coco":
        found = open_coco_layouts(path, images, split=split, max_objects=max_objects or 30)
        return LayoutSource(name=f"coco:{path}", size=len(images), **found)
    if not images.name.startswith("digit_canvases"):
        raise UserError(
            f"condition.source=digit_canvases: the images are {images.name}; "
            "expected data.source=digit_canvases"
        )
    rows = max(max_objects, MAX_DIGITS)
    side = int(images.name.split(":")[1])

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        placed = [_place(split, int(index), side) for index in indices]
        return fill([(np.array(b) / side, c) for b, c, _ in placed], rows)

    return LayoutSource(
        name=f"layouts of {images.name}",
        size=len(images),
        max_objects=rows,
        class_names=tuple(str(digit) for digit in range(10)),
        fingerprint=hashed("boxes", images.fingerprint, str(rows)),
        read=read,
    )


def fill(
    layouts: list[tuple[Any, Any]], rows: int
) -> tuple[Float[np.ndarray, "n m 4"], Int[np.ndarray, "n m"]]:
    """Lists of boxes and classes as two arrays of `rows` rows, the rest zeros and -1."""
    boxes = np.zeros((len(layouts), rows, 4), np.float32)
    classes = np.full((len(layouts), rows), -1, np.int32)
    for i, (box, label) in enumerate(layouts):
        count = len(label)
        if count:
            boxes[i, :count], classes[i, :count] = box, label
    return boxes, classes


def read_layouts(
    path: str, *, num_classes: int, max_objects: int, overlap: bool
) -> tuple[Float[np.ndarray, "n m 4"], Int[np.ndarray, "n m"]]:
    """Layouts that somebody wrote: JSON, one list of ``[class, x0, y0, x1, y1]`` an image.

    Args:
        path: the file.
        overlap: whether boxes may overlap (the objects of photographs do).

    Raises:
        UserError: not such a file; a class that is none, a box that is empty, lies out of the
            canvas or overlaps another, too many boxes: each named by image and place.
    """
    try:
        entries = json.loads(Path(path).expanduser().read_text())
        layouts = [_rows(entry) for entry in entries]
    except (OSError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{path}: {error}; expected a JSON list of images, each a list of "
            "[class, x0, y0, x1, y1]"
        ) from None
    if not layouts:
        raise UserError(f"{path}: holds no layout")
    wrong = []
    for i, layout in enumerate(layouts):
        try:
            check_layout(
                layout[:, 1:], layout[:, 0], num_classes=num_classes, max_objects=max_objects,
                overlap=overlap, where=f"image {i}",
            )  # fmt: skip
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong[:8])} ({len(wrong)} images in all)")
    return fill([(layout[:, 1:], layout[:, 0].astype(int)) for layout in layouts], max_objects)


def _rows(entry: Any) -> Float[np.ndarray, "m 5"]:
    if not isinstance(entry, list):
        raise TypeError(f"an image is {entry!r}"[:80])
    for row in entry:
        # A string or a truth value would be taken for a number below.
        if not isinstance(row, list) or [type(v) in (int, float) for v in row] != [True] * 5:
            raise TypeError(f"a box is {row!r}"[:80])
    return np.asarray(entry, np.float64).reshape(-1, 5)


def check_layout(
    boxes: Float[np.ndarray, "m 4"],
    classes: np.ndarray,
    *,
    num_classes: int,
    max_objects: int,
    overlap: bool,
    where: str,
) -> None:
    """Refuse what no canvas can hold; every culprit is named (see `read_layouts`)."""
    wrong, fine = [], []
    if len(boxes) > max_objects:
        wrong.append(f"{len(boxes)} boxes, at most {max_objects} accepted")
    for i, (box, label) in enumerate(zip(boxes, classes, strict=True)):
        if not (0 <= label < num_classes and label == int(label)):
            wrong.append(f"box {i}: class {label:g} is not in 0..{num_classes - 1}")
        x0, y0, x1, y1 = box
        corners = ", ".join(f"{value:g}" for value in box)
        if not (np.isfinite(box).all() and x0 < x1 and y0 < y1):
            wrong.append(f"box {i} ({corners}) is empty, expected x0 < x1 and y0 < y1")
        elif min(x0, y0) < 0 or max(x1, y1) > 1:
            wrong.append(f"box {i} ({corners}) lies out of the canvas, expected 0 to 1")
        elif not overlap and len(boxes) <= max_objects:
            crossed = [j for j in fine if intersection(boxes[i], boxes[j]) > 1e-9]
            wrong += [f"boxes {j} and {i} overlap" for j in crossed]
            fine.append(i)
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}")


def intersection(a: Num[np.ndarray, "4"], b: Num[np.ndarray, "4"]) -> float:
    """Common area of two boxes."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(np.prod(np.maximum(sides, 0)))


# ---- canvases of digits


def open_digit_canvases(*, split: str, image_size: int, channels: int, limit: int) -> ImageSource:
    """Canvases of real digits; `limit` says how many (0: 20,000 to train on, 1,000 to test on).

    Raises:
        UserError: an unknown split, colours, or a canvas that is too small.
    """
    if split not in _COUNTS:
        raise UserError(f"digit_canvases split {split!r}: expected one of train, test")
    if channels != 1 or image_size < 2 * DIGIT_SIDES[1]:
        raise UserError(
            f"data.image_size={image_size}, data.channels={channels}: canvases of digits are gray "
            f"and have sides of at least {2 * DIGIT_SIDES[1]}"
        )
    count = min(limit or _COUNTS[split], _COUNTS[split])
    digits = _digits(split)

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        canvases = [_compose(digits, *_place(split, int(i), image_size), image_size)
                    for i in indices]  # fmt: skip
        return np.stack(canvases), np.full(len(indices), -1, np.int32)

    return ImageSource(
        name=f"digit_canvases:{image_size}:{split}",
        size=count,
        labels=np.full(count, -1, np.int32),
        class_names=(),
        fingerprint=hashed(
            np.concatenate([images for images in digits]),
            f"{split} {count} {image_size}",
            f"{DIGIT_SIDES} {MAX_DIGITS}",
        ),
        read=read,
    )


@functools.cache
def _digits(split: str) -> tuple[UInt8[np.ndarray, "_ 8 8"], ...]:
    """The digits of a split by class, every fifth of a class held out."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    groups = [images[bunch.target == digit] for digit in range(10)]
    held_out = [np.arange(len(group)) % 5 == 4 for group in groups]
    return tuple(
        group[out if split == "test" else ~out] for group, out in zip(groups, held_out, strict=True)
    )


def _place(
    split: str, index: int, side: int
) -> tuple[list[tuple[int, int, int, int]], list[int], list[float]]:
    """Boxes in pixels, classes, and a number in [0, 1) that picks each digit's picture."""
    random = np.random.default_rng([20_231, split == "test", index, side])
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(random.integers(1, MAX_DIGITS + 1)):
        for _ in range(_TRIES):
            size = int(random.integers(*DIGIT_SIDES))
            x, y = (int(v) for v in random.integers(0, side - size + 1, 2))
            box = (x, y, x + size, y + size)
            if all(intersection(np.array(box), np.array(other)) == 0 for other in boxes):
                boxes.append(box)
                break
    classes = random.integers(0, 10, len(boxes)).tolist()
    return boxes, classes, random.random(len(boxes)).tolist()


def _compose(
    digits: tuple[np.ndarray, ...],
    boxes: list[tuple[int, int, int, int]],
    classes: list[int],
    picks: list[float],
    side: int,
) -> UInt8[np.ndarray, "s s 1"]:
    from PIL import Image

    canvas = np.zeros((side, side, 1), np.uint8)
    for (x0, y0, x1, y1), digit, pick in zip(boxes, classes, picks, strict=True):
        group = digits[digit]
        picture = Image.fromarray(group[int(pick * len(group))])
        picture = picture.resize((x1 - x0, y1 - y0), resample=Image.Resampling.BILINEAR)
        canvas[y0:y1, x0:x1, 0] = np.asarray(picture)
    return canvas
