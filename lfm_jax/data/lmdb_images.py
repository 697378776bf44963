"""LMDB image databases in two layouts.

- NVAE (CelebA-HQ, FFHQ): ``train.lmdb`` and ``validation.lmdb``; key ``str(i)``, value the raw
  uint8 RGB bytes of a square image.
- torchvision's LSUN: ``<class>_<split>_lmdb``; any keys, in byte order; value a JPEG or WebP file.

torchvision keeps the keys in a pickle beside the database; here they are read from the database,
so that no pickle is ever loaded.
"""

import itertools
import math
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.source import ImageSource, encoded_source, hashed
from lfm_jax.errors import UserError

_SPLITS = {"train": ("train",), "test": ("validation", "val", "test")}
_SPLITS["validation"] = _SPLITS["test"]

# LMDB refuses to open one database twice in a process, and a train and an encode job of one process
# each open their source. An environment is shared as long as somebody holds it.
_OPENED: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


def open_lmdb(path: str, *, split: str, preprocess: Preprocess, limit: int = 0) -> ImageSource:
    """Open an LMDB image database.

    Args:
        path: a folder holding ``<split>.lmdb`` or ``<class>_<split>_lmdb`` databases, or one
            database itself (then `split` is not looked at). Several LSUN classes become labels.
        split: "train", "test" or "validation".
        preprocess: size, channels and crop.
        limit: the first `limit` images; 0: all. Saves listing millions of keys.

    Raises:
        UserError: nothing of the two layouts there, a damaged database, an empty one; when read, a
            value that is no image.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"lmdb {path!r}: no such folder or file")
    databases = _databases(root, split)
    environments = [_open(database) for database in databases]
    entries: list[tuple[int, bytes]] = []
    for number, environment in enumerate(environments):
        keys = _keys(environment, limit - len(entries) if limit else None)
        entries += [(number, key) for key in keys]
    if not entries:
        raise UserError(f"lmdb {path!r}: holds no entries")
    classes = tuple(database.name.split(f"_{split}_")[0] for database in databases)
    several = len(databases) > 1
    labels = np.array([number if several else -1 for number, _ in entries])

    def value(index: int) -> bytes:
        number, key = entries[index]
        with environments[number].begin() as transaction:
            return transaction.get(key)

    def read_one(index: int) -> np.ndarray:
        number, key = entries[index]
        return _decode(value(index), f"{databases[number]} key {key!r}", preprocess)

    # Keys are short and in hand; of the values a sample must do.
    sample = [hashed(value(i)) for i in range(0, len(entries), -(-len(entries) // 128))]
    listing = hashed(b"\0".join(key for _, key in entries))
    return encoded_source(
        f"lmdb:{root}",
        read_one,
        labels,
        classes if several else (),
        hashed(listing, sample, labels, preprocess.spec()),
    )


def _databases(root: Path, split: str) -> list[Path]:
    if root.is_file() or (root / "data.mdb").exists():
        return [root]
    if split not in _SPLITS:
        raise UserError(f"lmdb split {split!r}: expected one of {', '.join(_SPLITS)}")
    for name in _SPLITS[split]:
        if (root / f"{name}.lmdb").exists():
            return [root / f"{name}.lmdb"]
        found = sorted(root.glob(f"*_{name}_lmdb"))
        if found:
            return found
    raise UserError(
        f"lmdb {str(root)!r}: no {_SPLITS[split][0]}.lmdb (NVAE) and no "
        f"<class>_{_SPLITS[split][0]}_lmdb (LSUN) in it"
    )


def _open(database: Path) -> Any:
    try:
        import lmdb
    except ImportError:
        raise UserError(
            "data.source='lmdb': the package lmdb is not installed; expected pip install lmdb"
        ) from None
    place = os.path.realpath(database)
    with _OPENING:
        environment = _OPENED.get(place)
        if environment is None:
            try:
                # lock=False: read-only media, and many processes on one file.
                environment = lmdb.open(
                    place, subdir=database.is_dir(), readonly=True, lock=False, readahead=False
                )
            except lmdb.Error as error:
                raise UserError(f"{database}: not a readable LMDB database ({error})") from None
            _OPENED[place] = environment
    return environment


def _keys(environment: Any, limit: int | None) -> list[bytes]:
    count = environment.stat()["entries"]
    wanted = count if limit is None else min(limit, count)
    with environment.begin() as transaction:
        # NVAE counts "0", "1", ...; byte order would put "10" before "2".
        ends = (b"0", str(count - 1).encode())
        if count and all(transaction.get(key) is not None for key in ends):
            return [str(i).encode() for i in range(wanted)]
        keys = transaction.cursor().iternext(keys=True, values=False)
        return [bytes(key) for key in itertools.islice(keys, wanted)]


def _decode(value: bytes | None, where: str, preprocess: Preprocess) -> np.ndarray:
    if value is None:
        raise UserError(f"{where}: no such key; expected keys 0 to N-1")
    side = math.isqrt(len(value) // 3)
    compressed = value[:3] == b"\xff\xd8\xff" or value[:4] in (b"RIFF", b"\x89PNG")
    if not compressed and side and 3 * side * side == len(value):
        if side * side > preprocess.max_pixels:
            raise UserError(f"{where}: {side}x{side} pixels; at most {preprocess.max_pixels}")
        return preprocess.array(np.frombuffer(value, np.uint8).reshape(side, side, 3), where)
    return preprocess.encoded(value, where)
