"""Labels of image files: which class each is of, and what the classes are called.

Labels come from, in this order: the CSV file that the caller names; a ``labels.csv`` or an
EDM-style ``dataset.json`` beside the images; the names of the first-level subfolders, sorted; none
(a flat folder).

A class has one number in every split: names of subfolders and in tables beside the images are
numbered in the order of all that any split folder has, names in the caller's table in that of all
its rows. The topmost subfolders are the classes also where there is only one: a folder around the
class subfolders (``pets/cat``, ``pets/dog``, as many a zip is packed) is the one class ``pets``,
because files do not tell at which level classes begin. Asking for more classes says so.
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from lfm_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_MAX_CLASSES = 1_000_000
_NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a split: what errors call them, bytes by name, checksums if known, a reader."""

    where: str
    sizes: dict[str, int]
    checksums: dict[str, int]
    read: Callable[[str], bytes]

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    @property
    def images(self) -> list[str]:
        return sorted(filter(is_image, self.sizes))


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def read_labels(
    files: Files, images: list[str], table: str, others: Iterable[Files]
) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """A label an image, the classes' names, and whether these are more than numbers."""
    if table:
        try:
            rows = _csv_rows(Path(table).expanduser().read_bytes(), table)
        except OSError as error:
            raise UserError(f"labels {table!r}: {error.strerror}; expected a CSV file") from None
        return _from_table(rows, images, table, ())
    rows = _own_rows(files)
    if rows is not None:
        return _from_table(rows, images, files.where, others)
    parents = [name.split("/")[0] if "/" in name else "" for name in images]
    if not any(parents):
        return np.full(len(images), -1), (), False
    if not all(parents):
        raise UserError(
            f"{files.where}: images both beside and inside class subfolders "
            f"(such as {images[parents.index('')]}); expected one or the other"
        )
    return _numbered(parents, set(parents).union(*map(_class_names, others)))


def _own_rows(files: Files) -> dict[str, str] | None:
    """The table beside the images, if there is one that has labels."""
    if "labels.csv" in files:
        return _csv_rows(files.read("labels.csv"), f"{files.where}/labels.csv")
    if "dataset.json" in files:
        return _json_rows(files.read("dataset.json"), f"{files.where}/dataset.json") or None
    return None


def _class_names(files: Files) -> set[str]:
    """The names that a split gives its classes; none where it is flat or has numbers."""
    rows = _own_rows(files)
    if rows is not None:
        return _names_in(rows)
    return {name.split("/")[0] for name in files.images if "/" in name}


def _names_in(rows: dict[str, str]) -> set[str]:
    """The class names in a table; none where all are numbers. A header names no image."""
    values = {value for name, value in rows.items() if is_image(name)}
    return set() if all(map(_NUMBER.fullmatch, values)) else values


def _numbered(values: list[str], names: set[str]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    place = {name: i for i, name in enumerate(sorted(names))}
    return np.array([place[value] for value in values]), tuple(place), True


def advice(images: list[str], classes: tuple[str, ...]) -> str:
    """What may be meant where all lies in one folder: the subfolders that it is packed around."""
    inner = {parts[1] for parts in (name.split("/") for name in images) if len(parts) > 2}
    if not inner or {name.split("/")[0] for name in images} != set(classes):
        return ""
    listed = ", ".join(sorted(inner)[:8])
    return (
        f", or the subfolders of {classes[0]}/ ({listed}) in its place: classes are the topmost "
        "folders"
    )


def _csv_rows(data: bytes, where: str) -> dict[str, str]:
    try:
        lines = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: not a CSV file ({error})") from None
    rows = {}
    for number, line in enumerate(lines, start=1):
        if line and len(line) != 2:
            raise UserError(f"{where}: line {number} has {len(line)} fields; expected file,label")
        if line and not (number == 1 and line[1].strip().lower() in ("label", "class")):
            rows[line[0].strip()] = line[1].strip()
    return rows


def _json_rows(data: bytes, where: str) -> dict[str, str]:
    try:
        return {name: str(int(label)) for name, label in json.loads(data)["labels"] or []}
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f'{where}: {error}; expected {{"labels": [["file", class], ...]}}'
        ) from None


def _from_table(
    rows: dict[str, str], images: list[str], where: str, others: Iterable[Files]
) -> tuple[np.ndarray, tuple[str, ...], bool]:
    missing = [name for name in images if name not in rows]
    if missing:
        raise UserError(f"{where}: no label for {missing[0]} ({len(missing)} files without one)")
    values = [rows[name] for name in images]
    if names := _names_in(rows):
        return _numbered(values, names.union(*map(_class_names, others)))
    numbers = [int(value) for value in values]
    for name, number in zip(images, numbers, strict=True):
        if not 0 <= number < _MAX_CLASSES:
            raise UserError(
                f"{where}: label {number} of {name} is out of range; "
                f"expected 0 to {_MAX_CLASSES - 1}"
            )
    labels = np.array(numbers)
    return labels, tuple(str(i) for i in range(int(labels.max()) + 1)), False
