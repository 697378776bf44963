"""Images as files: a folder or a zip of class subfolders, a flat one, labels by name or by table.

Labels come from, in this order: the CSV file that the caller names; a ``labels.csv`` or an
EDM-style ``dataset.json`` beside the images; the names of the first-level subfolders, sorted; none
(a flat folder).
"""

import csv
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.source import ImageSource, encoded_source, hashed
from lfm_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "test": ("test", "val", "validation", "valid"),
    "validation": ("validation", "val", "valid", "test"),
}
_MAX_FILE_BYTES = 1 << 29  # a zip entry may claim any size
_SAMPLED_CONTENTS = 128
_MAX_CLASSES = 1_000_000


def open_folder(path: str, *, split: str, preprocess: Preprocess, labels: str = "") -> ImageSource:
    """Image files under a folder.

    Args:
        path: the folder. Where it has subfolders named like splits (train; test, val, ...), the
            one of `split` is taken; otherwise the folder itself is its "train" split.
        split: "train", "test" or "validation".
        preprocess: size, channels and crop.
        labels: CSV file of ``file,label`` rows; files relative to the split's folder.

    Raises:
        UserError: no folder, no images, no such split, a table that does not fit the files; when
            read, a file that is not an image.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder {path!r}: no such folder; expected one of image files")
    inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    root = root / _split_prefix(inside, split, path)
    sizes, walked = {}, set()
    for parent, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(parent)
        if place in walked:  # a link back up: what is behind it has been seen
            folders.clear()
            continue
        walked.add(place)
        folders.sort()
        prefix = "" if parent == os.fspath(root) else os.path.relpath(parent, root) + "/"
        for name in names:
            if name.lower().endswith((*SUFFIXES, ".csv", ".json")):
                sizes[prefix + name] = os.path.getsize(os.path.join(parent, name))

    def read(name: str) -> bytes:
        return (root / name).read_bytes()

    return _open_files(f"folder:{root}", sizes, {}, read, preprocess, labels)


def open_zip(path: str, *, split: str, preprocess: Preprocess, labels: str = "") -> ImageSource:
    """The same layouts as `open_folder` inside a zip file; its checksums make the fingerprint."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"zip {path!r}: no such file")
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # zipfile raises nearly anything on damaged files
        raise UserError(f"zip {path!r}: truncated or damaged ({error})") from None
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    inside = sorted({entry.filename.split("/")[0] for entry in entries if "/" in entry.filename})
    prefix = _split_prefix(inside, split, path)
    prefix = f"{prefix}/" if prefix else ""
    chosen = {e.filename.removeprefix(prefix): e for e in entries if e.filename.startswith(prefix)}

    def read(name: str) -> bytes:
        entry = chosen[name]
        if entry.file_size > _MAX_FILE_BYTES:
            raise UserError(
                f"zip {path!r}: {entry.filename} unpacks to {entry.file_size} bytes; "
                f"at most {_MAX_FILE_BYTES} accepted"
            )
        try:
            return archive.read(entry)
        # zipfile and the codecs under it raise nearly anything on damaged entries.
        except Exception as error:
            raise UserError(f"zip {path!r}: {entry.filename}: damaged ({error})") from None

    sizes = {name: entry.file_size for name, entry in chosen.items()}
    checksums = {name: entry.CRC for name, entry in chosen.items()}
    return _open_files(f"zip:{file}", sizes, checksums, read, preprocess, labels)


def _open_files(
    source: str,
    sizes: dict[str, int],
    checksums: dict[str, int],
    read: Callable[[str], bytes],
    preprocess: Preprocess,
    table: str,
) -> ImageSource:
    names = sorted(name for name in sizes if name.lower().endswith(SUFFIXES))
    if not names:
        raise UserError(f"{source}: holds no images ({', '.join(SUFFIXES)})")
    labels, classes = _labels(source, names, sizes, read, table)
    # Contents of all files where they are known (zip), of evenly spaced ones elsewhere.
    sampled = [] if checksums else names[:: -(-len(names) // _SAMPLED_CONTENTS)]
    listing = [[name, sizes[name], checksums.get(name)] for name in names]
    contents = [hashed(read(name)) for name in sampled]
    return encoded_source(
        source,
        lambda i: preprocess.encoded(read(names[i]), f"{source}/{names[i]}"),
        labels,
        classes,
        hashed(listing, contents, labels, preprocess.spec()),
        tuple(names),
    )


def _split_prefix(inside: list[str], split: str, path: str) -> str:
    if split not in SPLIT_FOLDERS:
        raise UserError(f"split {split!r}: expected one of {', '.join(SPLIT_FOLDERS)}")
    for name in SPLIT_FOLDERS[split]:
        if name in inside:
            return name
    if split == "train" and not any(n in inside for names in SPLIT_FOLDERS.values() for n in names):
        return ""
    expected = " or ".join(SPLIT_FOLDERS[split])
    raise UserError(f"{path}: has no {split!r} split; expected a subfolder {expected}")


def _labels(
    source: str,
    names: list[str],
    sizes: dict[str, int],
    read: Callable[[str], bytes],
    table: str,
) -> tuple[np.ndarray, tuple[str, ...]]:
    if table:
        try:
            rows = _csv_rows(Path(table).expanduser().read_bytes(), table)
        except OSError as error:
            raise UserError(f"labels {table!r}: {error.strerror}; expected a CSV file") from None
        return _from_table(rows, names, table)
    if "labels.csv" in sizes:
        return _from_table(_csv_rows(read("labels.csv"), "labels.csv"), names, source)
    if "dataset.json" in sizes:
        rows = _json_rows(read("dataset.json"), f"{source}/dataset.json")
        if rows:
            return _from_table(rows, names, f"{source}/dataset.json")
    parents = [PurePosixPath(name).parts[0] if "/" in name else "" for name in names]
    classes = sorted(set(parents))
    if classes == [""]:
        return np.full(len(names), -1), ()
    if "" in classes:
        raise UserError(
            f"{source}: images both beside and inside class subfolders "
            f"(such as {names[parents.index('')]}); expected one or the other"
        )
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place[parent] for parent in parents]), tuple(classes)


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
    rows: dict[str, str], names: list[str], where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    missing = [name for name in names if name not in rows]
    if missing:
        raise UserError(f"{where}: no label for {missing[0]} ({len(missing)} files without one)")
    values = [rows[name] for name in names]
    if all(re.fullmatch(r"-?[0-9]{1,9}", value) for value in values):
        numbers = [int(value) for value in values]
        for name, number in zip(names, numbers, strict=True):
            if not 0 <= number < _MAX_CLASSES:
                raise UserError(
                    f"{where}: label {number} of {name} is out of range; "
                    f"expected 0 to {_MAX_CLASSES - 1}"
                )
        labels = np.array(numbers)
        return labels, tuple(str(i) for i in range(int(labels.max()) + 1))
    classes = sorted(set(values))
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place[value] for value in values]), tuple(classes)
