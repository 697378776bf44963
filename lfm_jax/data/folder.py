"""Images as files: a folder or a zip of class subfolders, a flat one, labels by name or by table.

How labels and class names follow from the files: `lfm_jax.data.folder_labels`. Names that begin
with a dot and ``__MACOSX`` are other programs' notes: neither classes nor images.
"""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from lfm_jax.data.folder_labels import SUFFIXES, Files, advice, is_image, read_labels
from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.source import ImageSource, check_count, encoded_source, hashed
from lfm_jax.errors import UserError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "test": ("test", "val", "validation", "valid"),
    "validation": ("validation", "val", "valid", "test"),
}
_MAX_FILE_BYTES = 1 << 29  # a zip entry may claim any size
_SAMPLED_CONTENTS = 128


def open_folder(
    path: str, *, split: str, preprocess: Preprocess, labels: str = "", num_classes: int = 0
) -> ImageSource:
    """Image files under a folder.

    Args:
        path: the folder. Where it has subfolders named like splits (train; test, val, ...), the
            one of `split` is taken; otherwise the folder itself is its "train" split.
        split: "train", "test" or "validation".
        preprocess: size, channels and crop.
        labels: CSV file of ``file,label`` rows; files relative to the split's folder.
        num_classes: fewer classes with names than this are refused; 0 accepts any.

    Raises:
        UserError: no folder, no images, no such split, a table that does not fit the files, too few
            classes; when read, a file that is not an image.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder {path!r}: no such folder; expected one of image files")
    inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    prefix = _split_prefix(inside, split, path)

    def part(folder: Path, sizes: dict[str, int]) -> Files:
        def read(name: str) -> bytes:
            return (folder / name).read_bytes()

        return Files(where=f"folder:{folder}", sizes=sizes, checksums={}, read=read)

    chosen = part(root / prefix, _listed(root / prefix))
    others = (part(root / name, _glimpse(root / name)) for name in _others(inside, prefix))
    return _opened(chosen, others, preprocess, labels, num_classes)


def open_zip(
    path: str, *, split: str, preprocess: Preprocess, labels: str = "", num_classes: int = 0
) -> ImageSource:
    """The same layouts as `open_folder` inside a zip file; its checksums make the fingerprint."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"zip {path!r}: no such file")
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # zipfile raises nearly anything on damaged files
        raise UserError(f"zip {path!r}: truncated or damaged ({error})") from None
    entries = {}
    for entry in archive.infolist():
        # Some programs write "./cat/a.png".
        parts = [part for part in entry.filename.split("/") if part not in ("", ".")]
        if not entry.is_dir() and not any(map(_foreign, parts)):
            entries["/".join(parts)] = entry
    inside = sorted({name.split("/")[0] for name in entries if "/" in name})
    prefix = _split_prefix(inside, split, path)

    def part(folder: str, where: str) -> Files:
        start = f"{folder}/" if folder else ""
        files = {n.removeprefix(start): e for n, e in entries.items() if n.startswith(start)}

        def read(name: str) -> bytes:
            entry = files[name]
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

        return Files(
            where=where,
            sizes={name: entry.file_size for name, entry in files.items()},
            checksums={name: entry.CRC for name, entry in files.items()},
            read=read,
        )

    others = (part(name, f"zip:{file}/{name}") for name in _others(inside, prefix))
    return _opened(part(prefix, f"zip:{file}"), others, preprocess, labels, num_classes)


def _opened(
    files: Files, others: Iterable[Files], preprocess: Preprocess, table: str, num_classes: int
) -> ImageSource:
    names, sizes, checksums, read = files.images, files.sizes, files.checksums, files.read
    if not names:
        raise UserError(f"{files.where}: holds no images ({', '.join(SUFFIXES)})")
    labels, classes, named = read_labels(files, names, table, others)
    if named:
        check_count(classes, num_classes, files.where, advice(names, classes))
    # Contents of all files where they are known (zip), of evenly spaced ones elsewhere.
    sampled = [] if checksums else names[:: -(-len(names) // _SAMPLED_CONTENTS)]
    listing = [[name, sizes[name], checksums.get(name)] for name in names]
    contents = [hashed(read(name)) for name in sampled]
    return encoded_source(
        files.where,
        lambda i: preprocess.encoded(read(names[i]), f"{files.where}/{names[i]}"),
        labels,
        classes,
        hashed(listing, contents, labels, preprocess.spec()),
        tuple(names),
    )


# ---- which files


def _foreign(name: str) -> bool:
    """Whether a file or folder is another program's (``.ipynb_checkpoints``, ``._cat.png``)."""
    return name.startswith(".") or name == "__MACOSX"


def _split_prefix(inside: list[str], split: str, path: str) -> str:
    if split not in SPLIT_FOLDERS:
        raise UserError(f"split {split!r}: expected one of {', '.join(SPLIT_FOLDERS)}")
    for name in SPLIT_FOLDERS[split]:
        if name in inside:
            return name
    if split == "train" and not _others(inside, "train"):
        return ""
    expected = " or ".join(SPLIT_FOLDERS[split])
    raise UserError(f"{path}: has no {split!r} split; expected a subfolder {expected}")


def _others(inside: list[str], prefix: str) -> list[str]:
    """The split folders beside the one that is opened."""
    known = {name for names in SPLIT_FOLDERS.values() for name in names}
    return [name for name in inside if prefix and name in known - {prefix}]


def _listed(root: Path) -> dict[str, int]:
    """Bytes of every image and table under a folder, by its name relative to it."""
    sizes, walked = {}, set()
    for parent, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(parent)
        if place in walked:  # a link back up: what is behind it has been seen
            folders.clear()
            continue
        walked.add(place)
        folders[:] = sorted(name for name in folders if not _foreign(name))
        prefix = "" if parent == os.fspath(root) else os.path.relpath(parent, root) + "/"
        for name in names:
            if name.lower().endswith((*SUFFIXES, ".csv", ".json")) and not _foreign(name):
                sizes[prefix + name] = os.path.getsize(os.path.join(parent, name))
    return sizes


def _glimpse(root: Path) -> dict[str, int]:
    """Of a split that is not opened, what its classes follow from: tables, an image a subfolder.

    No folder is read beyond its first image: there may be a million.
    """
    found = [name for name in ("labels.csv", "dataset.json") if (root / name).is_file()]
    walked = {os.path.realpath(root)}
    for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        image = "" if _foreign(name) else _first_image(os.path.join(root, name), walked)
        found += [f"{name}/{image}"] if image else []
    return dict.fromkeys(found, 0)


def _first_image(folder: str, walked: set[str]) -> str:
    """The name of an image in or under a folder; "" where there is none."""
    place, folders = os.path.realpath(folder), []
    if place in walked:  # as above
        return ""
    walked.add(place)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir() and not _foreign(entry.name):
                    folders.append(entry.path)
                elif is_image(entry.name) and not _foreign(entry.name):
                    return entry.name
    except OSError:  # a folder that may not be read is empty to `os.walk` too
        return ""
    return next(filter(None, (_first_image(path, walked) for path in folders)), "")
