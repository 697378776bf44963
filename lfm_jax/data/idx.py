"""MNIST-format files: images and labels as IDX, gzip-compressed or not.

An IDX file is a big-endian header (two zero bytes, type code, number of dimensions, one uint32 a
dimension) and the raw elements. A folder holds ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.source import ImageSource, array_source
from lfm_jax.errors import UserError

_UINT8 = 0x08
_MAX_BYTES = 1 << 34  # a damaged header must not ask for all memory
_SPLITS = {"train": "train", "test": "t10k", "validation": "t10k", "t10k": "t10k"}


def read_idx(path: Path, *, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """Read one IDX file of unsigned bytes.

    Args:
        path: the file, plain or gzip (told by its content, not by its name).
        dimensions: how many the array must have: 3 for images, 1 for labels.

    Raises:
        UserError: no such file, another magic number, type or rank, or a length that does not agree
            with the header (truncated or trailing bytes), or damaged compression.
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if packed else raw as file:
                return _parse(file, path, dimensions)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged ({error})") from None


def _parse(file: Any, path: Path, dimensions: int) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4:
        raise UserError(f"{path}: truncated: {len(head)} bytes are no IDX header")
    zeros, kind, rank = struct.unpack(">HBB", head)
    if zeros or kind != _UINT8 or rank != dimensions:
        raise UserError(
            f"{path}: magic number 0x{head.hex()}; expected 0x000008{dimensions:02x} "
            f"(IDX, unsigned bytes, {dimensions} dimensions)"
        )
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise UserError(f"{path}: truncated inside the header")
    shape = struct.unpack(f">{rank}I", sizes)
    expected = math.prod(shape)
    if expected > _MAX_BYTES:
        raise UserError(f"{path}: the header claims {shape}; at most {_MAX_BYTES} bytes accepted")
    # One byte more than announced, to see trailing ones and to make gzip check its checksum.
    data = _read(file, expected + 1)
    if len(data) != expected:
        found = f"{len(data)} bytes" if len(data) < expected else "more"
        raise UserError(
            f"{path}: truncated or damaged: {shape} needs {expected} bytes, found {found}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read(file: Any, size: int) -> bytearray:
    """At most `size` bytes, in pieces: memory follows what is there, not what is claimed."""
    data = bytearray()
    while len(data) < size and (piece := file.read(min(size - len(data), 1 << 22))):
        data += piece
    return data


def open_idx(path: str, *, split: str, preprocess: Preprocess) -> ImageSource:
    """A folder of MNIST-format files as an image source, held in memory.

    Args:
        path: the folder; Debian's ``dataset-fashion-mnist`` is /usr/share/datasets/fashion-mnist.
        split: "train" or "test" (the t10k files).
        preprocess: size and channels; ``fit="pad"`` turns 28 into 32 by two zeros a side.

    Raises:
        UserError: folder or images missing, damaged file, counts of images and labels that differ.
    """
    folder = Path(path).expanduser()
    if split not in _SPLITS:
        raise UserError(f"idx split {split!r}: expected one of {', '.join(_SPLITS)}")
    if not folder.is_dir():
        raise UserError(f"idx folder {path!r}: no such folder; expected one of MNIST-format files")
    prefix = _SPLITS[split]
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images = read_idx(images_path, dimensions=3)
    labels = read_idx(labels_path, dimensions=1).astype(np.int32)
    if len(labels) != len(images):
        raise UserError(f"{labels_path}: {len(labels)} labels for {len(images)} images")
    if not images.size:
        raise UserError(f"{images_path}: holds no images")
    classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    return array_source(
        f"idx:{folder}", preprocess.arrays(images, str(images_path)), labels, classes
    )


def _find(folder: Path, name: str) -> Path:
    for candidate in (name, name + ".gz", name.replace("-idx", ".idx")):
        if (folder / candidate).exists():
            return folder / candidate
    raise UserError(f"{folder / name}: no such file; expected {name} or {name}.gz")
