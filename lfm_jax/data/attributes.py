"""Attributes of images: which side of a question each of them is on.

An attribute is written ``kind:A/B`` or ``kind:NAME``; A is its negative and B its positive side.

| written | what | needs |
|---|---|---|
| ``pair:sneaker/ankle boot`` | two classes, by name or number; others are on no side | labels |
| ``class:cat`` | one class against the rest (AFHQ: cat, dog, wild) | labels |
| ``table:Smiling`` | a column of a table of -1/1 or 0/1 (CelebA's 40) | files, a table |
| ``pixels:slant`` | measured on the image: brightness, thickness, slant | nothing |
| ``text:a cat/a dog`` | which of two texts CLIP finds closer | CLIP weights |
"""

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float, Int8, Integer, UInt8

from lfm_jax.errors import UserError

KINDS = ("pair", "class", "table", "pixels", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribute:
    """A parsed attribute.

    Attributes:
        name: as it was written.
        kind: one of `KINDS`.
        negative, positive: words for the two sides.
    """

    name: str
    kind: str
    negative: str
    positive: str


def parse_attribute(text: str) -> Attribute:
    """The attribute that `text` names; see the module's table.

    Raises:
        UserError: another form or kind.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS or not rest:
        raise UserError(
            f"attribute {text!r}: expected pair:A/B, class:NAME, table:NAME, text:A/B or "
            f"pixels:{'|'.join(PIXELS)}"
        )
    negative, _, positive = rest.partition("/")
    if kind in ("pair", "text"):
        if not negative or not positive:
            raise UserError(f"attribute {text!r}: expected two sides, {kind}:A/B")
    else:
        negative, positive = f"not {rest}", rest
    if kind == "pixels" and rest not in PIXELS:
        raise UserError(f"attribute {text!r}: expected one of pixels:{', pixels:'.join(PIXELS)}")
    return Attribute(name=text, kind=kind, negative=negative, positive=positive)


def class_number(name: str, class_names: Sequence[str], *, attribute: str) -> int:
    """The class called `name` (any case), or of that number.

    Raises:
        UserError: no such class.
    """
    names = [known.lower() for known in class_names]
    if name.strip().lower() in names:
        return names.index(name.strip().lower())
    if name.strip().isdecimal() and int(name) < len(names):
        return int(name)
    shown = ", ".join(class_names[:20]) or "none: the images are not labelled"
    raise UserError(f"attribute {attribute!r}: no class {name!r}; there are {shown}")


def class_sides(
    attribute: Attribute, labels: Integer[np.ndarray, " n"], class_names: Sequence[str]
) -> Int8[np.ndarray, " n"]:
    """-1, +1, or 0 for images on no side, of a ``pair`` or ``class`` attribute.

    Raises:
        UserError: an unknown class, or a pair of one class.
    """

    def number(name):
        return class_number(name, class_names, attribute=attribute.name)

    positive = labels == number(attribute.positive)
    if attribute.kind == "class":
        return np.where(positive, 1, -1).astype(np.int8)
    if number(attribute.positive) == number(attribute.negative):
        raise UserError(f"attribute {attribute.name!r}: both sides are the same class")
    negative = labels == number(attribute.negative)
    return (positive.astype(np.int8) - negative.astype(np.int8)).astype(np.int8)


def read_table(path: str) -> tuple[tuple[str, ...], dict[str, Int8[np.ndarray, " k"]]]:
    """A table of attributes: the columns' names, and the row of each file.

    CelebA's own layout (a line with the count, a line with the names, then a file and its values,
    separated by blanks) or CSV with a header whose first column is the file. Values are 1 for
    present and -1 or 0 for absent.

    Raises:
        UserError: no such file, a row of another length, a value that is none of -1, 0, 1.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"attribute table {path!r}: {error}; expected a text file") from None
    commas = any("," in line for line in lines[:2])
    rows = list(csv.reader(lines)) if commas else [line.split() for line in lines]
    rows = [(number, row) for number, row in enumerate(rows, start=1) if row]
    if rows and not commas and len(rows[0][1]) == 1 and rows[0][1][0].isdecimal():
        rows = rows[1:]  # CelebA's count
    if len(rows) < 2:
        raise UserError(f"attribute table {path!r}: expected a header and at least one row")
    (_, header), rows = rows[0], rows[1:]
    # A blank-separated header names the values only, CSV names the file's column too.
    names = tuple(
        name.strip() for name in (header[1:] if len(header) == len(rows[0][1]) else header)
    )
    table = {}
    for number, row in rows:
        if len(row) != len(names) + 1 or not {v.strip() for v in row[1:]} <= {"-1", "0", "1"}:
            raise UserError(
                f"attribute table {path!r}: line {number}: expected a file and {len(names)} values "
                "of -1, 0 or 1"
            )
        table[row[0].strip()] = np.array([1 if v.strip() == "1" else -1 for v in row[1:]], np.int8)
    return names, table


def table_sides(attribute: Attribute, files: Sequence[str], path: str) -> Int8[np.ndarray, " n"]:
    """-1 or +1 for every file, by the attribute's column of the table at `path`.

    Files are looked up by their path, their name, and their name with the ending .jpg (CelebA-HQ's
    PNG copies).

    Raises:
        UserError: images that are no files, no such column, a file without a row.
    """
    if not files:
        raise UserError(
            f"attribute {attribute.name!r}: these images have no file names; expected data.source "
            "folder or zip"
        )
    names, table = read_table(path)
    if attribute.positive not in names:
        raise UserError(
            f"attribute {attribute.name!r}: {path} has no such column; it has {', '.join(names)}"
        )
    column = names.index(attribute.positive)
    sides = np.zeros(len(files), np.int8)
    for i, file in enumerate(files):
        place = PurePosixPath(file)
        keys = (file, place.name, f"{place.stem}.jpg", place.stem)
        row = next((table[key] for key in keys if key in table), None)
        if row is None:
            raise UserError(f"attribute {attribute.name!r}: {path} has no row for {file}")
        sides[i] = row[column]
    return sides


def brightness(images: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, " n"]:
    """Mean over the pixels."""
    return images.mean(axis=(1, 2))


def thickness(images: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, " n"]:
    """Width of the strokes in pixels: twice the ink over the length of its outline.

    The outline's length is the total variation; a bar of width w and length l has ink w l and
    outline 2 l.
    """
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    down = np.diff(padded, axis=1)[:, :, :-1]
    right = np.diff(padded, axis=2)[:, :-1, :]
    outline = np.sqrt(down**2 + right**2).sum(axis=(1, 2))
    return 2 * images.sum(axis=(1, 2)) / np.maximum(outline, 1e-6)


def slant(images: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, " n"]:
    """How far the ink leans to the right per row upwards: the shear that its moments show."""
    _, h, w = images.shape
    y, x = np.mgrid[:h, :w]
    ink = np.maximum(images.sum(axis=(1, 2)), 1e-6)

    def mean(values):
        return (images * values).sum(axis=(1, 2)) / ink

    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x * y) - mean_x * mean_y
    variance = mean(y**2) - mean_y**2
    return -covariance / np.maximum(variance, 1e-6)


PIXELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "brightness": brightness,
    "thickness": thickness,
    "slant": slant,
}


def pixel_values(
    attribute: Attribute, images: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, " n"]:
    """The measured property of each image (full range 1, colours averaged)."""
    return PIXELS[attribute.positive](images.astype(np.float64).mean(axis=-1) / 255)
