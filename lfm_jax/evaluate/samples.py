"""Sample files of anyone's making: ``arr_0`` uint8 NHWC and optionally ``arr_1`` labels.

The format that ADM's sampler writes and its evaluator reads. What is not exactly that is refused
with the reason: a figure over floats that were cast, or over channels taken for rows, looks like
any other.
"""

import dataclasses
import math
import os
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath
from jaxtyping import Integer, UInt8

from lfm_jax.checksums import file_sha256
from lfm_jax.errors import UserError

ACCEPTED = "accepted: an npz with arr_0 uint8 [n, height, width, 1 or 3] and optional arr_1 int [n]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Images to judge, their labels (None: unconditional) and the file's sha256."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Integer[np.ndarray, " n"] | None
    sha256: str


def read_samples(path: str | os.PathLike) -> Samples:
    """Read and check a sample file whole; `SampleFile` reads it in batches.

    Raises:
        UserError: missing, not an npz, floats, channels first, ranks or counts that do not fit.
    """
    file = SampleFile(path)
    return Samples(images=file.read(), labels=file.labels, sha256=file.sha256)


class SampleFile:
    """A sample file opened and checked but not read: 50,000 images of 256 pixels are 10 GB.

    Attributes:
        shape: ``(n, h, w, c)`` of the images.
        labels: int64 ``[n]``, None if unconditional.

    Raises:
        UserError: as `read_samples`, before any image is read.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = epath.Path(path)
        if not self.path.exists():
            raise UserError(f"samples {path}: no such file; {ACCEPTED}")
        try:
            with self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
                names = {n.removesuffix(".npy") for n in archive.namelist()}
                if "arr_0" not in names:
                    raise UserError(f"samples {path}: holds {', '.join(sorted(names))}; {ACCEPTED}")
                with archive.open("arr_0.npy") as member:
                    self.shape, fortran, dtype = _read_header(member)
                    _check_size(archive, member, self.shape, dtype)
                    hint = ""
                    if dtype.kind == "f" and self.shape and self.shape[0]:
                        first = np.frombuffer(member.read(dtype.itemsize * 1000), dtype)
                        hint = f" in [{first.min():.3g}, {first.max():.3g}]"
                self.labels = None
                if "arr_1" in names:
                    with archive.open("arr_1.npy") as member:
                        shape, _, kind = _read_header(member)
                        _check_size(archive, member, shape, kind)
                    with archive.open("arr_1.npy") as member:
                        self.labels = np.lib.format.read_array(member, allow_pickle=False)
        except UserError:
            raise
        except Exception as error:  # zipfile and numpy raise nearly anything on damaged files
            raise UserError(f"samples {path}: not readable ({error}); {ACCEPTED}") from error
        check_layout(self.shape, dtype, f"samples {path}: arr_0", hint=hint)
        if fortran:
            raise UserError(f"samples {path}: arr_0 is in Fortran order; {ACCEPTED}, in C order")
        self._check_labels()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def sha256(self) -> str:
        """Of the whole file, hex."""
        return file_sha256(self.path)

    def read(self) -> UInt8[np.ndarray, "n h w c"]:
        """All images."""
        images = np.empty(self.shape, np.uint8)
        start = 0
        for batch in self.batches(4096):
            images[start : start + len(batch)] = batch
            start += len(batch)
        return images

    def batches(
        self, size: int, *, start: int = 0, stop: int | None = None
    ) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """Images `start` to `stop` in order, `size` at a time.

        Raises `UserError` if the file ends too soon or is damaged.
        """
        pixels = int(np.prod(self.shape[1:]))
        stop = len(self) if stop is None else min(stop, len(self))
        with self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
            with archive.open("arr_0.npy") as member:
                _read_header(member)
                self._read(member, start * pixels, size * pixels)
                for first in range(start, stop, size):
                    count = min(size, stop - first)
                    data = self._read(member, count * pixels)
                    if len(data) != count * pixels:
                        raise UserError(
                            f"samples {self.path}: ends after {first + len(data) // pixels} "
                            f"of {len(self)} images; {ACCEPTED}"
                        )
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])

    def _read(self, member, count: int, at_once: int = 0) -> bytes:
        """`count` bytes; with `at_once` they are passed over in pieces of that size."""
        try:
            if not at_once:
                return member.read(count)
            for start in range(0, count, at_once):
                member.read(min(at_once, count - start))
            return b""
        except Exception as error:  # of zipfile, and of zlib for a damaged byte
            raise UserError(f"samples {self.path}: not readable ({error}); {ACCEPTED}") from error

    def _check_labels(self) -> None:
        labels = self.labels
        if labels is None:
            return
        if labels.ndim != 1 or len(labels) != len(self) or labels.dtype.kind not in "iu":
            raise UserError(
                f"samples {self.path}: arr_1 is {labels.dtype} {list(labels.shape)} "
                f"for {len(self)} images; {ACCEPTED}"
            )
        self.labels = labels.astype(np.int64)


def _read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def write_samples(
    path: str | os.PathLike,
    batches: Iterable[np.ndarray],
    shape: tuple[int, ...],
    labels: Integer[np.ndarray, " n"] | None = None,
    *,
    dtype: np.typing.DTypeLike = np.uint8,
) -> None:
    """Write a sample file batch by batch, all or nothing; it is never in memory as a whole.

    Args:
        batches: the images in order.
        shape: of all of them together, ``(n, h, w, c)``.
        labels: for ``arr_1``.
        dtype: of the arrays; latents are float32.

    Raises:
        ValueError: the batches are not what `shape` says.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    count = 0
    with temporary.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {**header, "shape": tuple(shape)})
            for batch in batches:
                if batch.shape[1:] != tuple(shape[1:]) or batch.dtype != dtype:
                    raise ValueError(f"samples {path}: {batch.dtype} {batch.shape} for {shape}")
                member.write(np.ascontiguousarray(batch).data)
                count += len(batch)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels), allow_pickle=False)
    if count != shape[0]:
        raise ValueError(f"samples {path}: {count} images for {shape[0]}")
    temporary.replace(path)


def _check_size(archive: zipfile.ZipFile, member, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """`ValueError` unless the header's claim is what follows it: memory is made by the claim."""
    held = archive.getinfo(member.name).file_size - member.tell()
    claimed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or claimed != held:
        raise ValueError(f"{member.name} claims {shape} {dtype}, {held} bytes follow")


def check_images(images: np.ndarray, what: str) -> None:
    """`UserError`, beginning with `what`, unless `images` are uint8 NHWC with 1 or 3 channels."""
    hint = ""
    if images.dtype.kind == "f" and images.size:
        hint = f" in [{images.min():.3g}, {images.max():.3g}]"
    check_layout(images.shape, images.dtype, what, hint=hint)


def check_layout(shape: tuple[int, ...], dtype: np.dtype, what: str, *, hint: str = "") -> None:
    """The same of a shape and a dtype; `hint` says more of a wrong dtype."""
    if dtype != np.uint8:
        raise UserError(f"{what} is {dtype}{hint}; {ACCEPTED}")
    found = list(shape)
    if len(shape) != 4:
        raise UserError(f"{what} has shape {found}; {ACCEPTED}")
    if shape[-1] not in (1, 3):
        first = " (channels first)" if shape[1] in (1, 3) else ""
        raise UserError(f"{what} has shape {found}{first}; {ACCEPTED}")
    if not shape[0]:
        raise UserError(f"{what} is empty; {ACCEPTED}")
