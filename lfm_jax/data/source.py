"""`ImageSource`: what every place that images come from looks like to the rest of the project."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int, Integer, UInt8

from lfm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource:
    """Random access to equally sized uint8 images and their labels.

    Attributes:
        name: what errors and logs call it, such as "idx:/data/fashion".
        size: number of images.
        labels: one class index an image, -1 where there is none; None when they are known only
            from reading the images (TFDS).
        class_names: one name a class; empty for an unlabelled source.
        fingerprint: sha256 hex of the content and of the preprocessing. Folders of files hash all
            names and sizes and a sample of the contents, so that a million files open quickly.
        read: ``indices [n] -> (uint8 [n, H, W, C], int32 [n])``; callable from several threads.
        files: one file name an image where images are files, to pair them with others.
    """

    name: str
    size: int
    labels: Int[np.ndarray, " n"] | None
    class_names: tuple[str, ...]
    fingerprint: str
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """``{"image": uint8 [H, W, C], "label": int}``."""
        row = self.batch([range(self.size)[index]])
        return {"image": row["image"][0], "label": int(row["label"][0])}

    def batch(
        self, indices: Integer[np.ndarray, " n"] | Sequence[int] | range
    ) -> dict[str, np.ndarray]:
        """``{"image": uint8 [n, H, W, C], "label": int32 [n]}`` of the given places."""
        places = np.asarray(indices, np.int64)
        if len(places) and (places.min() < 0 or places.max() >= self.size):
            raise IndexError(f"{self.name}: {self.size} images; asked for {places.max()}")
        images, labels = self.read(places)
        if self.labels is None and self.class_names:
            check_labels(labels, self.num_classes, self.name, places)
        return {"image": images, "label": labels}

    @property
    def num_classes(self) -> int:
        """How many classes the labels are of; 0 without labels."""
        return len(self.class_names)


def hashed(*parts: bytes | str | np.ndarray | dict | list) -> str:
    """sha256 hex over parts; JSON in canonical form, arrays as type, shape and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).data.cast("B") if part.size else b""
        elif isinstance(part, (dict, list)):
            part = json.dumps(part, sort_keys=True).encode()
        elif isinstance(part, str):
            part = part.encode()
        digest.update(f"{len(part)}:".encode())
        digest.update(part)
    return digest.hexdigest()


def array_source(
    name: str,
    images: UInt8[np.ndarray, "n h w c"],
    labels: Integer[np.ndarray, " n"],
    class_names: tuple[str, ...],
) -> ImageSource:
    """A source that lies in memory; a batch is one gather."""
    labels = labels.astype(np.int32)
    return ImageSource(
        name=name,
        size=len(images),
        labels=labels,
        class_names=class_names,
        fingerprint=hashed(images, labels, list(class_names)),
        read=lambda indices: (images[indices], labels[indices]),
    )


def encoded_source(
    name: str,
    read_one: Callable[[int], np.ndarray],
    labels: Integer[np.ndarray, " n"],
    class_names: tuple[str, ...],
    fingerprint: str,
    files: tuple[str, ...] = (),
) -> ImageSource:
    """A source whose images are decoded one by one when they are asked for."""
    labels = labels.astype(np.int32)
    return ImageSource(
        name=name,
        size=len(labels),
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint,
        read=lambda indices: (
            stack([read_one(int(index)) for index in indices], name),
            labels[indices],
        ),
        files=files,
    )


def stack(images: list[np.ndarray], name: str) -> np.ndarray:
    """Stack decoded images; a source of mixed sizes needs an image_size."""
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise UserError(
            f"{name}: images of different sizes {sorted(shapes)[:2]}; "
            "expected data.image_size > 0 to bring them to one"
        )
    return np.stack(images)


def check_count(class_names: Sequence[str], num_classes: int, where: str, hint: str = "") -> None:
    """Refuse fewer classes than are asked for, where each that there is has a name.

    Of numbers the largest may be missing; to fill names up would count classes that nobody has.

    Args:
        class_names: those of the source.
        num_classes: asked for; 0 asks for none.
        where: the source.
        hint: what else may be meant, for the end of the line.
    """
    count = len(class_names)
    if count < num_classes:
        listed = ", ".join(class_names[:8]) + (", ..." if count > 8 else "")
        raise UserError(
            f"data.num_classes={num_classes}: {where} has {count} class{'es' * (count != 1)} "
            f"({listed}); expected {count}{hint}"
        )


def check_labels(
    labels: Integer[np.ndarray, " n"],
    num_classes: int,
    where: str,
    indices: Integer[np.ndarray, " n"] | None = None,
) -> None:
    """Refuse a label outside ``[0, num_classes)``, naming the first culprit."""
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        index = bad[0] if indices is None else indices[bad[0]]
        raise UserError(
            f"{where}: label {labels[bad[0]]} of image {index} is out of range; "
            f"expected 0 to {num_classes - 1}"
        )
